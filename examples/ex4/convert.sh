#!/usr/bin/env bash
# Step 2 of 3: convert the Source's save of iteration 100 to a universal checkpoint.
#
# Shows:     cuts across every matrix are exchanged for a cut between layers;
#            afterwards every parameter and Adam moment is one whole tensor.
# Hardware:  any CPU. No process group, no CUDA device.
# Minutes:   less than 1.
# Next:      bash examples/ex4/resume_train_target.sh
# You see:   progress, then runs/ex4/checkpoints/universal/global_step100_universal and latest_universal beside it.
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=examples/ex4/topology.sh
source "$HERE/topology.sh"
# shellcheck source=examples/common.sh
source "$HERE/../common.sh"
# shellcheck source=examples/ex4/reuse.sh
source "$HERE/reuse.sh"

convert_source "$(source_checkpoints)"
