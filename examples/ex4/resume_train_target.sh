#!/usr/bin/env bash
# Step 3 of 3: resume from the universal checkpoint as the Target (tp1 pp2 dp1).
#
# Shows:     training goes on under another parallelism: two tensor-parallel ranks -> two pipeline stages.
# Hardware:  SIZE=tiny: 2 CPU cores. SIZE=125M: 2 CUDA devices.
# Minutes:   about 1 (tiny).
# You see:   the digest of what was loaded, equal to the one saved; iterations 101-200 from where the Source's loss
#            was; curves in runs/ex4/tensorboard.
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=examples/ex4/topology.sh
source "$HERE/topology.sh"
# shellcheck source=examples/common.sh
source "$HERE/../common.sh"
# shellcheck source=examples/ex4/reuse.sh
source "$HERE/reuse.sh"

train_target
