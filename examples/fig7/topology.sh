# shellcheck shell=bash
# shellcheck disable=SC2034  # read by run.sh and ../common.sh
# Figures 7a and 7b of the paper (Lian et al., USENIX ATC 2025): which topologies, and how small. Read by run.sh.
EXAMPLE=fig7

# TP PP DP SP ZeRO
source_7a="2 2 2 1 1"
targets_7a=(
    "1 1 1 1 1"
    "1 1 2 1 3"
    "1 1 2 2 1"
    "1 1 4 1 2"
    "1 1 4 1 3"
    "1 2 2 1 1"
    "2 1 1 1 1"
    "2 1 2 1 1"
    "2 1 2 1 2"
    "2 2 1 1 1"
    "2 2 2 1 1"
)
# Every Target resumes directly from the native save; these once more from the universal folder.
universal_7a=(
    "1 1 1 1 1"
    "1 1 2 1 3"
    "2 1 1 1 1"
)
sources_7b=(
    "1 1 1 1 1"
    "1 1 2 1 3"
    "1 1 2 2 1"
    "1 1 4 1 2"
    "1 1 4 1 3"
    "1 2 2 1 1"
    "2 1 2 1 2"
    "2 2 1 1 1"
)
target_7b="2 2 2 1 1"

# On a CPU unless asked otherwise: eight ranks on two cores, so a run must be short. Most of its time is start.
: "${DEVICE:=cpu}" "${SIZE:=tiny}"
if [[ "$SIZE" == tiny ]]; then
    : "${TRAIN_ITERS:=60}" "${SAVE_ITER:=30}" "${SEQ_LENGTH:=64}"
    # At the examples' 2e-3 the fifty-second of these iterations has a grad norm of 37 instead of 1, and there the order
    # of float sums shows a thousand times as large as elsewhere.
    : "${LR:=1.5e-3}"
fi
: "${GLOBAL_BATCH:=8}"    # two samples for each of four data-parallel ranks
: "${LAUNCHER:=torchrun}" # the deepspeed launcher loads DeepSpeed twice more for every run

read -r SOURCE_TP SOURCE_PP SOURCE_DP SOURCE_SP SOURCE_ZERO <<<"$source_7a"
read -r TARGET_TP TARGET_PP TARGET_DP TARGET_SP TARGET_ZERO <<<"$target_7b"
