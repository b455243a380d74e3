"""Build the DeepSpeed engine: one optimizer, one engine class per kind of model, grad norms right everywhere.

mpu = Mpu(context)
model = build_model(..., construction=partitioned_construction(ds_config, mpu))
engine = build_engine(config, model, context, mpu, ds_config)
loss = train_step(engine, micro_batches)     # one global batch, plain or pipelined
engine.get_global_grad_norm()                # the same number under every topology
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.schedule import ReduceTiedGrads
from deepspeed.runtime.utils import combine_grad_norm_groups

from megatron.config.optimizer import OptimizerConfig
from megatron.engine.expert_groups import has_dealt_experts, mark_expert_groups
from megatron.engine.optimizers import build_optimizer
from megatron.layers.experts import expert_group_name
from megatron.model.build import parameter_groups
from megatron.parallel.agreement import gathered
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


class _Fp32GradNorm:
    """Gradient norm and clipping for ZeRO-0 in fp32.

    DeepSpeed computes no norm there unless it clips, and with pipeline stages it clips by a norm over the wrong
    set of ranks (runtime/utils.py, clip_grad_norm_). The ZeRO wrappers are right and are left alone.
    """

    context: ParallelContext

    def _take_model_step(self, lr_kwargs: Mapping[str, Any] | None) -> None:
        if isinstance(self.optimizer, torch.optim.Optimizer):
            self._global_grad_norm = self._reduced_grad_norm()
        super()._take_model_step(lr_kwargs)

    def clip_fp32_gradients(self) -> None:
        # The same factor as torch.nn.utils.clip_grad_norm_ and DeepSpeed's ZeRO wrappers.
        factor = self.gradient_clipping() / (self._global_grad_norm + 1e-6)
        if factor < 1.0:
            for param in self.module.parameters():
                if param.grad is not None:
                    param.grad.mul_(factor)

    def _reduced_grad_norm(self) -> float:
        """L2 norm of the whole model's gradient, each element counted once. Collective over the world."""
        context, square = self.context, 0.0
        for param in self.module.parameters():
            is_copy = getattr(param, "ds_pipe_replicated", False) or (context.tp_rank > 0 and not param.model_parallel)
            if param.grad is not None and not is_copy:
                num_holders = context.edp_size if is_moe_param(param) else context.zero_size
                square += param.grad.double().norm().item() ** 2 / num_holders
        total = torch.tensor(square, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return math.sqrt(total.item())


class PlainEngine(_ExpertParallel, _Fp32GradNorm, DeepSpeedEngine):
    """DeepSpeed's engine for a model without pipeline stages."""


class PipeEngine(_ExpertParallel, _Fp32GradNorm, PipelineEngine):
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

    # DeepSpeed looks its instructions up here, and not by name.
    _INSTRUCTION_MAP = {**PipelineEngine._INSTRUCTION_MAP, ReduceTiedGrads: _exec_reduce_tied_grads}


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


def build_engine(
    optimizer: OptimizerConfig,
    model: torch.nn.Module,
    context: ParallelContext,
    mpu: Mpu,
    ds_config: dict[str, Any],
    late: Mapping[str, str] | None = None,
    fused_kernels: str = "torch",
) -> PlainEngine | PipeEngine:
    """Collective over the world. `ds_config` is the merged dictionary of `ds_config.deepspeed_config`; `mpu` the one
    that a plain model was constructed with (a pipeline has its own); `late` as `parameter_groups` takes it;
    `fused_kernels` is --fused-kernels."""
    block = ds_config.get("optimizer")
    groups = parameter_groups(
        model,
        optimizer.weight_decay,
        has_matrices=optimizer.optimizer == "muon" and block is None,
        has_decoupled=optimizer.decoupled_lr is not None,
        late=late,
    )
    mark_expert_groups(groups)
    fused = fused_kernels if _steps_on_cuda(ds_config) else "torch"
    client_optimizer = build_optimizer(optimizer, groups, block, fused)
    if client_optimizer is not None:
        ds_config = {key: value for key, value in ds_config.items() if key != "optimizer"}
    is_pipelined = isinstance(model, PipelineModule)
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
    # Its own mpu will not do: a pipeline's "model parallel rank" counts stages too.
    engine.context = context
    if is_pipelined:
        _align_group_norms(engine.optimizer)
    if isinstance(engine.optimizer, BF16_Optimizer):
        _align_summed_norms(engine.optimizer, context)
    return engine


def _steps_on_cuda(ds_config: Mapping[str, Any]) -> bool:
    """The optimizer's tensors are there, not offloaded to the host's memory."""
    offloads = (ds_config["zero_optimization"].get(key) or {} for key in ("offload_optimizer", "offload_param"))
    is_offloaded = any(offload.get("device", "none") != "none" for offload in offloads)
    return get_accelerator().device_name() == "cuda" and not is_offloaded


def _align_group_norms(optimizer: Any) -> None:
    """DeepSpeed's ZeRO-1 reduces one norm per parameter group over the stages (stage_1_and_2.py, scaled_global_norm),
    and waits forever for a stage that has fewer: without biases to train, or without the vocabulary. Such a stage
    takes part with empty groups. Collective over the world.

    Norms of experts it then averages over edp, on which they are equal already: all that this does is to round, in a
    stage with experts and not in another one."""
    if not hasattr(optimizer, "bit16_groups"):
        return
    optimizer._average_expert_grad_norms = lambda norms: None
    num_groups = len(optimizer.bit16_groups)
    num_missing = max(gathered(num_groups)) - num_groups
    if num_missing == 0:
        return

    def norm_of(gradients: list[torch.Tensor], params: list[torch.nn.Parameter]) -> torch.Tensor:
        if optimizer.cpu_offload:
            return optimizer.complete_grad_norm_calculation_for_cpu_offload(params)
        return optimizer.get_grad_norm_direct(gradients, params)

    def scaled_global_norm(norm_type: int = 2) -> torch.Tensor:
        own = range(num_groups)
        norms = [norm_of(optimizer.averaged_gradients.get(i, []), optimizer.params_in_partition[i]) for i in own]
        norms += [norm_of([], []) for _ in range(num_missing)]
        # All at once, as the other stages do: roots of sums of roots would be rounded otherwise, and then copies of a
        # tied weight would be clipped otherwise.
        return combine_grad_norm_groups(norms, norm_type=norm_type)

    optimizer.scaled_global_norm = scaled_global_norm


def _align_summed_norms(optimizer: BF16_Optimizer, context: ParallelContext) -> None:
    """BF16_Optimizer sums a norm of what is not experts over tp and the stages, and one more for each group of experts
    (runtime/utils.py, get_norm_with_moe_layers). It stops where a rank has nothing of the first kind, and waits forever
    for a stage with fewer of the second. So all groups of experts are one, and a rank that has nothing takes part with
    a zero. Collective over the world."""
    has_experts_anywhere = any(gathered(optimizer.has_moe_layers))
    gradients_for_norm = optimizer.get_grads_for_norm
    nothing = [torch.zeros(1, device=get_accelerator().current_device_name())]

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        if for_clipping:
            return gradients_for_norm(for_clipping=True)
        others, experts = gradients_for_norm()
        of_all = [gradient for group in experts.values() for gradient in group]
        return others or nothing, {expert_group_name(context): of_all or nothing} if has_experts_anywhere else {}

    optimizer.get_grads_for_norm = get_grads_for_norm
    if has_experts_anywhere and not optimizer.has_moe_layers:
        optimizer.has_moe_layers, optimizer.expert_gradients = True, {}


def backward_scale(engine: PlainEngine | PipeEngine) -> float:
    """The gradient that backward gives one micro batch's mean loss (deepspeed/runtime/engine.py, backward)."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    scale = 1.0 if scaler is None else float(scaler.loss_scale)
    return scale / engine.gradient_accumulation_steps()


def set_global_batch_size(engine: PlainEngine | PipeEngine, size: int, data_parallel_size: int) -> None:
    """From the next step on, by more or fewer micro batches. Only between steps: what is accumulated is of one size.
    Local; `size` is a multiple of micro batch x data parallel size and the same on every rank."""
    micro_batch_size = engine.train_micro_batch_size_per_gpu()
    num_micro_batches = size // (micro_batch_size * data_parallel_size)
    if num_micro_batches == engine.gradient_accumulation_steps():
        return
    # DeepSpeed counts a sample once for every rank of a sequence parallel group.
    engine.set_train_batch_size(num_micro_batches * micro_batch_size * engine.dp_world_size)
    # Where it looks for the end of a step: (micro_steps + 1) % accumulation steps.
    engine.micro_steps = engine.global_steps * num_micro_batches


def train_step(engine: PlainEngine | PipeEngine, micro_batches: Iterator[Mapping[str, torch.Tensor]]) -> float:
    """One optimizer step over one global batch; returns its mean loss. Collective over the world.

    `micro_batches` yields this rank's micro batches: {"tokens", "labels", "loss_mask"}, each [b, s].
    """
    if isinstance(engine, PipelineEngine):
        return float(engine.train_batch(_pipe_items(engine, micro_batches)))
    engine.train()
    total = torch.zeros((), dtype=torch.float32, device=engine.device)
    for _ in range(engine.gradient_accumulation_steps()):
        batch = _to_device(next(micro_batches), engine.device)
        loss = engine(batch["tokens"], batch["labels"], batch["loss_mask"])
        engine.backward(loss)
        engine.step()
        total += loss.detach().float()
    return _mean_over_data_parallel(engine, total / engine.gradient_accumulation_steps())


@torch.no_grad()
def evaluate(
    engine: PlainEngine | PipeEngine,
    micro_batches: Iterator[Mapping[str, torch.Tensor]],
    num_batches: int,
    num_micro_batches: int,
) -> float:
    """Mean loss over `num_batches` global batches of `num_micro_batches` on each data parallel rank, without dropout.
    Collective over the world."""
    total = 0.0
    for _ in range(num_batches):
        if isinstance(engine, PipelineEngine):
            total += float(engine.eval_batch(_pipe_items(engine, micro_batches), num_micro_batches=num_micro_batches))
            continue
        engine.eval()
        loss = torch.zeros((), dtype=torch.float32, device=engine.device)
        for _ in range(num_micro_batches):
            batch = _to_device(next(micro_batches), engine.device)
            loss += engine(batch["tokens"], batch["labels"], batch["loss_mask"]).float()
        total += _mean_over_data_parallel(engine, loss / num_micro_batches)
    engine.train()
    return total / num_batches


def _pipe_items(engine: PipeEngine, micro_batches: Iterator[Mapping[str, torch.Tensor]]) -> Iterator:
    """What DeepSpeed's pipeline takes: (inputs of the first stage, labels of the last)."""
    for batch in micro_batches:
        batch = _to_device(batch, engine.device)
        yield batch["tokens"], (batch["labels"], batch["loss_mask"])


def _to_device(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def _mean_over_data_parallel(engine: PlainEngine, loss: torch.Tensor) -> float:
    if engine.dp_world_size > 1:
        dist.all_reduce(loss, group=engine.data_parallel_group)
        loss /= engine.dp_world_size
    return loss.item()
