"""Build the DeepSpeed engine: one optimizer, one engine class per kind of model, grad norms right everywhere.

engine = build_engine(config, model, context, ds_config)
loss = train_step(engine, micro_batches)     # one global batch, plain or pipelined
engine.get_global_grad_norm()                # the same number under every topology
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule

from megatron.config.optimizer import OptimizerConfig
from megatron.model.build import parameter_groups
from megatron.parallel.context import ParallelContext
from megatron.parallel.mpu import Mpu


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
        square = 0.0
        for param in self.module.parameters():
            is_copy = getattr(param, "ds_pipe_replicated", False) or (
                self.context.tp_rank > 0 and not param.model_parallel
            )
            if param.grad is not None and not is_copy:
                square += param.grad.double().norm().item() ** 2
        total = torch.tensor(square, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return math.sqrt(total.item() / self.dp_world_size)


class PlainEngine(_Fp32GradNorm, DeepSpeedEngine):
    """DeepSpeed's engine for a model without pipeline stages."""


class PipeEngine(_Fp32GradNorm, PipelineEngine):
    """DeepSpeed's engine for a PipelineModule."""


def build_engine(
    optimizer: OptimizerConfig, model: torch.nn.Module, context: ParallelContext, ds_config: dict[str, Any]
) -> PlainEngine | PipeEngine:
    """Collective over the world. `ds_config` is the merged dictionary of `ds_config.deepspeed_config`."""
    groups = parameter_groups(model, optimizer.weight_decay)
    client_optimizer = None if "optimizer" in ds_config else build_optimizer(optimizer, groups)
    is_pipelined = isinstance(model, PipelineModule)
    mpu = model.mpu() if is_pipelined else Mpu(context)
    engine = (PipeEngine if is_pipelined else PlainEngine)(
        args=None,
        model=model,
        optimizer=client_optimizer,
        model_parameters=groups,
        mpu=mpu,
        dist_init_required=False,
        config=ds_config,
        config_class=DeepSpeedConfig(ds_config, mpu),
    )
    # Its own mpu will not do: a pipeline's "model parallel rank" counts stages too.
    engine.context = context
    return engine


def build_optimizer(config: OptimizerConfig, groups: Iterable[Mapping[str, Any]]) -> torch.optim.Optimizer:
    """AdamW (Megatron's "adam" decouples weight decay), or SGD with momentum."""
    groups = [dict(group) for group in groups]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.sgd_momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )


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
    engine: PlainEngine | PipeEngine, micro_batches: Iterator[Mapping[str, torch.Tensor]], num_batches: int
) -> float:
    """Mean loss over `num_batches` global batches, without dropout. Collective over the world."""
    num_micro_batches = engine.gradient_accumulation_steps()
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
