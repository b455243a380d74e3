"""Every name of DeepSpeed's that is no public interface and that we read, replace or set, and whether it is there.

A method of DeepSpeed's that we replace, and that a new version calls by another name, would be replaced by nothing: the
correction would be off, and nobody would hear of it. So all are looked for, in DeepSpeed's classes and in its sources
before an engine is built, and in the engine afterwards.

    require_names()                 # of classes and modules; local, cheap, called before an engine is built
    require_built(engine)           # of the engine and of its optimizer; local
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

WRITTEN_FOR = "0.19.8"

_ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
_PIPELINE = "deepspeed.runtime.pipe.engine.PipelineEngine"
_ZERO_1_2 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
_ZERO_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
_BF16 = "deepspeed.runtime.bf16_optimizer.BF16_Optimizer"

METHODS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    _ENGINE: {
        "_configure_distributed_model": ("self", "model"),
        "_take_model_step": ("self", "lr_kwargs"),
        "clip_fp32_gradients": ("self",),
        "save_checkpoint": ("self", "save_dir", "tag", "client_state", "save_latest", "exclude_frozen_parameters"),
        "load_checkpoint": (
            "self", "load_dir", "tag", "load_module_strict", "load_optimizer_states", "load_lr_scheduler_states",
            "load_module_only", "custom_load_fn",
        ),
        "load_universal_checkpoint": ("self",),
        "zero_nvme_offload_optimizer": ("self",),
        "use_node_local_storage": ("self",),
        "set_train_batch_size": ("self", "train_batch_size"),
        "zero_optimization_stage": ("self",),
        "gradient_clipping": ("self",),
        "buffered_allreduce_fallback": ("self", "grads", "elements_per_buffer"),
    },
    _PIPELINE: {"_exec_reduce_tied_grads": ("self",)},
    _ZERO_1_2: {
        "_average_expert_grad_norms": ("self", "norm_groups"),
        "scaled_global_norm": ("self", "norm_type"),
        "complete_grad_norm_calculation_for_cpu_offload": ("self", "params"),
        "get_grad_norm_direct": ("self", "gradients", "params", "norm_type"),
        "update_lp_params": ("self",),
        "_lazy_init_hp_params_optimizer_state": ("self",),
        "_link_all_hp_params": ("self",),
        "_model_parallel_all_reduce": ("self", "tensor", "op"),
        "_use_compact_grad_partition_buffer": ("self", "group_idx"),
        "buffered_reduce_fallback": (
            "self", "rank", "grads", "communication_data_type", "elements_per_buffer", "log",
        ),
    },
    _BF16: {
        "get_grads_for_norm": ("self", "for_clipping"),
        "update_lp_params": ("self",),
        "_lazy_init_hp_params_optimizer_state": ("self",),
    },
    _ZERO_3: {"checkpoint_event_prologue": ("self",), "checkpoint_event_epilogue": ("self",)},
    "deepspeed.runtime.pipe.module.PipelineModule": {"get_tied_weights_and_groups": ("self",), "mpu": ("self",)},
}  # fmt: skip
"""Class -> method -> its parameters: what is replaced, or called though it is no public interface."""

WORDS: Mapping[str, tuple[str, ...]] = {
    "deepspeed.runtime.engine": (
        "_take_model_step", "clip_fp32_gradients", "_configure_distributed_model", "_global_grad_norm",
        "has_moe_layers", "global_steps", "global_samples", "skipped_steps", "micro_steps", "checkpoint_engine",
        "universal_checkpoint_info", "UNIVERSAL_CHECKPOINT_INFO", "ds_zero_partition_group_name", "group_name",
    ),
    "deepspeed.runtime.pipe.engine": ("_INSTRUCTION_MAP", "using_bf16_optimizer", "_hp_grad"),
    "deepspeed.runtime.pipe.module": ("ds_pipe_replicated",),
    "deepspeed.utils.groups": (
        "_EXPERT_PARALLEL_GROUP", "_EXPERT_PARALLEL_GROUP_RANKS", "_EXPERT_DATA_PARALLEL_GROUP",
        "_EXPERT_DATA_PARALLEL_GROUP_RANKS",
    ),
    "deepspeed.moe.utils": ("allreduce", "group_name"),
    "deepspeed.runtime.utils": ("model_parallel", "tensor_model_parallel", "ds_pipe_replicated"),
    "deepspeed.runtime.zero.stage_1_and_2": (
        "scaled_global_norm", "_average_expert_grad_norms", "_hp_optimizer_states_linked", "contiguous_gradients",
        "buffered_reduce_fallback", "get_grad_norm_direct", "_zero_padding",
    ),
    "deepspeed.runtime.zero.stage3": ("ds_zero_placement_family", "ds_zero_partition_group_name"),
    "deepspeed.runtime.zero.partition_parameters": (
        "ds_zero_partition_process_group", "ds_zero_partition_rank", "ds_tensor", "ds_process_group", "ds_numel",
        "ds_shape", "partition_numel",
    ),
    "deepspeed.runtime.zero.muon.original_muon": ("compiler",),
    "deepspeed.runtime.compiler": ("compile",),
    "deepspeed.comm.comm": ("cdb", "all_gather_into_tensor"),
    "deepspeed.comm.torch": ("all_gather_function",),
    "deepspeed.runtime.bf16_optimizer": ("get_grads_for_norm", "has_moe_layers", "_hp_optimizer_states_linked"),
}  # fmt: skip
"""Module -> words that its source has to use: what we set for DeepSpeed to read, or replace for it to call."""

BUILT: Mapping[str, tuple[str, ...]] = {
    _ENGINE: (
        "optimizer", "module", "device", "param_names", "has_moe_layers", "global_steps", "global_samples",
        "skipped_steps", "micro_steps", "checkpoint_engine", "dp_world_size", "data_parallel_group",
        "pipeline_parallelism", "seq_data_parallel_group", "mp_world_size", "lr_scheduler",
    ),
    _PIPELINE: ("using_bf16_optimizer",),
    _ZERO_1_2: (
        "optimizer", "bit16_groups", "bit16_groups_flat", "real_dp_process_group", "averaged_gradients",
        "params_in_partition", "cpu_offload", "loss_scaler", "_hp_optimizer_states_linked", "contiguous_gradients",
        "single_partition_of_fp32_groups", "parallel_partitioned_bit16_groups", "model_parallel_rank",
        "dp_process_group", "device",
    ),
    _BF16: (
        "optimizer", "bf16_groups", "bf16_groups_flat", "real_dp_process_group", "has_moe_layers",
        "_hp_optimizer_states_linked",
    ),
    _ZERO_3: ("optimizer", "fp32_partitioned_groups_flat", "sub_group_to_group_id", "fp16_groups", "loss_scaler"),
}  # fmt: skip
"""Class -> attributes of what is built."""


class DeepSpeedChangedError(RuntimeError):
    """The DeepSpeed that is installed lacks a name that we depend on, or has it in another shape."""


def require_names() -> None:
    """Raises DeepSpeedChangedError with all of METHODS and WORDS that are not there."""
    faults = [fault for path, methods in METHODS.items() for fault in _method_faults(path, methods)]
    faults += [fault for module, words in WORDS.items() for fault in _word_faults(module, words)]
    _raise(faults)


def require_built(engine: object) -> None:
    """Raises DeepSpeedChangedError with all of BUILT that the engine and its optimizer lack."""
    faults = []
    for path, attributes in BUILT.items():
        owner_class = _class(path)
        for owner in (engine, getattr(engine, "optimizer", None)):
            if owner_class is not None and isinstance(owner, owner_class):
                faults += [f"{path} has no {name}" for name in attributes if not hasattr(owner, name)]
    _raise(faults)


def _class(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _method_faults(path: str, methods: Mapping[str, tuple[str, ...]]) -> list[str]:
    owner = _class(path)
    if owner is None:
        return [f"there is no {path}"]
    faults = []
    for name, expected in methods.items():
        method = getattr(owner, name, None)
        found = tuple(inspect.signature(method).parameters) if callable(method) else None
        if found is None:
            faults.append(f"{path} has no method {name}")
        elif found != expected:
            faults.append(f"{path}.{name} takes ({', '.join(found)}), expected ({', '.join(expected)})")
    return faults


def _word_faults(module: str, words: Iterable[str]) -> list[str]:
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        return [f"there is no module {module}"]
    used = set(re.findall(r"\w+", Path(spec.origin).read_text(encoding="utf-8")))
    return [f"{module} does not use the name {word}" for word in words if word not in used]


def _raise(faults: list[str]) -> None:
    if faults:
        import deepspeed

        raise DeepSpeedChangedError(
            f"{len(faults)} name(s) of DeepSpeed that this program depends on are not as they were. Found: DeepSpeed "
            f"{deepspeed.__version__}, where {'; '.join(faults)}. Expected: DeepSpeed {WRITTEN_FOR}. What to do: "
            f"pip install deepspeed=={WRITTEN_FOR}"
        )
