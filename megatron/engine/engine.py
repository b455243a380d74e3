"""Build the DeepSpeed engine: one optimizer, one engine class per kind of model, grad norms right everywhere.

mpu = Mpu(context)
model = build_model(..., construction=partitioned_construction(ds_config, mpu))
engine = build_engine(config, model, context, mpu, ds_config)
engine.get_global_grad_norm()                # the same number under every topology
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, LoadMicroBatch, OptimizerStep, ReduceTiedGrads

from megatron.config.optimizer import OptimizerConfig
from megatron.engine.deepspeed_names import require_built, require_names
from megatron.engine.expert_groups import has_dealt_experts, mark_expert_groups
from megatron.engine.gloo_gathers import gather_by_broadcasts
from megatron.engine.grad_norms import Fp32GradNorm, align_group_norms, align_summed_norms, spare_fp64_copies
from megatron.engine.muon_import import import_muon_uncompiled
from megatron.engine.optimizers import build_optimizer
from megatron.engine.step_times import StepTimes
from megatron.engine.unshared import spare_copies
from megatron.model.build import parameter_groups
from megatron.parallel.context import ParallelContext
from megatron.parallel.mpu import Mpu


class _ExpertParallel:
    """What DeepSpeed's engine does for its own MoE class, for any layer with parameters that ranks hold different
    values of. ZeRO-3 needs no such word, and would refuse it."""

    def _configure_distributed_model(self, model: torch.nn.Module) -> None:
        super()._configure_distributed_model(model)
        self.has_moe_layers = self.zero_optimization_stage() < 3 and has_dealt_experts(self.module)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Files as of any model; what only some expert-parallel ranks have is saved beside them (checkpoint/saving.py).
        DeepSpeed's files for experts know its own class only."""
        has_moe_layers, self.has_moe_layers = self.has_moe_layers, False
        try:
            return super().save_checkpoint(*args, **kwargs)
        finally:
            self.has_moe_layers = has_moe_layers


class _Unshared:
    """Without ZeRO: gradients are not put into buckets where there is nobody to sum them with."""

    context: ParallelContext

    def buffered_allreduce_fallback(self, *args: Any, **kwargs: Any) -> None:
        if self.context.zero_size > 1:
            super().buffered_allreduce_fallback(*args, **kwargs)


class PlainEngine(_ExpertParallel, Fp32GradNorm, _Unshared, DeepSpeedEngine):
    """DeepSpeed's engine for a model without pipeline stages."""


_PART_OF = {LoadMicroBatch: "data", ForwardPass: "forward", BackwardPass: "backward", OptimizerStep: "optimizer"}
"""Of a step's time (step_times.PARTS); the other instructions of a pipeline communicate."""


def _in_its_part(instruction: type, execute: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(execute)
    def timed(engine: PipeEngine, **kwargs: Any) -> None:
        if engine.step_times is None:
            return execute(engine, **kwargs)
        with engine.step_times.part(_PART_OF.get(instruction, "communication")):
            return execute(engine, **kwargs)

    return timed


class PipeEngine(_ExpertParallel, Fp32GradNorm, _Unshared, PipelineEngine):
    """DeepSpeed's engine for a PipelineModule."""

    def _exec_reduce_tied_grads(self) -> None:
        """Sum a tied weight's gradient over the data-parallel ranks on one stage alone, for all.

        DeepSpeed sums it on each stage among other gradients, in buckets. Sums of three and more depend on their order,
        that on the place in the bucket, and so the copies drift apart. Here one data-parallel rank gets the sum and the
        others zeros: whatever comes after adds nothing to it, in any order.
        """
        super()._exec_reduce_tied_grads()
        context = self.context
        if context.zero_size < 3:
            return
        for weight, stages in self.module.get_tied_weights_and_groups():
            grad = weight._hp_grad if self.using_bf16_optimizer else weight.grad
            if grad is None:
                continue
            if dist.get_rank(stages) == 0:
                dist.reduce(grad, group_dst=0, group=context.zero_group)
            if context.zero_rank == 0:
                dist.broadcast(grad, group_src=0, group=stages)
            else:
                grad.zero_()

    step_times: StepTimes | None = None
    """Told which instruction runs (steps.train_step)."""

    # DeepSpeed looks its instructions up here, and not by name.
    _INSTRUCTION_MAP = {
        instruction: _in_its_part(instruction, execute)
        for instruction, execute in {
            **PipelineEngine._INSTRUCTION_MAP,
            ReduceTiedGrads: _exec_reduce_tied_grads,
        }.items()
    }


def partitioned_construction(ds_config: dict[str, Any], mpu: Mpu) -> AbstractContextManager:
    """What a plain model is constructed under. ZeRO-3: deepspeed.zero.Init, which partitions each layer's parameters
    when the layer is made, so that no rank ever holds the whole model.

    Precision and offload come from the configuration: a `dtype` of its own zero.Init takes for bf16 where the device
    has no fp16 (zero/partition_parameters.py, _set_dtype). Inside, torch.empty and its kind make floats of the run's
    precision, in layers' tables too: those must be computed in forward.
    """
    if ds_config["zero_optimization"]["stage"] != 3:
        return nullcontext()
    group = mpu.get_data_parallel_group()
    return deepspeed.zero.Init(data_parallel_group=group, config_dict_or_path=ds_config, mpu=mpu)


@torch.no_grad()
def write_shard(param: torch.nn.Parameter, shard: torch.Tensor) -> None:
    """Into a parameter that was made under `partitioned_construction`. Local. One that deepspeed.zero.Init has taken
    apart is empty itself, this rank's piece of the flattened shard is `ds_tensor`. Written there, nothing is gathered;
    what pads the last ranks' pieces becomes zero."""
    if not hasattr(param, "ds_tensor"):
        param.copy_(shard)
        return
    piece = param.ds_tensor
    start = param.ds_zero_partition_rank * piece.numel()
    own = shard.reshape(-1)[start : start + piece.numel()]
    piece.zero_()
    piece[: own.numel()].copy_(own)


def build_engine(
    optimizer: OptimizerConfig,
    model: torch.nn.Module,
    context: ParallelContext,
    mpu: Mpu,
    ds_config: dict[str, Any],
    trained_later: Mapping[str, str] | None = None,
    fused_kernels: str = "torch",
) -> PlainEngine | PipeEngine:
    """Collective over the world. `ds_config` is the merged dictionary of `ds_config.deepspeed_config`; `mpu` the one
    that a plain model was constructed with (a pipeline has its own); `trained_later` as `parameter_groups` takes it;
    `fused_kernels` is --fused-kernels. Raises DeepSpeedChangedError where this DeepSpeed lacks a name that is read,
    replaced or set."""
    require_names()
    gather_by_broadcasts()
    block = ds_config.get("optimizer")
    groups = parameter_groups(
        model,
        optimizer.weight_decay,
        has_matrices=optimizer.optimizer == "muon" and block is None,
        has_decoupled=optimizer.decoupled_lr is not None,
        trained_later=trained_later,
    )
    mark_expert_groups(groups)
    client_optimizer = build_optimizer(optimizer, groups, block, fused_kernels, _steps_on_cuda(ds_config))
    if client_optimizer is not None:
        ds_config = {key: value for key, value in ds_config.items() if key != "optimizer"}
    is_pipelined = isinstance(model, PipelineModule)
    import_muon_uncompiled()
    ds_mpu = model.mpu() if is_pipelined else mpu
    engine = (PipeEngine if is_pipelined else PlainEngine)(
        args=None,
        model=model,
        optimizer=client_optimizer,
        model_parameters=groups,
        mpu=ds_mpu,
        dist_init_required=False,
        config=ds_config,
        config_class=DeepSpeedConfig(ds_config, ds_mpu),
    )
    require_built(engine)
    # Its own mpu will not do: a pipeline's "model parallel rank" counts stages too.
    engine.context = context
    spare_copies(engine.optimizer)
    spare_fp64_copies(engine.optimizer)
    if is_pipelined:
        align_group_norms(engine.optimizer)
    if isinstance(engine.optimizer, BF16_Optimizer):
        align_summed_norms(engine.optimizer, context)
    return engine


def _steps_on_cuda(ds_config: Mapping[str, Any]) -> bool:
    """The optimizer's tensors are there, not offloaded to the host's memory."""
    offloads = (ds_config["zero_optimization"].get(key) or {} for key in ("offload_optimizer", "offload_param"))
    is_offloaded = any(offload.get("device", "none") != "none" for offload in offloads)
    return get_accelerator().device_name() == "cuda" and not is_offloaded
