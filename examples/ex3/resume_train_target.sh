#!/usr/bin/env bash
# Step 3 of 3: resume from the universal checkpoint as the Target (tp1 pp1 dp1).
#
# Shows:     training goes on under another parallelism: two data-parallel ranks -> one rank.
# Hardware:  SIZE=tiny: 2 CPU cores. SIZE=125M: 1 CUDA device.
# Minutes:   about 1 (tiny).
# You see:   the digest of what was loaded, equal to the one saved; iterations 101-200 from where the Source's loss
#            was; curves in runs/ex3/tensorboard.
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=examples/ex3/topology.sh
source "$HERE/topology.sh"
# shellcheck source=examples/common.sh
source "$HERE/../common.sh"

train_target
