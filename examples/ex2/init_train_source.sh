#!/usr/bin/env bash
# Step 1 of 3: train the Source (tp2 pp1 dp1).
#
# Shows:     the Source of example 2: two tensor-parallel ranks, 200 iterations, saved at 100 and 200.
# Hardware:  SIZE=tiny: 2 CPU cores. SIZE=125M: 2 CUDA devices.
# Minutes:   about 2 (tiny).
# Next:      bash examples/ex2/convert.sh
# You see:   a line every 10 iterations, loss from about 10.8 down; then runs/ex2/checkpoints/source/global_step100
#            and global_step200, and curves in runs/ex2/tensorboard. What an earlier run of this script left there
#            is replaced. Knobs: examples/common.sh.
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=examples/ex2/topology.sh
source "$HERE/topology.sh"
# shellcheck source=examples/common.sh
source "$HERE/../common.sh"

train_source
