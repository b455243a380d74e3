#!/usr/bin/env bash
# Figures 7a and 7b of the paper: one Source resumed as eleven Targets, and eight Sources resumed as one Target.
#
# Shows:     7a: tp2 pp2 dp2 ZeRO-1 trains and saves; eleven topologies resume directly from its native save, three of
#            them once more from the universal folder. 7b: eight topologies train and save; tp2 pp2 dp2 ZeRO-1 resumes
#            from each. Every Source also goes on uninterrupted, and a control run (its topology, another micro batch)
#            says how far the order of float sums alone drives two runs apart. Per Target: max |delta| of the losses
#            against twice the control's, relative distance of the grad norms, digest of the state at save and load.
# Hardware:  2 CPU cores, 8 GB; up to 8 ranks at a time.
# Minutes:   15 to 20 on 2 cores, 7a two fifths of it (measured: 33 minutes of CPU time, on cores shared with other
#            work). Much of it is the start of 40 launches with 180 ranks.
# You see:   two tables that end with PASS; in runs/fig7 the pictures fig7a.png and fig7b.png, the tables fig7.md, and
#            under 7a/ and 7b/<Source>/ what a run of ex1 leaves. Exit code 0 on PASS, 1 on FAIL.
# Knobs:     FIG=7a|7b|both GALLERY_DIR, and those of examples/README.md
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=examples/fig7/topology.sh
source "$HERE/topology.sh"
# shellcheck source=examples/common.sh
source "$HERE/../common.sh"

: "${FIG:=both}"     # 7a | 7b | both
: "${GALLERY_DIR:=}" # if given, the pictures and tables are copied there
[[ "$FIG" =~ ^(7a|7b|both)$ ]] || die "FIG=$FIG is none of 7a, 7b, both"
top="$RUN_DIR"

set_source() { # "TP PP DP SP ZERO"
    read -r SOURCE_TP SOURCE_PP SOURCE_DP SOURCE_SP SOURCE_ZERO <<<"$1"
}

set_target() {
    read -r TARGET_TP TARGET_PP TARGET_DP TARGET_SP TARGET_ZERO <<<"$1"
}

resume_directly() { # NAME: from the native save of another topology, nothing is converted
    say "$1: iterations $((SAVE_ITER + 1))-$TRAIN_ITERS, directly from the Source's native save"
    train_as_target "$1" "$MICRO_BATCH" --load "$SOURCE_DIR" --load-tag "$TAG"
}

resume_from_universal() { # NAME
    say "$1: iterations $((SAVE_ITER + 1))-$TRAIN_ITERS, from the universal folder"
    train_as_target "$1" "$MICRO_BATCH" --load "$UNIVERSAL_DIR" --universal-checkpoint
}

figure_7a() {
    local target
    set_run_dir "$top/7a"
    set_source "$source_7a"
    train_source
    for target in "${targets_7a[@]}"; do
        set_target "$target"
        resume_directly "target_$(target_name)"
    done
    convert_source
    for target in "${universal_7a[@]}"; do
        set_target "$target"
        resume_from_universal "target_$(target_name)_universal"
    done
    train_control
    judge_figure 7a "Figure 7a: one Source resumed under ${#targets_7a[@]} topologies" "$RUN_DIR/tensorboard"
}

figure_7b() {
    local source words folders=()
    set_target "$target_7b"
    for source in "${sources_7b[@]}"; do
        set_source "$source"
        set_run_dir "$top/7b/$(source_name)"
        folders+=("$RUN_DIR/tensorboard")
        train_source
        resume_directly "target_$(target_name)_from_$(source_name)"
        train_control
    done
    words="$(target_name | tr _ ' ')"
    judge_figure 7b "Figure 7b: ${#sources_7b[@]} Sources resumed as ${words/ z/ ZeRO-}" "${folders[@]}"
}

judge_figure() { # 7a|7b TITLE TENSORBOARD_FOLDER...
    local name="$top/fig$1" command
    command=(
        "$PYTHON" "$ROOT/tb_analysis/tb_analysis_script.py" --tb_dir "${@:3}" --log_dir ../logs
        --tb_event_key "lm-loss-training/lm loss" --grad_norm_tolerance 1e-4
        --plot_name "$name.png" --plot_title "$2" --csv_name "$top/csv/$1/"
        --verdict_json "$name.json" --markdown "$name.md"
    )
    say "Verdict on figure $1"
    if [[ "$DRY_RUN" == 1 ]]; then
        show "${command[@]}"
        return
    fi
    # A FAIL is kept for the end, so that the other figure is made all the same; anything else stops here.
    "${command[@]}" | tee "$name.txt" || { [[ $? == 1 ]] && failed+=("$1"); }
    printf '\nMade by `FIG=%s bash examples/fig7/run.sh`.\n' "$1" >>"$name.md"
    if [[ -n "$GALLERY_DIR" ]]; then cp "$name".{png,md} "$GALLERY_DIR/"; fi
}

failed=()
for figure in 7a 7b; do
    [[ "$FIG" == "$figure" || "$FIG" == both ]] || continue
    "figure_$figure"
done
((${#failed[@]} == 0)) || { echo "FAIL: figure ${failed[*]}" >&2 && exit 1; }
