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

# shellcheck disable=SC2154  # topology.sh
: "${FIG:=both}" # 7a | 7b | both
[[ "$FIG" =~ ^(7a|7b|both)$ ]] || die "FIG=$FIG is none of 7a, 7b, both"
begin_figures

figure_7a() {
    set_run_dir "$figures_dir/7a"
    train_one_to_many "$source_7a" targets_7a universal_7a
    judge_figure fig7a 7a "Figure 7a: one Source resumed under ${#targets_7a[@]} topologies" "$RUN_DIR/tensorboard"
}

figure_7b() {
    local source folders=()
    set_target "$target_7b"
    for source in "${sources_7b[@]}"; do
        set_source "$source"
        set_run_dir "$figures_dir/7b/$(source_name)"
        folders+=("$RUN_DIR/tensorboard")
        train_source
        resume_directly "target_$(target_name)_from_$(source_name)"
        train_control
    done
    judge_figure fig7b 7b "Figure 7b: ${#sources_7b[@]} Sources resumed as $(in_words "$(target_name)")" "${folders[@]}"
}

for figure in 7a 7b; do
    [[ "$FIG" == "$figure" || "$FIG" == both ]] || continue
    "figure_$figure"
done
end_figures
