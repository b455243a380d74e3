#!/usr/bin/env bash
# Step 1 of 3: train the Source (tp2 pp1 dp1).
#
# Shows:     the Source of example 4, which is the Source of example 2: if examples/ex2 was run with the same
#            settings, its curve and checkpoint are used and nothing is trained.
# Hardware:  SIZE=tiny: 2 CPU cores. SIZE=125M: 2 CUDA devices.
# Minutes:   about 2 (tiny).
# Next:      bash examples/ex4/convert.sh
# You see:   a line every 10 iterations, loss from about 10.8 down; then runs/ex4/checkpoints/source/global_step100
#            and global_step200, and curves in runs/ex4/tensorboard. What an earlier run of this script left there
#            is replaced. Knobs: examples/common.sh.
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=examples/ex4/topology.sh
source "$HERE/topology.sh"
# shellcheck source=examples/common.sh
source "$HERE/../common.sh"
# shellcheck source=examples/ex4/reuse.sh
source "$HERE/reuse.sh"

if [[ -n "$SOURCE_RUN_DIR" ]]; then
    borrow_curves
else
    train_source
fi
