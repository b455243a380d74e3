#!/usr/bin/env bash
# Figure 9 of the paper: LLaMA, BLOOM and a mixture of experts, each saved under one topology and resumed under another.
#
# Shows:     llama: tp2 pp2 dp2 -> tp2 pp1 dp2 and tp2 pp2 dp1; bloom: tp2 pp2 dp2 -> tp2 pp2 dp1; moe (top-2 of four
#            experts in every block): tp1 pp2 dp4 ep4 -> tp2 pp2 dp2 ep2. ZeRO-1. Each Source trains to its end and
#            saves half way; each Target resumes from there directly, one of each model once more from the universal
#            folder; a control (the Source's topology, another micro batch) says how far the order of float sums alone
#            drives two runs apart. Per Target: max |delta| of the losses against twice the control's, relative
#            distance of the grad norms, digest of the state at save and load.
# Hardware:  2 CPU cores, 8 GB; up to 8 ranks at a time.
# Minutes:   8 to 9 on 2 cores (measured: 12 minutes of CPU time, on cores shared with other work). Half of it
#            is the start of 13 launches with 84 ranks.
# You see:   three tables that end with PASS; in runs/fig9 the pictures fig9_llama.png, fig9_bloom.png and fig9_moe.png,
#            the tables beside them (.md), and under llama/, bloom/ and moe/ what a run of ex1 leaves. Exit code 0 on
#            PASS, 1 on FAIL.
# Knobs:     FIG=llama|bloom|moe|all GALLERY_DIR, and those of examples/README.md
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=examples/fig9/topology.sh
source "$HERE/topology.sh"
# shellcheck source=examples/common.sh
source "$HERE/../common.sh"

: "${FIG:=all}" # llama | bloom | moe | all
[[ "$FIG" =~ ^(llama|bloom|moe|all)$ ]] || die "FIG=$FIG is none of llama, bloom, moe, all"
begin_figures

figure() { # llama|bloom|moe
    local title
    local -n name="name_$1" preset="preset_$1" source="source_$1" note="note_$1"
    set_model "$preset"
    set_run_dir "$figures_dir/$1"
    train_one_to_many "$source" "targets_$1" "universal_$1"
    title="Figure 9, $name: $(in_words "$(source_name)") resumed under another topology"
    figure_note="${note:-}"
    judge_figure "fig9_$1" "$1" "$title" "$RUN_DIR/tensorboard"
}

for model in llama bloom moe; do
    [[ "$FIG" == "$model" || "$FIG" == all ]] || continue
    figure "$model"
done
end_figures
