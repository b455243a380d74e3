"""The optimizer, the learning-rate and weight-decay schedule, and the numbers' precision.

Values only. engine/schedule.py turns the schedule fields into a curve, engine/ds_config.py
turns the precision fields into DeepSpeed's blocks, engine/optimizers.py builds the optimizer.

    optimizer = OptimizerConfig(lr=6e-4, min_lr=6e-5, lr_decay_style="cosine", precision="bf16")
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.flag import flag

DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WSD_DECAY_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")
OPTIMIZERS = ("adam", "sgd", "lion", "adagrad", "muon", "adafactor")

MATRICES, DECAY, NO_DECAY = "matrices", "decay", "no_decay"
DECOUPLED, DECOUPLED_NO_DECAY = "decoupled", "decoupled_no_decay"
EXPERTS, EXPERTS_NO_DECAY = "experts", "experts_no_decay"
"""Names of parameter groups; groups are saved and restored by name. `matrices` only with Muon, `decoupled` only with
--decoupled-lr; experts are apart under every topology, as ZeRO partitions them over other ranks."""

SINCE = "_since_"
"""Between a group's name and the iteration from which on its parameters are trained, if they were frozen before."""


def base_group(name: str) -> str:
    """`decay` of `decay_since_100`: the group whose treatment a late one shares."""
    return name.partition(SINCE)[0]


def is_decayed(name: str) -> bool:
    """Whether a group's weights decay: matrices do, biases and norms do not."""
    return base_group(name) not in (NO_DECAY, DECOUPLED_NO_DECAY, EXPERTS_NO_DECAY)


def is_decoupled(name: str) -> bool:
    """Whether a group follows --decoupled-lr."""
    return base_group(name) in (DECOUPLED, DECOUPLED_NO_DECAY)


@dataclass(frozen=True)
class OptimizerConfig:
    """Iterations are counted in global batches; samples are sequences."""

    optimizer: str = flag(
        "adam", help="adam is AdamW, as in Megatron: decay is not part of the gradient", choices=OPTIMIZERS
    )
    lr: float | None = flag(None, help="peak learning rate")
    min_lr: float = flag(0.0, help="learning rate at the end of the decay")
    decoupled_lr: float | None = flag(None, help="peak learning rate of the word embedding and the output layer")
    decoupled_min_lr: float | None = flag(None, help="theirs at the end of the decay; default: --min-lr")
    lr_warmup_init: float = flag(0.0, help="learning rate at the start of the warm-up")
    lr_decay_style: str = flag("linear", help="shape of the decay", choices=DECAY_STYLES)
    lr_decay_iters: int | None = flag(
        None, help="length of warm-up and decay together; default: --train-iters", unit="iterations"
    )
    lr_decay_samples: int | None = flag(None, help="the same in samples; default: --train-samples", unit="samples")
    lr_decay_tokens: int | None = flag(None, help="the same in tokens", unit="tokens")
    lr_warmup_fraction: float | None = flag(None, help="part of the decay that is warm-up", unit="0..1")
    lr_warmup_iters: int = flag(0, help="linear warm-up", unit="iterations")
    lr_warmup_samples: int = flag(0, help="linear warm-up", unit="samples")
    lr_warmup_tokens: int | None = flag(None, help="linear warm-up", unit="tokens")
    lr_wsd_decay_style: str = flag(
        "exponential", help="shape of the last part of WSD (warm-up, stable, decay)", choices=WSD_DECAY_STYLES
    )
    lr_wsd_decay_iters: int | None = flag(None, help="length of the last part of WSD", unit="iterations")
    lr_wsd_decay_samples: int | None = flag(None, help="length of the last part of WSD", unit="samples")
    override_opt_param_scheduler: bool = flag(
        False,
        "--override-opt_param-scheduler",
        "--override-opt-param-scheduler",
        help="on resume take the schedule from these flags where the checkpoint's differs",
    )
    use_checkpoint_opt_param_scheduler: bool = flag(
        False,
        "--use-checkpoint-opt_param-scheduler",
        "--use-checkpoint-opt-param-scheduler",
        help="on resume take the schedule from the checkpoint where it differs from these flags",
    )
    weight_decay: float = flag(0.01, help="decay of matrices (norms and biases are not decayed)")
    start_weight_decay: float | None = flag(None, help="first weight decay, with --weight-decay-incr-style")
    end_weight_decay: float | None = flag(None, help="last weight decay, with --weight-decay-incr-style")
    weight_decay_incr_style: str = flag(
        "constant", help="how weight decay goes from start to end", choices=("constant", "linear", "cosine")
    )
    clip_grad: float = flag(1.0, help="largest norm of the whole gradient; 0 is no clipping")
    adam_beta1: float = flag(0.9, help="decay rate of the first moment")
    adam_beta2: float = flag(0.999, help="decay rate of the second moment")
    adam_eps: float = flag(1e-8, help="added to the root of the second moment")
    sgd_momentum: float = flag(0.9, help="momentum of --optimizer sgd")
    lion_beta1: float = flag(0.9, help="part of the momentum in a step of --optimizer lion")
    lion_beta2: float = flag(0.99, help="decay rate of the momentum of --optimizer lion")
    muon_momentum: float = flag(0.95, help="momentum of --optimizer muon (of the linear layers' matrices)")
    precision: str = flag(
        "fp32",
        help="precision of weights in the forward pass; the master weights are always fp32",
        choices=("fp32", "bf16", "fp16"),
        switches={"--bf16": "bf16", "--fp16": "fp16"},
    )
    loss_scale: float | None = flag(None, help="fixed scale of the fp16 loss; default: dynamic; 0 is dynamic")
    initial_loss_scale: float = flag(2.0**32, help="first dynamic scale (a power of two)")
    min_loss_scale: float = flag(1.0, help="smallest dynamic scale")
    loss_scale_window: float = flag(1000, help="steps without overflow after which the scale doubles", unit="steps")
    hysteresis: int = flag(2, help="overflows before the scale halves", unit="steps")
    accumulate_allreduce_grads_in_fp32: bool = flag(
        False, help="accumulate bf16 gradients in fp32 (with ZeRO-1: DeepSpeed's BF16_Optimizer)"
    )
    freeze_parameters: tuple[str, ...] = flag(
        (), help="patterns of canonical names of parameters that are not trained: embedding.* 'layers.0.*'"
    )
