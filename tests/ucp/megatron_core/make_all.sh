#!/usr/bin/env bash
# Makes every sample of this folder anew: bash make_all.sh. See README.md.
set -euo pipefail
here=$(realpath "$(dirname "$0")")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" # so that what is saved names no folder

sample() { # name, ranks, make.py's flags
    local name=$1 ranks=$2
    shift 2
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node "$ranks" "$here/make.py" "$name" "$@"
    tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -cJf "$here/$name.tar.xz" "$name"
}

sample gpt 1
sample gpt_tp2 2 --tp 2
sample gpt_exact_gelu 1 --exact-gelu
sample gpt_dp2_buckets 2 --optimizer dp_reshardable
sample llama_tp2_dp2 4 --model llama --tp 2
sample llama_tp2_dp2_buckets 4 --model llama --tp 2 --optimizer dp_reshardable
sample llama_pp2 2 --model llama --pp 2
sample llama_pp2_buckets 2 --model llama --pp 2 --optimizer dp_reshardable
sample llama_pp2_dp2_bf16 4 --model llama --pp 2 --untie --bf16 --layers 4
sample llama_by_layer 2 --model llama --tp 2 --by-layer --untie
sample llama_plain 2 --model llama --tp 2 --qk-layernorm --optimizer plain
sample llama_qkv_bias 1 --model llama --qkv-bias --untie
sample moe_ep2 2 --model llama --experts 4 --ep 2
sample moe_ep2_buckets 2 --model llama --experts 4 --ep 2 --optimizer dp_reshardable
sample moe_pp2_ep2_buckets 4 --model llama --experts 4 --ep 2 --pp 2 --untie --optimizer dp_reshardable
sample llama_bf16_many_buckets 2 --model llama --optimizer dp_reshardable --bf16 --bucket 800
sample llama_shifted 2 --model llama --bf16 --bucket 800
