"""What is asked of an engine of DeepSpeed's, which has no types of its own.

`Engine` is any engine of DeepSpeed's, also one that none of our code built; what differs with the ZeRO stage, the
optimizer's wrapper, is looked into by its class's name (engine_state.py) and has no common type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # a flag's error need not wait for it
    import torch


class Engine(Protocol):
    module: Any
    """torch's, or DeepSpeed's PipelineModule; ours has attributes of its own (LiveRun.of, model/gpt_pipe.py)."""
    optimizer: Any
    """torch's under ZeRO-0 in fp32, else one of DeepSpeed's wrappers of it."""
    device: torch.device
    param_names: Mapping[Any, str]
    """Of parameters, by the parameter."""
    global_steps: int
    global_samples: int
    skipped_steps: int
    micro_steps: int
    checkpoint_engine: Any
    pipeline_parallelism: bool
    dp_world_size: int
    data_parallel_group: Any

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor: ...

    def train(self) -> Any: ...

    def eval(self) -> Any: ...

    def backward(self, loss: torch.Tensor) -> Any: ...

    def step(self) -> Any: ...

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: Mapping[str, Any] = ...,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Any: ...

    def zero_optimization_stage(self) -> int: ...

    def gradient_accumulation_steps(self) -> int: ...

    def train_micro_batch_size_per_gpu(self) -> int: ...

    def set_train_batch_size(self, train_batch_size: int) -> None: ...

    def get_global_grad_norm(self) -> float | None: ...


class ForeignEngine(Engine, Protocol):
    """What a program of others' has beside: all that `load_checkpoint` restores."""

    lr_scheduler: Any
    has_moe_layers: bool
    mp_world_size: int
    seq_data_parallel_group: Any
    loaded_checkpoint_dp_world_size: int
    loaded_checkpoint_mp_world_size: int

    def train_batch_size(self) -> int: ...

    def zero_nvme_offload_optimizer(self) -> bool: ...


class LossScaler(Protocol):
    """deepspeed/runtime/fp16/loss_scaler.py: of a fixed scale, or of one that follows overflows."""

    cur_scale: float


class HasParamGroups(Protocol):
    """torch's optimizer, or DeepSpeed's wrapper of one."""

    param_groups: list[dict[str, Any]]
