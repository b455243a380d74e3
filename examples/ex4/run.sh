#!/usr/bin/env bash
# Example 4, all of it: tensor parallel becomes pipeline parallel (TP2 -> PP2).
#
# Shows:     two tensor-parallel ranks train and save; the save is converted; two pipeline stages
#            resume from it; a number and a picture tell whether training went on as if nothing had
#            happened. A control run (tp2 pp1 dp1, another micro batch) says how far the order of float sums
#            alone drives two runs apart.
# Hardware:  SIZE=tiny (default on a CPU): 2 cores. SIZE=125M: 2 CUDA devices.
# Minutes:   2 to 4 (tiny).
# You see:   a table that ends with PASS, runs/ex4/ucp_training_loss.png with both curves on one line, verdict.txt,
#            verdict.json and csv/. Exit code 0 on PASS, 1 on FAIL.
# Knobs:     SIZE DEVICE LAUNCHER RUN_DIR CONTROL DRY_RUN ...: examples/README.md
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=examples/ex4/topology.sh
source "$HERE/topology.sh"
# shellcheck source=examples/common.sh
source "$HERE/../common.sh"
# shellcheck source=examples/ex4/reuse.sh
source "$HERE/reuse.sh"

bash "$HERE/init_train_source.sh"
bash "$HERE/convert.sh"
bash "$HERE/resume_train_target.sh"
compgen -G "$RUN_DIR/tensorboard/control_*" >/dev/null || train_control "$(source_checkpoints)"
judge
