# shellcheck shell=bash
# shellcheck disable=SC2153,SC2154  # the degrees come from exN/topology.sh
# What the example scripts share: knobs, the training command, conversion, verdict, figures. Sourced, not run.
#
# A script sets HERE, EXAMPLE and the SOURCE_*/TARGET_* degrees (exN/topology.sh), then sources this file. Every
# knob below is an environment variable: SIZE=125M DRY_RUN=1 bash examples/ex1/run.sh

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# --- Where and how -----------------------------------------------------------------------------------------
: "${DRY_RUN:=0}"                        # 1: print every command, run none, write nothing
: "${RUN_DIR:=$ROOT/runs/$EXAMPLE}"      # the only folder that is written to
: "${LAUNCHER:=}"                        # deepspeed | torchrun; default: deepspeed if it is installed
: "${PYTHON:=}"                          # default: .venv's, else python3
: "${DEVICE:=}"                          # cpu | cuda; default: cuda if there is one device per rank
: "${SIZE:=}"                            # tiny | 125M; default: 125M on cuda, tiny on cpu

if [[ -z "$PYTHON" ]]; then
    PYTHON="$ROOT/.venv/bin/python"
    [[ -x "$PYTHON" ]] || PYTHON=python3
fi

die() {
    echo "error: $*" >&2
    exit 2
}

PYTHON="$(command -v "$PYTHON")" || die "no Python: run 'make install', or set PYTHON"
bin="$(dirname "$PYTHON")"
[[ -n "$LAUNCHER" ]] || { [[ -x "$bin/deepspeed" ]] && LAUNCHER=deepspeed || LAUNCHER=torchrun; }

: "${SOURCE_SP:=1}" "${TARGET_SP:=1}" # Ulysses sequence parallelism
: "${SOURCE_EP:=1}" "${TARGET_EP:=1}" # of the dp x sp ranks so many share the experts
: "${ZERO_STAGE:=1}"
: "${SOURCE_ZERO:=$ZERO_STAGE}" "${TARGET_ZERO:=$ZERO_STAGE}"
source_world=$((SOURCE_TP * SOURCE_PP * SOURCE_DP * SOURCE_SP))
target_world=$((TARGET_TP * TARGET_PP * TARGET_DP * TARGET_SP))
num_ranks=$((source_world > target_world ? source_world : target_world))

if [[ -z "$DEVICE" ]]; then
    num_devices="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())' || echo 0)"
    DEVICE=cpu
    if ((num_devices >= num_ranks)); then
        DEVICE=cuda
    elif ((num_devices > 0)); then
        echo "note: $EXAMPLE needs $num_ranks CUDA devices, found $num_devices: runs on the CPU" >&2
    fi
fi
[[ -n "$SIZE" ]] || { [[ "$DEVICE" == cuda ]] && SIZE=125M || SIZE=tiny; }
export PYTHON DEVICE SIZE LAUNCHER # found out once: run.sh starts the other scripts

# --- What is trained ---------------------------------------------------------------------------------------
case "$SIZE" in
    tiny)
        : "${NUM_LAYERS:=4}" "${HIDDEN_SIZE:=64}" "${NUM_HEADS:=4}" "${SEQ_LENGTH:=128}"
        : "${PRECISION:=fp32}"
        : "${NUM_WORKERS:=0}" # the samples are read in the ranks: two cores have no room for loaders
        ;;
    125M) # model and hyper-parameters of the paper's artifact
        : "${NUM_LAYERS:=12}" "${HIDDEN_SIZE:=768}" "${NUM_HEADS:=12}" "${SEQ_LENGTH:=1024}"
        : "${PRECISION:=fp16}"
        : "${NUM_WORKERS:=2}"
        ;;
    *) die "SIZE=$SIZE is neither tiny nor 125M" ;;
esac
: "${MODEL_PRESET:=}"         # a preset of docs/flags.md instead of NUM_LAYERS, HIDDEN_SIZE and NUM_HEADS
: "${GLOBAL_BATCH:=4}"
: "${MICRO_BATCH:=2}"         # of Source and Target
: "${CONTROL_MICRO_BATCH:=1}" # of the control run: the same samples, summed in another order
: "${TRAIN_ITERS:=200}"
: "${SAVE_ITER:=100}"         # saved here, resumed from here
: "${INIT_STD:=0.02}"         # standard deviation of the initial weights
: "${LR:=2e-3}" "${MIN_LR:=2e-4}" "${LR_WARMUP_ITERS:=10}"
: "${DROPOUT:=0.0}"           # > 0: a changed topology draws other masks, and losses differ by more than rounding
: "${SEED:=1234}"
: "${CONTROL:=1}"             # 0: no control run; the verdict then goes by fixed bounds

: "${DATA_PREFIX:=$ROOT/training_datasets/gpt2_text_document}"
: "${VOCAB_FILE:=$ROOT/training_datasets/gpt2-vocab.json}"
: "${MERGE_FILE:=$ROOT/training_datasets/gpt2-merges.txt}"

set_run_dir() { # the folder of one Source and what is resumed from it
    RUN_DIR="$1"
    SOURCE_DIR="$RUN_DIR/checkpoints/source"       # native saves of the Source
    UNIVERSAL_DIR="$RUN_DIR/checkpoints/universal" # its universal checkpoint; latest_universal lies here
    TARGET_DIR="$RUN_DIR/checkpoints/target"       # native saves of the Target
}
set_run_dir "$RUN_DIR"
TAG="global_step$SAVE_ITER"

set_model() { # [PRESET]
    MODEL_PRESET="${1:-}"
    if [[ -n "$MODEL_PRESET" ]]; then
        model_flags=(--model-preset "$MODEL_PRESET" --seq-length "$SEQ_LENGTH")
    else
        model_flags=(
            --num-layers "$NUM_LAYERS" --hidden-size "$HIDDEN_SIZE" --num-attention-heads "$NUM_HEADS"
            --seq-length "$SEQ_LENGTH" --max-position-embeddings "$SEQ_LENGTH"
        )
    fi
}
set_model "$MODEL_PRESET"

# shellcheck disable=SC2054  # a split has commas
shared_flags=(
    --hidden-dropout "$DROPOUT" --attention-dropout "$DROPOUT"
    --global-batch-size "$GLOBAL_BATCH" --train-iters "$TRAIN_ITERS"
    --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine --lr-decay-iters "$TRAIN_ITERS"
    --lr-warmup-iters "$LR_WARMUP_ITERS"
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --init-method-std "$INIT_STD"
    --data-path "$DATA_PREFIX" --split 949,50,1
    --tokenizer-type GPT2BPETokenizer --vocab-file "$VOCAB_FILE" --merge-file "$MERGE_FILE"
    --seed "$SEED" --log-interval 10 --eval-iters 0
    --num-workers "$NUM_WORKERS" --deepspeed
)
# gloo is what nccl would become without CUDA; said outright, training has nothing to note.
[[ "$DEVICE" == cuda ]] || shared_flags+=(--distributed-backend gloo)
case "$PRECISION" in
    fp32) ;;
    bf16) shared_flags+=(--bf16) ;;
    fp16) shared_flags+=(--fp16 --initial-loss-scale 4096) ;;
    *) die "PRECISION=$PRECISION is none of fp32, bf16, fp16" ;;
esac

# --- Verbs -------------------------------------------------------------------------------------------------
show() { # the command as it can be pasted
    printf '%q ' "$@"
    echo
}

run() {
    if [[ "$DRY_RUN" == 1 ]]; then show "$@"; else "$@"; fi
}

say() {
    [[ "$DRY_RUN" == 1 ]] || printf '\n== %s\n' "$*"
}

# Remove what an earlier run of the same script left: only below RUN_DIR, and only what is named.
clear_old() {
    local path
    [[ "$DRY_RUN" == 1 ]] && return
    for path in "$@"; do
        [[ "$path" == "$RUN_DIR"/?* ]] || die "$path is not inside RUN_DIR=$RUN_DIR"
        rm -rf -- "$path"
    done
}

# What a topology is given as: "TP PP DP SP ZERO EP", EP 1 if left out.
set_source() {
    read -r SOURCE_TP SOURCE_PP SOURCE_DP SOURCE_SP SOURCE_ZERO SOURCE_EP _ <<<"$1 1"
}

set_target() {
    read -r TARGET_TP TARGET_PP TARGET_DP TARGET_SP TARGET_ZERO TARGET_EP _ <<<"$1 1"
}

topology_name() { # TP PP DP SP ZERO EP
    local sequence="" experts=""
    (($4 == 1)) || sequence="_sp$4"
    (($6 == 1)) || experts="_ep$6"
    echo "tp$1_pp$2_dp$3${sequence}${experts}_z$5"
}

source_name() {
    topology_name "$SOURCE_TP" "$SOURCE_PP" "$SOURCE_DP" "$SOURCE_SP" "$SOURCE_ZERO" "$SOURCE_EP"
}

target_name() {
    topology_name "$TARGET_TP" "$TARGET_PP" "$TARGET_DP" "$TARGET_SP" "$TARGET_ZERO" "$TARGET_EP"
}

# As the curves' labels say it: tp2 pp2 dp2 ZeRO-1.
in_words() { # NAME of a topology
    local words="${1//_/ }"
    echo "${words/ z/ ZeRO-}"
}

free_port() {
    "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Fills `launch` with the launcher's part of the command for that many ranks.
set_launch() {
    local world="$1" threads
    threads=$(($(nproc) / world))
    # Several ranks on a few cores must not each start a thread per core, and a waiting thread must not spin:
    # beside other work on the machine spinning halves the speed (alone it would gain a tenth).
    launch=(
        env "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
        "OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}"
    )
    # DeepSpeed's optimizer modules ask torch to compile at import: a second per rank, for nothing that runs here.
    [[ "$DEVICE" == cpu ]] && launch+=("TORCHDYNAMO_DISABLE=1" "DS_ACCELERATOR=cpu")
    case "$LAUNCHER" in
        deepspeed)
            local port="${MASTER_PORT:-29500}"
            [[ "$DRY_RUN" == 1 || -n "${MASTER_PORT:-}" ]] || port="$(free_port)"
            launch+=(
                "$bin/deepspeed" --num_gpus "$world" --master_addr 127.0.0.1 --master_port "$port"
                --log_level error # its own lines only repeat the command, which is in logs/
            )
            ;;
        torchrun) launch+=("$bin/torchrun" --standalone --nproc-per-node "$world") ;;
        *) die "LAUNCHER=$LAUNCHER is neither deepspeed nor torchrun" ;;
    esac
}

train_as_source() { # NAME MICRO_BATCH [FLAG...]
    train "$1" "$SOURCE_TP" "$SOURCE_PP" "$SOURCE_DP" "$SOURCE_SP" "$SOURCE_ZERO" "$SOURCE_EP" --micro-batch-size "${@:2}"
}

train_as_target() { # NAME MICRO_BATCH [FLAG...]
    train "$1" "$TARGET_TP" "$TARGET_PP" "$TARGET_DP" "$TARGET_SP" "$TARGET_ZERO" "$TARGET_EP" --micro-batch-size "${@:2}"
}

# train NAME TP PP DP SP ZERO EP [FLAG...]: curves to $RUN_DIR/tensorboard/NAME, output to $RUN_DIR/logs/NAME.log.
train() {
    local name="$1" tp="$2" pp="$3" dp="$4" sp="$5" zero="$6" ep="$7"
    local launch command more=()
    shift 7
    ((sp == 1)) || more+=(--ds-sequence-parallel-size "$sp")
    ((ep == 1)) || more+=(--moe-expert-parallel-size "$ep")
    set_launch $((tp * pp * dp * sp))
    command=(
        "${launch[@]}" "$ROOT/pretrain_gpt.py"
        --tensor-model-parallel-size "$tp" --pipeline-model-parallel-size "$pp" "${more[@]}" --zero-stage "$zero"
        "${model_flags[@]}" "${shared_flags[@]}"
        --data-cache-path "$RUN_DIR/index_cache" --tensorboard-dir "$RUN_DIR/tensorboard/$name" "$@"
    )
    if [[ "$DRY_RUN" == 1 ]]; then
        show "${command[@]}"
        return
    fi
    clear_old "$RUN_DIR/tensorboard/$name"
    mkdir -p "$RUN_DIR/logs"
    show "${command[@]}" >"$RUN_DIR/logs/$name.log"
    "${command[@]}" 2>&1 | tee -a "$RUN_DIR/logs/$name.log"
}

# What makes two Sources interchangeable: their topology and every flag that is not a path of this run.
settings() {
    printf '%s\n' "$(source_name)" "$MICRO_BATCH" "$SAVE_ITER" "${model_flags[@]}" "${shared_flags[@]}"
}

train_source() {
    say "Source: $(source_name), iterations 1-$TRAIN_ITERS, saved every $SAVE_ITER"
    # With a new Source everything that was made from the old one is stale.
    clear_old "$RUN_DIR"/{settings.txt,checkpoints,tensorboard,csv,verdict.txt,verdict.json,ucp_training_loss.png}
    train_as_source "source_$(source_name)" "$MICRO_BATCH" \
        --save "$SOURCE_DIR" --save-interval "$SAVE_ITER"
    # Written last: a Source without it was not finished.
    [[ "$DRY_RUN" == 1 ]] || settings >"$RUN_DIR/settings.txt"
}

# convert_source [FOLDER]: FOLDER holds the Source's native saves (they are only read).
convert_source() {
    local source_dir="${1:-$SOURCE_DIR}"
    say "Convert $source_dir/$TAG to a universal checkpoint"
    clear_old "$UNIVERSAL_DIR"
    [[ "$DRY_RUN" == 1 ]] || mkdir -p "$UNIVERSAL_DIR"
    run "$PYTHON" "$ROOT/tools/ds_to_universal.py" \
        --input_folder "$source_dir/$TAG" --output_folder "$UNIVERSAL_DIR/${TAG}_universal"
}

train_target() {
    say "Target: $(target_name), iterations $((SAVE_ITER + 1))-$TRAIN_ITERS"
    clear_old "$TARGET_DIR"
    train_as_target "target_$(target_name)" "$MICRO_BATCH" \
        --load "$UNIVERSAL_DIR" --universal-checkpoint --save "$TARGET_DIR" --save-interval "$SAVE_ITER"
}

# The yardstick: the Source's topology, resumed from its native save; only the micro batch is another, and
# with it the order in which floats are summed. train_control [FOLDER]
train_control() {
    local source_dir="${1:-$SOURCE_DIR}"
    [[ "$CONTROL" == 1 ]] || return 0
    say "Control: the Source's topology, micro batch $CONTROL_MICRO_BATCH instead of $MICRO_BATCH"
    train_as_source "control_$(source_name)" "$CONTROL_MICRO_BATCH" --load "$source_dir" --load-tag "$TAG"
}

# All of an example whose three steps lie in $HERE. Exit code: that of the verdict.
run_example() {
    bash "$HERE/init_train_source.sh"
    bash "$HERE/convert.sh"
    bash "$HERE/resume_train_target.sh"
    train_control
    judge
}

# Exit code: that of the verdict (0 PASS, 1 FAIL).
judge() {
    local command=(
        "$PYTHON" "$ROOT/tb_analysis/tb_analysis_script.py" --tb_dir "$RUN_DIR/tensorboard"
        --tb_event_key "lm-loss-training/lm loss" --plot_name "$RUN_DIR/ucp_training_loss.png"
        --csv_name "$RUN_DIR/csv/" --verdict_json "$RUN_DIR/verdict.json"
    )
    [[ -z "${PLOT_TITLE:-}" ]] || command+=(--plot_title "$PLOT_TITLE")
    say "Verdict"
    if [[ "$DRY_RUN" == 1 ]]; then
        show "${command[@]}"
        return
    fi
    "${command[@]}" | tee "$RUN_DIR/verdict.txt"
}

# --- Figures: many runs, one picture and one table ----------------------------------------------------------
# A figure's script calls begin_figures, then for each figure it was asked for the verbs below, then end_figures.
begin_figures() {
    : "${GALLERY_DIR:=}"  # if given, pictures and tables are copied there
    figures_dir="$RUN_DIR" # each figure's runs get a folder below it
    figure_note=""         # said below the next figure's table
    failed_figures=()
}

end_figures() {
    ((${#failed_figures[@]} == 0)) || { echo "FAIL: ${failed_figures[*]}" >&2 && exit 1; }
}

resume_directly() { # NAME: from the native save of another topology, nothing is converted
    say "$1: iterations $((SAVE_ITER + 1))-$TRAIN_ITERS, directly from the Source's native save"
    train_as_target "$1" "$MICRO_BATCH" --load "$SOURCE_DIR" --load-tag "$TAG"
}

resume_from_universal() { # NAME
    say "$1: iterations $((SAVE_ITER + 1))-$TRAIN_ITERS, from the universal folder"
    train_as_target "$1" "$MICRO_BATCH" --load "$UNIVERSAL_DIR" --universal-checkpoint
}

# One Source and its control; each Target directly, and those of the second array from the universal folder as well.
train_one_to_many() { # SOURCE TARGETS UNIVERSAL: a topology and the names of two arrays of topologies
    local target
    local -n direct="$2" universal="$3"
    set_source "$1"
    train_source
    for target in "${direct[@]}"; do
        set_target "$target"
        resume_directly "target_$(target_name)"
    done
    convert_source
    for target in "${universal[@]}"; do
        set_target "$target"
        resume_from_universal "target_$(target_name)_universal"
    done
    train_control
}

# Losses, grad norms and digests. A FAIL is kept for end_figures, so that the other figures are made all the same.
judge_figure() { # NAME FIG TITLE TENSORBOARD_FOLDER...: FIG is how to ask for this figure alone
    local name="$figures_dir/$1" command
    command=(
        "$PYTHON" "$ROOT/tb_analysis/tb_analysis_script.py" --tb_dir "${@:4}" --log_dir ../logs
        --tb_event_key "lm-loss-training/lm loss" --grad_norm_tolerance 1e-4
        --plot_name "$name.png" --plot_title "$3" --lanes --csv_name "$figures_dir/csv/$1/"
        --verdict_json "$name.json" --markdown "$name.md"
    )
    say "Verdict on $1"
    if [[ "$DRY_RUN" == 1 ]]; then
        show "${command[@]}"
        return
    fi
    "${command[@]}" | tee "$name.txt" || { [[ $? == 1 ]] && failed_figures+=("$1"); } # anything else stops here
    [[ -z "$figure_note" ]] || printf '\n%s\n' "$figure_note" >>"$name.md"
    printf '\nMade by `FIG=%s bash examples/%s/run.sh`.\n' "$2" "$EXAMPLE" >>"$name.md"
    if [[ -n "$GALLERY_DIR" ]]; then cp "$name".{png,md} "$GALLERY_DIR/"; fi
}
