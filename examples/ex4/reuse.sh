# shellcheck shell=bash
# Whether example 2's Source can serve as example 4's. Sourced after ../common.sh.
#
# SOURCE_RUN_DIR is the run folder of another example whose Source is used; empty = train one here. If it is
# not given, the folder ex2 beside RUN_DIR is taken where its finished Source has exactly this run's settings.

ex2_run_dir="$(dirname "$RUN_DIR")/ex2"
if [[ -z "$SOURCE_RUN_DIR" && -f "$ex2_run_dir/settings.txt" ]] &&
    [[ "$(settings)" == "$(<"$ex2_run_dir/settings.txt")" ]]; then
    SOURCE_RUN_DIR="$ex2_run_dir"
fi
if [[ -n "$SOURCE_RUN_DIR" && ! -d "$SOURCE_RUN_DIR/checkpoints/source/$TAG" ]]; then
    die "SOURCE_RUN_DIR=$SOURCE_RUN_DIR has no checkpoints/source/$TAG: run examples/ex2/run.sh, or unset it"
fi

source_checkpoints() { # the folder of the Source's native saves
    echo "${SOURCE_RUN_DIR:-$RUN_DIR}/checkpoints/source"
}

# The Source's curve, and the control's if it is there: copied, for the verdict reads one folder.
borrow_curves() {
    local folder
    say "Source: that of $SOURCE_RUN_DIR, same settings"
    clear_old "$RUN_DIR/tensorboard"
    for folder in "$SOURCE_RUN_DIR"/tensorboard/{source,control}_*; do
        [[ -d "$folder" ]] || continue
        [[ "$DRY_RUN" == 1 ]] || mkdir -p "$RUN_DIR/tensorboard"
        run cp -r "$folder" "$RUN_DIR/tensorboard/"
    done
}
