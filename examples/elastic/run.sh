#!/usr/bin/env bash
# A job on four machines that loses one and gets it back: nobody starts anything again but the machine that came back.
#
# Shows:     four agents of one rank each train TP2 DP2. One agent is killed (kill -9, with its rank): the others form the
#            job again as DP3 and go on from the newest checkpoint. It comes back: the job saves, and goes on as TP2 DP2.
#            A run that never stopped says where it had to go; a control, the same ranks with another micro batch, how
#            far the order of float sums alone leads.
# Hardware:  2 CPU cores, or 4 CUDA devices.
# Minutes:   4 to 6.
# You see:   a table that ends with PASS, and RUN_DIR/loss.png: one curve over both changes. Exit code 0 on PASS, 1 on FAIL.
# Knobs:     RUN_DIR DEVICE DRY_RUN KILL_AT BACK_AFTER ...: examples/README.md
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
EXAMPLE=elastic
: "${SOURCE_TP:=2}" "${SOURCE_PP:=1}" "${SOURCE_DP:=2}"
: "${TARGET_TP:=2}" "${TARGET_PP:=1}" "${TARGET_DP:=2}"
: "${GLOBAL_BATCH:=12}" # goes into two parts and into three
: "${SEQ_LENGTH:=64}" "${TRAIN_ITERS:=150}" "${SAVE_ITER:=20}"
: "${LR:=1e-3}" "${MIN_LR:=1e-4}" # with twice as much the order of sums alone leads 3e-2 away after iteration 73
: "${KILL_AT:=50}"   # iteration at which an agent is killed
: "${BACK_AFTER:=30}" # iterations that the three that are left train before it comes back
# shellcheck source=examples/common.sh
source "$HERE/../common.sh"

NAME=target_elastic
LOGS="$RUN_DIR/logs"

agent() { # NUMBER
    local command=(env OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1)
    # Each has a machine to itself; here that is a device.
    if [[ "$DEVICE" == cuda ]]; then command+=("CUDA_VISIBLE_DEVICES=$1"); else command+=(DS_ACCELERATOR=cpu); fi
    command+=(
        "$PYTHON" "$ROOT/tools/elastic.py" agent --nodes 1:4 --endpoint "127.0.0.1:$PORT" --run-id "$EXAMPLE"
        --local-address 127.0.0.1 --
        --tensor-model-parallel-size "$SOURCE_TP" --pipeline-model-parallel-size "$SOURCE_PP"
        --zero-stage "$SOURCE_ZERO" --micro-batch-size "$MICRO_BATCH" "${model_flags[@]}" "${shared_flags[@]}"
        --data-cache-path "$RUN_DIR/index_cache" --tensorboard-dir "$RUN_DIR/tensorboard/$NAME"
        --save "$RUN_DIR/checkpoints/elastic" --save-interval "$SAVE_ITER"
    )
    if [[ "$DRY_RUN" == 1 ]]; then
        show "${command[@]}"
        return
    fi
    "${command[@]}" >>"$LOGS/agent_$1.log" 2>&1 &
    agents[$1]=$!
}

newest_iteration() { # that any rank 0 has told of
    grep -aohE 'iteration +[0-9]+/' "$LOGS"/agent_*.log 2>/dev/null | tr -dc '0-9\n' | sort -n | tail -1
}

wait_for() { # ITERATION
    local now
    [[ "$DRY_RUN" == 1 ]] && return
    until now="$(newest_iteration)" && ((${now:-0} >= $1)); do
        kill -0 "${agents[0]}" 2>/dev/null || { tail -n 20 "$LOGS/agent_0.log" >&2; die "agent 0 has ended"; }
        sleep 0.2
    done
}

event() { # TEXT
    [[ "$DRY_RUN" == 1 ]] && return
    echo "  $(date +%T) iteration $(newest_iteration): $1" | tee -a "$LOGS/events.txt"
}

say "Never stopped: $(source_name), iterations 1-$TRAIN_ITERS"
[[ "$DRY_RUN" == 1 ]] || rm -rf -- "$RUN_DIR/tensorboard" "$LOGS" "$RUN_DIR/checkpoints"
train_as_source "source_$(source_name)" "$MICRO_BATCH"
say "Control: the same, micro batch $CONTROL_MICRO_BATCH instead of $MICRO_BATCH"
train_as_source "control_$(source_name)" "$CONTROL_MICRO_BATCH"

say "Elastic: one store, four agents of one rank each"
PORT="$([[ "$DRY_RUN" == 1 ]] && echo 29400 || free_port)"
agents=()
store=("$PYTHON" "$ROOT/tools/elastic.py" store --port "$PORT" --idle-minutes 2)
if [[ "$DRY_RUN" == 1 ]]; then show "${store[@]}"; else
    trap 'kill "${agents[@]}" "$store_pid" 2>/dev/null || true' EXIT
    "${store[@]}" >"$LOGS/store.log" 2>&1 &
    store_pid=$!
fi
for number in 0 1 2 3; do agent "$number"; done
wait_for "$KILL_AT"
if [[ "$DRY_RUN" != 1 ]]; then
    kill -9 "${agents[3]}"
    { wait "${agents[3]}" || true; } 2>/dev/null
fi
event "agent 3 is killed, and its rank with it"
wait_for $((KILL_AT + BACK_AFTER))
event "agent 3 comes back"
agent 3
if [[ "$DRY_RUN" != 1 ]]; then
    for number in 0 1 2 3; do
        wait "${agents[$number]}" || die "agent $number ended with exit code $?: $LOGS/agent_$number.log"
    done
    event "the job has come to its end"
    kill "$store_pid" 2>/dev/null || true
fi

say "Verdict"
command=("$PYTHON" "$HERE/compare.py" "$RUN_DIR")
if [[ "$DRY_RUN" == 1 ]]; then show "${command[@]}"; else "${command[@]}"; fi
