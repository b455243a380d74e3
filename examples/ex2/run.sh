#!/usr/bin/env bash
# Example 2, all of it: matrices cut in two become whole (TP2 -> 1).
#
# Shows:     two tensor-parallel ranks train and save; the save is converted; one rank
#            resumes from it; a number and a picture tell whether training went on as if nothing had
#            happened. A control run (tp2 pp1 dp1, another micro batch) says how far the order of float sums
#            alone drives two runs apart.
# Hardware:  SIZE=tiny (default on a CPU): 2 cores. SIZE=125M: 2 CUDA devices.
# Minutes:   2 to 4 (tiny).
# You see:   a table that ends with PASS, runs/ex2/ucp_training_loss.png with both curves on one line, verdict.txt,
#            verdict.json and csv/. Exit code 0 on PASS, 1 on FAIL.
# Knobs:     SIZE DEVICE LAUNCHER RUN_DIR CONTROL DRY_RUN ...: examples/README.md
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=examples/ex2/topology.sh
source "$HERE/topology.sh"
# shellcheck source=examples/common.sh
source "$HERE/../common.sh"

run_example
