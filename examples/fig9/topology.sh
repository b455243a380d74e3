# shellcheck shell=bash
# shellcheck disable=SC2034  # read by run.sh and ../common.sh
# Figure 9 of the paper (Lian et al., USENIX ATC 2025): three architectures, their topologies, and how small. Read by
# run.sh. The paper's BLOOM is TP2 PP24 DP8 -> TP2 PP24 DP4; its LLaMA and MoE have the degrees below.
EXAMPLE=fig9

# TP PP DP SP ZeRO [EP]; every Target resumes directly from the native save, the universal_* once more from the
# universal folder.
name_llama=LLaMA
preset_llama=tiny-llama
source_llama="2 2 2 1 1"
targets_llama=(
    "2 1 2 1 1"
    "2 2 1 1 1"
)
universal_llama=("2 1 2 1 1")

name_bloom=BLOOM
preset_bloom=tiny-bloom
source_bloom="2 2 2 1 1"
targets_bloom=("2 2 1 1 1")
universal_bloom=("2 2 1 1 1")

name_moe="mixture of experts"
preset_moe=tiny-moe
source_moe="1 2 4 1 1 4"
targets_moe=("2 2 2 1 1 2")
universal_moe=("2 2 2 1 1 2")
note_moe="Which experts a token goes to is a choice, and a sum in another order can turn it: the bound above holds only
while none turns. README.md in examples/ says how often that is and what one turned choice does."

# On a CPU unless asked otherwise: eight ranks on two cores, so a run must be short. Most of its time is start.
: "${DEVICE:=cpu}" "${SIZE:=tiny}"
: "${TRAIN_ITERS:=60}" "${SAVE_ITER:=30}" "${SEQ_LENGTH:=64}" "${LR:=1.5e-3}"
# At 0.02 the thirty-seventh of the experts' iterations has a grad norm of 20 instead of 1 (the loss is that steep there:
# finite differences say the same), and there the order of float sums shows three hundred times as large as elsewhere,
# in the control (3.4e-5 of the grad norm) as in the Target (3.7e-5). At 0.05 no grad norm after the save is above 1.3.
: "${INIT_STD:=0.05}"
: "${GLOBAL_BATCH:=8}"    # two samples for each of four data-parallel ranks
: "${LAUNCHER:=torchrun}" # the deepspeed launcher loads DeepSpeed twice more for every run

read -r SOURCE_TP SOURCE_PP SOURCE_DP SOURCE_SP SOURCE_ZERO <<<"$source_llama"
read -r TARGET_TP TARGET_PP TARGET_DP TARGET_SP TARGET_ZERO <<<"${targets_llama[0]}"
