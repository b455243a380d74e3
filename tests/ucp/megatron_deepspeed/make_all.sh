#!/usr/bin/env bash
# Makes every sample of this folder anew: bash make_all.sh BEFORE SINCE, two checkouts of Megatron-DeepSpeed. See README.md.
set -euo pipefail
before=$(realpath "$1") since=$(realpath "$2")
here=$(realpath "$(dirname "$0")")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" # so that what is saved names no folder
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 CUDA_DEVICE_MAX_CONNECTIONS=1

sample() { # checkout, name, ranks, ZeRO stage, micro batch, flags
    local checkout=$1 name=$2 ranks=$3 zero=$4 micro=$5
    shift 5
    cat > config.json <<JSON
{"train_batch_size": 4, "train_micro_batch_size_per_gpu": $micro, "gradient_clipping": 1.0, "steps_per_print": 1000,
 "zero_optimization": {"stage": $zero} ${more:-}}
JSON
    PYTHONPATH="$checkout" torchrun --standalone --nproc-per-node "$ranks" "$here/make.py" "$name" \
        --deepspeed_config config.json --zero-stage "$zero" --micro-batch-size "$micro" "$@"
    tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -cJf "$here/$name.tar.xz" "$name"
}

llama=(--swiglu --normalization rmsnorm --use-rotary-position-embeddings --untie-embeddings-and-output-weights
    --disable-bias-linear --num-key-value-heads 2 --ffn-hidden-size 24)
pp2=(--pipeline-model-parallel-size 2) tp2=(--tensor-model-parallel-size 2) plain=(--no-pipeline-parallel)

sample "$before" gpt_z0 1 0 4 "${plain[@]}"
sample "$before" gpt_exact_gelu 1 0 4 "${plain[@]}" --no-bias-gelu-fusion --init-method-std 0.5
sample "$before" gpt_z1 2 1 2 "${plain[@]}"
sample "$before" gpt_tp2_z2 2 2 4 "${plain[@]}" "${tp2[@]}"
sample "$before" gpt_z3 2 3 2 "${plain[@]}"
sample "$before" llama_z2 2 2 2 "${plain[@]}" "${llama[@]}"
sample "$before" llama_tp2_pp2_z1 4 1 4 "${pp2[@]}" "${tp2[@]}" "${llama[@]}"
more=', "bf16": {"enabled": true}' sample "$before" llama_pp2_bf16 2 1 4 --bf16 "${pp2[@]}" "${llama[@]}"
sample "$since" gpt_pp2_since_2024 2 1 4 "${pp2[@]}"
sample "$since" gpt_tp2_since_2024 2 1 4 "${tp2[@]}"
sample "$since" gpt_pp2_padded 2 1 4 "${pp2[@]}" --vocab-size 28
