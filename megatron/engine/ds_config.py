"""DeepSpeed's configuration, computed from the flags and merged with the user's JSON.

What decides the arithmetic of a run (batch sizes, ZeRO stage, precision) must be the same in both,
or neither is obeyed; elsewhere the JSON wins, as upstream, and a note says over which flag.

    ds_config, notes = deepspeed_config(config, topology, json.load(open("ds_config.json")))

Pure: imports no deepspeed, reads no file. `config` is validated (its global batch size is a number).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.config.config import Config
from megatron.config.errors import ConfigError, Problem
from megatron.config.optimizer import OptimizerConfig
from megatron.ucp.topology import Topology

Json = dict[str, Any]

NEVER = 2**31 - 1
"""steps_per_print: the training loop prints its own line. DeepSpeed's pipeline engine takes a modulus."""

FLAG_OF = {
    ("train_batch_size",): "--global-batch-size",
    ("train_micro_batch_size_per_gpu",): "--micro-batch-size",
    ("gradient_accumulation_steps",): "--global-batch-size, --micro-batch-size and the data parallel size",
    ("zero_optimization", "stage"): "--zero-stage",
    ("fp16", "enabled"): "--fp16",
    ("bf16", "enabled"): "--bf16",
    ("gradient_clipping",): "--clip-grad",
    ("fp16", "loss_scale"): "--loss-scale",
    ("fp16", "initial_scale_power"): "--initial-loss-scale",
    ("fp16", "loss_scale_window"): "--loss-scale-window",
    ("fp16", "min_loss_scale"): "--min-loss-scale",
    ("fp16", "hysteresis"): "--hysteresis",
    ("data_types", "grad_accum_dtype"): "--accumulate-allreduce-grads-in-fp32",
    ("pipeline", "pipe_partitioned"): "--sequence-parallel",
    ("pipeline", "grad_partitioned"): "--sequence-parallel",
}
"""Which flag gives a value of the JSON."""

MUST_AGREE = (*tuple(FLAG_OF)[:6], ("pipeline", "pipe_partitioned"), ("pipeline", "grad_partitioned"))

_GONE = "DeepSpeed has taken it out, and stops at its name"
# DeepSpeed's features under which a saved state cannot be placed or a global batch is not what the flags say.
REFUSED = {
    ("elasticity", "enabled"): "it changes the batch sizes that the flags give",
    ("curriculum_learning", "enabled"): "the sampler does not follow it",
    ("data_efficiency", "enabled"): "the sampler does not follow it",
    ("progressive_layer_drop", "enabled"): "the model does not follow it",
    ("zero_optimization", "zero_quantized_weights"): "a state under ZeRO++ cannot be resumed",
    ("zero_optimization", "zero_quantized_gradients"): "a state under ZeRO++ cannot be resumed",
    ("zero_optimization", "zero_quantized_nontrainable_weights"): "frozen weights would be saved as 8-bit codes",
    ("zero_optimization", "zero_hpz_partition_size"): "a second copy of the weights would keep other values",
    ("zero_optimization", "mics_shard_size"): "a state under MiCS cannot be resumed",
    ("zero_optimization", "round_robin_gradients"): "DeepSpeed then saves a wrong table of where parameters lie",
    ("zero_optimization", "zenflow"): "a state under ZenFlow cannot be resumed",
    ("checkpoint", "use_node_local_storage"): "the files of all ranks must be in one folder that all nodes share",
    ("compile", "deepcompile"): "a state under DeepCompile cannot be resumed",
    ("torch_autocast", "enabled"): "its loss scale is neither saved nor known to routers; use --bf16 or --fp16",
    ("amp", "enabled"): f"{_GONE}; use --bf16 or --fp16",
    ("sparse_attention",): _GONE,
    ("sparse_gradients",): _GONE,
    ("compression_training",): _GONE,
    ("quantize_training", "enabled"): _GONE,
    ("eigenvalue", "enabled"): _GONE,
    ("nebula", "enabled"): _GONE,
    ("graph_harvesting",): _GONE,
    ("zero_optimization", "mics_hierarchical_params_gather"): _GONE,
    ("zero_optimization", "zeropp_loco_param"): _GONE,
    ("bf16", "bf16_master_weights_and_grads"): "there would be no fp32 master weights to save",
    ("fp16", "fp16_master_weights_and_grads"): "there would be no fp32 master weights to save",
}


_NOT_ELEMENTWISE = (
    "its step of a ZeRO partition is not that of the parameter, so the topology would change the training"
)
_COMPRESSED = "it communicates in its own way and keeps errors of each rank: its state cannot be resumed elsewhere"
REFUSED_OPTIMIZERS = {
    "lamb": _NOT_ELEMENTWISE,
    "muon": "its clipping, and so the training, depends on the ZeRO stage; --optimizer muon trains the same under all",
    "onebitadam": _COMPRESSED,
    "onebitlamb": _COMPRESSED,
    "zerooneadam": _COMPRESSED,
}
"""By type in lower case. Others are tried on small tensors before training (optimizer_probe.py)."""


OFF: dict[tuple[str, ...], Any] = {
    ("zero_optimization", "zero_hpz_partition_size"): 1,
    ("zero_optimization", "mics_shard_size"): -1,
}
"""The values, not false, that leave a feature off."""


def deepspeed_config(config: Config, topology: Topology, user_json: Json | None = None) -> tuple[Json, list[str]]:
    """The dictionary for DeepSpeed, and what to tell the user. Raises one ConfigError with every contradiction.

    Low precision without ZeRO runs as ZeRO-1: DeepSpeed's stage-0 low-precision optimizers take a step at
    construction (fp16/unfused_optimizer.py, initialize_optimizer_states) and unscale what was never scaled.
    """
    user = copy.deepcopy(user_json or {})
    if "bfloat16" in user:  # DeepSpeed's old name of the block
        user.setdefault("bf16", user.pop("bfloat16"))
    flags = flag_values(config, topology)
    off = _drop_switched_off(user, flags)
    problems = [*_contradictions(flags, user, topology), *_refused(user), *_refused_with_experts(user, topology)]
    if problems:
        raise ConfigError(problems)
    notes: list[str] = []
    if off:
        notes.append("switched off in the DeepSpeed JSON, so left out: " + ", ".join(off))
    if config.zero_stage_as_run != config.parallel.zero_stage:
        flags["zero_optimization"]["stage"] = config.zero_stage_as_run
        user.get("zero_optimization", {}).pop("stage", None)
        notes.append(
            f"ZeRO-0 with {config.optimizer.precision} is run as ZeRO-1, which trains the same weights: DeepSpeed's "
            "ZeRO-0 optimizer for low precision takes an extra step at construction"
        )
    if "scheduler" in user:
        del user["scheduler"]
        notes.append('"scheduler" of the DeepSpeed JSON is not used: the --lr-... flags are the schedule')
    _fill_optimizer(user, config.optimizer, notes)
    _drop_defaults_of_given_fp16(flags, user, config.optimizer)
    won: list[str] = []
    merged = _merge(flags, user, (), won, notes)
    # To DeepSpeed, ranks that share a sequence are data-parallel ranks with samples of their own (parallel/mpu.py).
    merged["train_batch_size"] *= topology.sp_size
    if won:
        notes.append("the DeepSpeed JSON wins over the flags: " + ", ".join(won))
    return merged, notes


def _drop_switched_off(user: Json, flags: Json) -> list[str]:
    """Take out, in place, what is there only to say that it is off; returns what. DeepSpeed stops at the very name of a
    feature that it has taken out, and at "false" where it expects a block."""
    told: list[str] = []
    for key, value in list(user.items()):
        if key not in flags and _is_off(value):
            del user[key]
            told.append(key)
        elif isinstance(flags.get(key), Mapping) and (value is None or value is False):
            del user[key]
    zero = user.get("zero_optimization")
    names = [path[1] for path in REFUSED if path[0] == "zero_optimization"] if isinstance(zero, dict) else []
    for name in names:
        if name in zero and zero[name] in (None, False, OFF.get(("zero_optimization", name))):
            del zero[name]
            told.append(f"zero_optimization.{name}")
    return told


def _is_off(value: Any) -> bool:
    """False, null, `{"enabled": false, ...}`, or a block of nothing but such blocks."""
    if not isinstance(value, Mapping):
        return value is None or value is False
    if "enabled" in value:
        return value["enabled"] is False
    return bool(value) and all(isinstance(inner, Mapping) and _is_off(inner) for inner in value.values())


def flag_values(config: Config, topology: Topology) -> Json:
    """The DeepSpeed configuration that the flags alone give."""
    run, optimizer = config.run, config.optimizer
    values: Json = {
        "train_batch_size": run.global_batch_size,
        "train_micro_batch_size_per_gpu": run.micro_batch_size,
        "gradient_accumulation_steps": run.global_batch_size // (run.micro_batch_size * topology.dp_size),
        "gradient_clipping": optimizer.clip_grad,
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        # With offload DeepSpeed would insist on its own CPU Adam, compiled at the first use.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": config.parallel.zero_stage},
        "fp16": {"enabled": optimizer.precision == "fp16"},
        "bf16": {"enabled": optimizer.precision == "bf16"},
    }
    if optimizer.precision == "fp16":
        values["fp16"] |= _loss_scale_values(optimizer)
    if optimizer.precision == "bf16" and optimizer.accumulate_allreduce_grads_in_fp32:
        # With ZeRO-1 this makes DeepSpeed build its BF16_Optimizer; without it, its ZeRO optimizer.
        values["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.parallel.sequence_parallel:
        # Between stages DeepSpeed sends one tp rank's share of an activation that it takes to be equal on all of them
        # (runtime/pipe/engine.py, PartitionedTensor); here each has another part of the sequence.
        values["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    return values


def _loss_scale_values(optimizer: OptimizerConfig) -> Json:
    return {
        "loss_scale": optimizer.loss_scale or 0,
        "initial_scale_power": int(math.log2(optimizer.initial_loss_scale)),
        "loss_scale_window": int(optimizer.loss_scale_window),
        "min_loss_scale": optimizer.min_loss_scale,
        "hysteresis": optimizer.hysteresis,
    }


def _contradictions(flags: Json, user: Json, topology: Topology) -> Iterator[Problem]:
    for path in MUST_AGREE:
        found, expected = _get(user, path), _get(flags, path)
        if expected is None or found is None or found == "auto" or found == expected:
            continue
        yield Problem(
            f"the flags and the DeepSpeed JSON contradict each other on {'.'.join(path)}",
            found=f"{found} in the JSON, {expected} from {FLAG_OF[path]} on {topology}",
            expected='the same value, or none or "auto" in the JSON',
            flags=("--deepspeed_config", FLAG_OF[path]),
            fix=f"make them equal, or remove {'.'.join(path)} from the JSON",
        )


def _refused(user: Json) -> Iterator[Problem]:
    for block in ("zero_optimization", "fp16", "bf16", "optimizer"):
        if not isinstance(user.get(block, {}), Mapping):
            yield Problem(
                f"{block} in the DeepSpeed JSON is not an object",
                found=str(user[block]),
                expected='such as {"zero_optimization": {"stage": 1}}',
                flags=("--deepspeed_config",),
            )
    optimizer = user.get("optimizer")
    kind = optimizer.get("type") if isinstance(optimizer, Mapping) else "none"
    if not isinstance(kind, str) or kind.lower() in REFUSED_OPTIMIZERS:
        reason = REFUSED_OPTIMIZERS.get(str(kind).lower(), "it has no type")
        yield Problem(
            f"optimizer in the DeepSpeed JSON is refused: {reason}",
            found=str(kind),
            expected='such as {"type": "AdamW", "params": {"lr": 1e-4}}',
            flags=("--deepspeed_config", "--optimizer"),
        )
    for path, reason in REFUSED.items():
        if _get(user, path) not in (None, False, "auto", OFF.get(path)):
            yield Problem(
                f"{'.'.join(path)} in the DeepSpeed JSON is refused: {reason}",
                found=str(_get(user, path)),
                flags=("--deepspeed_config",),
                fix="remove it",
            )
    for block in ("offload_optimizer", "offload_param"):
        offload = _get(user, ("zero_optimization", block))
        if not isinstance(offload, Mapping):
            continue
        is_partial = block == "offload_optimizer" and offload.get("ratio", 1.0) != 1.0
        if offload.get("device") == "nvme" or is_partial or offload.get("super_offload"):
            yield Problem(
                f"zero_optimization.{block} in the DeepSpeed JSON is refused: such a state cannot be resumed",
                found=str(offload),
                expected="device cpu, whole",
                flags=("--deepspeed_config",),
            )


def _refused_with_experts(user: Json, topology: Topology) -> Iterator[Problem]:
    """DeepSpeed asserts these (runtime/zero/stage_1_and_2.py, _configure_moe_settings)."""
    for name in ("reduce_scatter", "contiguous_gradients"):
        path = ("zero_optimization", name)
        if topology.ep_size > 1 and _get(user, path) is False:
            yield Problem(
                f"{'.'.join(path)} false in the DeepSpeed JSON is refused with expert parallelism: experts' gradients "
                "are reduced over other ranks than the rest",
                found=f"--moe-expert-parallel-size {topology.ep_size}",
                flags=("--deepspeed_config", "--moe-expert-parallel-size"),
                fix="remove it",
            )


def _fill_optimizer(user: Json, optimizer: OptimizerConfig, notes: list[str]) -> None:
    """An "optimizer" block is kept: DeepSpeed builds that optimizer instead of ours. Its "auto" and missing values
    come from the flags."""
    block = user.get("optimizer")
    if block is None:
        return
    params = block.setdefault("params", {})
    of_flags: Json = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay}
    kind = block["type"].lower()
    if "adam" in kind:
        of_flags |= {"betas": [optimizer.adam_beta1, optimizer.adam_beta2], "eps": optimizer.adam_eps}
    elif kind == "lion":
        of_flags |= {"betas": [optimizer.lion_beta1, optimizer.lion_beta2]}
    elif kind == "sgd":
        of_flags |= {"momentum": optimizer.sgd_momentum}
    for name, value in of_flags.items():
        if params.get(name, "auto") == "auto":
            params[name] = value
    notes.append(
        f"the optimizer is {block.get('type')} of the DeepSpeed JSON, not --optimizer {optimizer.optimizer}; "
        "its learning rate still follows the --lr-... flags"
    )


def _drop_defaults_of_given_fp16(flags: Json, user: Json, optimizer: OptimizerConfig) -> None:
    """A JSON with its own fp16 block means DeepSpeed's defaults for what it leaves out, unless a flag says
    otherwise: Megatron's default first scale, 2^32, would skip the first steps of such a run. And nobody is
    told that the block wins over a flag that was not given."""
    if "fp16" not in user or not flags["fp16"]["enabled"]:
        return
    defaults = _loss_scale_values(OptimizerConfig())
    for name, value in _loss_scale_values(optimizer).items():
        if value == defaults[name]:
            del flags["fp16"][name]
            if user["fp16"].get(name) == "auto":
                del user["fp16"][name]


def _merge(
    flags: Mapping[str, Any], user: Mapping[str, Any], path: tuple[str, ...], won: list[str], notes: list[str]
) -> Json:
    merged = dict(flags)
    for key, value in user.items():
        here = (*path, key)
        if isinstance(value, Mapping):
            under = flags.get(key, {})
            merged[key] = _merge(under if isinstance(under, Mapping) else {}, value, here, won, notes)
        elif value != "auto":
            merged[key] = value
            if here in FLAG_OF and key in flags and value != flags[key]:
                won.append(f"{'.'.join(here)} {value} (not {flags[key]} of {FLAG_OF[here]})")
        elif key not in flags:
            notes.append(f'{".".join(here)} is "auto" in the DeepSpeed JSON and no flag gives it: DeepSpeed\'s default')
    return merged


def _get(tree: Json, path: tuple[str, ...]) -> Any:
    value: Any = tree
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value
