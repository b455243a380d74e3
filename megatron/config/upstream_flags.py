"""Flags of Megatron-DeepSpeed that set nothing here: each accepted with a note, or refused with the reason.

A script written for upstream either runs and is told what had no effect, or is told why it
cannot run. Nothing is ignored in silence. A flag leaves this table when its feature is built.

    ACCEPTED["--no-query-key-layer-scaling"].reason     # said as a note when the flag is given
    REFUSED["--batch-size"].reason                      # said as a problem
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UpstreamFlag:
    reason: str
    nargs: int | str = 0
    """Values that it takes: 0, 1, or "*"."""
    harmless: tuple[str, ...] = ()
    """Values that ask for what is done anyway; a refused flag with one of these is let through."""


def _table(*rows: tuple[str, str] | tuple[str, str, int | str] | tuple[str, str, int | str, tuple[str, ...]]):
    """(flags, reason, number of values, harmless values), the flags separated by spaces."""
    table: dict[str, UpstreamFlag] = {}
    for names, reason, *rest in rows:
        for name in names.split():
            table[name] = UpstreamFlag(reason, *rest)
    return table


_SDPA = "attention goes through torch's scaled_dot_product_attention, which picks the fastest kernel there is"
_FUSION = "steps are fused where the machine has kernels for it; --fused-kernels torch turns all of them off"
_GELU = f"{_FUSION}. Where Megatron does not fuse it, its GELU is exact: for that one give --exact-gelu"
_NOT_FUSED = "this step is not fused here, so there is nothing to turn off"
_COMMUNICATION = "DeepSpeed's engine does this communication in its own way"
_RECOMPUTE = "recomputed blocks keep only their input; set activation_checkpointing in --deepspeed_config"
_LOGGED = "this curve is always written"
_TIMED = "the parts of a step are always timed and written to TensorBoard (step-time/...)"
_NOT_LOGGED = "this curve is not written"
_STATE = "Megatron's own DDP and optimizer are not used: DeepSpeed's engine reduces gradients"
_ALWAYS = "this is how it is always done here"

ACCEPTED = _table(
    ("--openai-gelu", "the GELU is the tanh approximation, as long as --exact-gelu is not given"),
    ("--no-query-key-layer-scaling", "queries are never scaled by the layer number, so there is nothing to turn off"),
    ("--attention-softmax-in-fp32", "the softmax of attention is computed in fp32 in every kernel"),
    ("--use-flash-attn --use-flash-attn-v1 --use-flash-attn-v2 --use-flash-attn-v3 --use-flash-attn-triton", _SDPA),
    ("--use-flash-attn-builder", _SDPA),
    ("--no-bias-gelu-fusion", _GELU),
    ("--no-masked-softmax-fusion --no-bias-swiglu-fusion --no-rope-fusion", _FUSION),
    ("--no-persist-layer-norm --disable-mem-efficient-ln", _FUSION),
    ("--no-bias-dropout-fusion --no-gradient-accumulation-fusion", _NOT_FUSED),
    ("--no-async-tensor-model-parallel-allreduce --no-scatter-gather-tensors-in-pipeline", _COMMUNICATION),
    ("--no-contiguous-buffers-in-local-ddp --use-contiguous-buffers-in-ddp --overlap-p2p-communication", _STATE),
    ("--DDP-impl", _STATE, 1),
    ("--zero-reduce-scatter --zero-contigious-gradients", "set it in zero_optimization of --deepspeed_config"),
    ("--zero-reduce-bucket-size --zero-allgather-bucket-size",
     "set it in zero_optimization of --deepspeed_config", 1),
    ("--deepspeed-activation-checkpointing",
     "one implementation recomputes blocks; --checkpoint-activations or --recompute-granularity turns it on"),
    ("--contigious-checkpointing --synchronize-each-layer --profile-backward --distribute-saved-activations",
     _RECOMPUTE),
    ("--distribute-checkpointed-activations", _RECOMPUTE),
    ("--data-impl --dataset-impl", "the one format of datasets is mmap", 1),
    ("--dataloader-type", "samples come in the order of the seed, epoch after epoch", 1),
    ("--mmap-warmup --repeated-dataloader", "the dataset is memory-mapped and repeats by itself"),
    ("--use-cpu-initialization", _ALWAYS + ": weights are drawn on the CPU, the same under every topology"),
    ("--no-initialization", "weights are drawn all the same: it takes little and a checkpoint replaces them"),
    ("--log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard", _LOGGED),
    ("--no-log-learnig-rate-to-tensorboard --no-log-learning-rate-to-tensorboard", _LOGGED),
    ("--no-log-loss-scale-to-tensorboard", _LOGGED + " with fp16"),
    ("--log-timers-to-tensorboard", "iteration time, its parts and throughput are always written"),
    ("--log-memory-to-tensorboard", "memory is on the console line; its curve is not written"),
    ("--log-world-size-to-tensorboard", "the topology is in run.json; there is no curve of it"),
    ("--log-optimizer-states-to-tensorboard --log-params-norm --log-num-zeros-in-grad", _NOT_LOGGED),
    ("--log-throughput --log-progress", "throughput is on the console line and in TensorBoard"),
    ("--tensorboard-log-interval", "every iteration is written", 1),
    ("--timing-log-level --timing-log-option", _TIMED, 1),
    ("--no-barrier-with-level-1-timing", _TIMED),
    ("--wandb-project --wandb-exp-name --wandb-save-dir --wandb-entity",
     "the curves are in --tensorboard-dir; Weights & Biases is not used", 1),
    ("--use-mcore-models --use-legacy-models", "there is one implementation of the model"),
    ("--transformer-impl", "there is one implementation of the model", 1),
    ("--data-parallel-size-arg", "the data parallel size is what the world size leaves", 1),
    ("--empty-unused-memory-level", "the allocator's cache is left alone", 1),
    ("--bert-no-binary-head", "it is for BERT; nothing here depends on it"),
    ("--vocab-extra-ids", "it is for T5; nothing here depends on it", 1),
    ("--mask-prob --short-seq-prob", "it is for BERT; nothing here depends on it", 1),
    ("--inference-batch-times-seqlen-threshold --max-tokens-to-oom", "it is for inference", 1),
    ("--trust-remote-code", "no code is ever loaded with a tokenizer"),
    ("--kd-alpha-ce --kd-beta-ce --kd-temp", "it is for distillation, which --kd and --mos would turn on", 1),
    ("--disable-moe-top2-2nd-expert-sampling", "no expert is ever drawn at random, so there is nothing to turn off"),
    ("--create-moe-param-group", "experts are always in parameter groups of their own"),
    ("--enable-expert-tensor-parallelism", "experts are always cut over the tensor parallel ranks too"),
    ("--deepscale", "the old name of --deepspeed; the engine is DeepSpeed's in any case"),
)  # fmt: skip

_OTHER_MODEL = "only GPT is trained here"
_VISION = _OTHER_MODEL + ", not vision models"
_RETRO = _OTHER_MODEL + ", not Retro"
_DISTIL = "distillation is not built"
_FP8 = "fp8 is not built; use --bf16"
_DATA = "one --data-path is cut into train, validation and test by --split"
_FUSED_ADAM = (
    "--fused-kernels auto takes a fused Adam on CUDA; to have DeepSpeed's compiled and used, ask for it in "
    '--deepspeed_config: {"optimizer": {"type": "Adam"}}'
)
_OFFLOAD = "set zero_optimization.offload_optimizer or offload_param in --deepspeed_config"
_SAVES = "a save without this could not be resumed exactly, and every save here can"
_MODEL = "not built: it would change what the model computes"
_SCHEDULE = "DeepSpeed's own pipeline schedule is used"
_LIMITED = "not built; the data efficiency library is not connected"

REFUSED = _table(
    ("--batch-size", "an old name: use --micro-batch-size", 1),
    ("--warmup", "an old name: use --lr-warmup-fraction or --lr-warmup-iters", 1),
    ("--no-save-optim --no-save-rng", _SAVES),
    ("--reset-iteration", "use --finetune, which starts at iteration 0 with the loaded weights"),
    ("--cpu-optimizer --cpu_torch_adam", _OFFLOAD),
    ("--remote-device", _OFFLOAD, 1, ("none",)),
    ("--use-pin-memory", _OFFLOAD),
    ("--ds_fused_adam", _FUSED_ADAM),
    ("--partition-activations --checkpoint-in-cpu", "not built: it would keep memory low as asked only if it were"),
    ("--scattered-embeddings --split-transformers --memory-centric-tiled-linear", "not built"),
    ("--tile-factor", "not built: it belongs to --memory-centric-tiled-linear", 1, ("1",)),
    ("--ds-inference --inference", "this program trains; it has no inference mode"),
    ("--skip-train", "this program trains; for an evaluation give --train-iters equal to the saved iteration"),
    ("--random-ltd --data-efficiency-curriculum-learning --return-data-index", _LIMITED),
    ("--curriculum-learning", _LIMITED),
    ("--train-data-path --valid-data-path --test-data-path", _DATA, "*"),
    ("--train-idx-path --train-desc-path --train-doc-idx-path --train-sample-idx-path --train-shuffle-idx-path",
     "the index caches are built from --data-path, --split and --seed", 1),
    ("--train-data-exact-num-epochs --sample-rate", "samples repeat until --train-iters or --train-samples is met", 1),
    ("--aml-data-download-path", "give the full path in --data-path", 1),
    ("--reset-position-ids --reset-attention-mask",
     "not built: a sample is attended to as one sequence, over the ends of documents"),
    ("--encoder-num-layers", "an encoder's: use --num-layers", 1),
    ("--decoder-num-layers --decoder-seq-length --pipeline-model-parallel-split-rank", _OTHER_MODEL, 1),
    ("--standalone-embedding-stage --use-ring-exchange-p2p", _SCHEDULE),
    ("--num-layers-per-virtual-pipeline-stage", _SCHEDULE + ", which has no interleaving", 1),
    ("--enable-zbh1-pipeline --enable-zbh1-exact-semantics", _SCHEDULE),
    ("--use-distributed-optimizer", "use --zero-stage 1, which partitions the same state"),
    ("--data-parallel-random-init", "copies of a weight are equal here, and that is checked"),
    ("--init-method-xavier-uniform --apply-layernorm-1p --apply-residual-connection-post-layernorm", _MODEL),
    ("--squared-relu --fp32-residual-connection --fp16-lm-cross-entropy", _MODEL),
    ("--embedding-weights-in-fp32", _MODEL),
    ("--onnx-safe --lazy-mpu-init --use-dataset-only", "not built: external trainers are not served", 1, ("False",)),
    ("--num-experts-switch", "use --num-experts", 1),
    ("--mlp-type", "residual experts are not built: use --moe-shared-expert-intermediate-size", 1, ("standard",)),
    ("--use-tutel", "tokens are dispatched by torch's own sort and all-to-all"),
    ("--force-ds-sequence-parallel --ds-sequence-parallel-fpdt --ds-sequence-parallel-fpdt-offloading",
     "attention in chunks (FPDT) is not built; --ds-sequence-parallel-size is"),
    ("--ds-sequence-parallel-fpdt-chunk-size", "attention in chunks (FPDT) is not built", 1),
    ("--fp8-e4m3 --fp8-hybrid --no-fp8-wgrad", _FP8),
    ("--fp8-margin --fp8-interval --fp8-amax-history-len --fp8-amax-compute-algo --fp8-format", _FP8, 1),
    ("--mos --kd", _DISTIL),
    ("--num-layers-teacher --hidden-size-teacher --num-attention-heads-teacher --load-teacher", _DISTIL, 1),
    ("--num-experts-teacher", _DISTIL, "*"),
    ("--kill-switch-file", "use --exit-signal-handler and SIGTERM, which saves first", 1),
    ("--adlr-autoresume", "use --exit-signal-handler"),
    ("--adlr-autoresume-interval", "use --exit-signal-handler", 1),
    ("--deepspeed_mpi", "start with the deepspeed launcher or torchrun"),
    ("--deepscale_config", "an old name: use --deepspeed_config", 1),
    ("--retro-add-retriever --retro-return-doc-ids", _RETRO),
    ("--retro-workdir --retro-cyclic-train-iters --retro-encoder-layers --retro-encoder-hidden-dropout", _RETRO, 1),
    ("--retro-encoder-attention-dropout --retro-num-neighbors --retro-num-retrieved-chunks", _RETRO, 1),
    ("--output-bert-embeddings --biencoder-shared-query-context-model --use-one-sent-docs", _OTHER_MODEL),
    ("--retriever-score-scaling", _OTHER_MODEL),
    ("--bert-embedder-type --ict-head-size --biencoder-projection-dim --ict-load --bert-load", _OTHER_MODEL, 1),
    ("--titles-data-path --query-in-block-prob --evidence-data-path --block-data-path --embedding-path",
     _OTHER_MODEL, 1),
    ("--indexer-batch-size --indexer-log-interval --retriever-seq-length", _OTHER_MODEL, 1),
    ("--retriever-report-topk-accuracies", _OTHER_MODEL, "*"),
    ("--vision-pretraining --dino-norm-last-layer --no-data-sharding", _VISION),
    ("--num-classes --img-h --img-w --num-channels --patch-dim --classes-fraction", _VISION, 1),
    ("--data-per-class-fraction --head-lr-mult --vision-pretraining-type --vision-backbone-type", _VISION, 1),
    ("--swin-backbone-type --mask-type --mask-factor --iter-per-epoch --dino-local-img-size", _VISION, 1),
    ("--dino-local-crops-number --dino-head-hidden-size --dino-bottleneck-size --dino-freeze-last-layer", _VISION, 1),
    ("--dino-warmup-teacher-temp --dino-teacher-temp --dino-warmup-teacher-temp-epochs", _VISION, 1),
)  # fmt: skip
