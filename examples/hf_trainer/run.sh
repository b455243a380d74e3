#!/usr/bin/env bash
# A Hugging Face Trainer script with the one line: trained on 2 ranks, killed, resumed on 1 and on 3.
#
# Shows:     a plain Trainer script (train.py) loses its machines after the checkpoint of step 20 and goes on with fewer
#            and with more, under another ZeRO stage. A run that never stopped says where it had to go; a control, the
#            same ranks with another micro batch, how far the order of float sums alone leads.
# Hardware:  2 CPU cores, or GPUs where there are three.
# Minutes:   3 to 5.
# You see:   a table that ends with PASS, and RUN_DIR/loss.png. Exit code 0 on PASS, 1 on FAIL.
# Knobs:     RUN_DIR
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
ROOT="$(cd "$HERE/../.." && pwd)"
RUN_DIR="${RUN_DIR:-$ROOT/runs/hf_trainer}"
PYTHON="$ROOT/.venv/bin/python"
export PYTHONPATH="$ROOT" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

SCRIPT=("$HERE/train.py")
if ! "$PYTHON" -c 'import sys, torch; sys.exit(torch.cuda.device_count() < 3)'; then
    SCRIPT=("$HERE/on_cpu.py" "$HERE/train.py")
fi

train() { # ranks, name of the run, arguments
    local ranks="$1" name="$2"
    shift 2
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$ranks" "${SCRIPT[@]}" "$RUN_DIR/$name" "$@" \
        >"$RUN_DIR/$name.log" 2>&1
}

resume() { # ranks, name of the run, arguments; from a copy of what the killed run left
    cp -r "$RUN_DIR/killed" "$RUN_DIR/$2"
    train "$@" --resume
    grep -hoE "state digest .* equals .*|gradient_accumulation_steps is .*|is passed over.*" "$RUN_DIR/$2.log" | sort -u | sed "s/^/  $2: /"
}

rm -rf "$RUN_DIR"
mkdir -p "$RUN_DIR"

echo "never stopped, 2 ranks, ZeRO-2"
train 2 whole --stage 2

echo "the same, killed after step 30"
train 2 killed --stage 2 &
KILLED=$!
until [ "$(grep -c "'loss'" "$RUN_DIR/killed.log" 2>/dev/null || true)" -ge 30 ]; do
    kill -0 "$KILLED" 2>/dev/null || { tail -20 "$RUN_DIR/killed.log" >&2; exit 1; }
    sleep 0.05
done
pkill -9 -f "$RUN_DIR/killed" # the launcher and its ranks, as a machine that is lost
wait "$KILLED" 2>/dev/null || true
[ ! -e "$RUN_DIR/killed/checkpoint-40" ] || { echo "the kill came too late: run it again" >&2; exit 1; }

echo "resumed on 1 rank, ZeRO-1"
resume 1 resumed_1 --stage 1
echo "resumed on 3 ranks, ZeRO-3"
resume 3 resumed_3 --stage 3
echo "control: 2 ranks, ZeRO-2, micro batch 1"
resume 2 control --stage 2 --per-device 1

"$PYTHON" "$HERE/compare.py" "$RUN_DIR"
