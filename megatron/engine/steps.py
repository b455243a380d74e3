"""One optimizer step, and an evaluation, over micro batches; plain or pipelined.

loss = train_step(engine, micro_batches, times)        # one global batch
loss = evaluate(engine, micro_batches, num_batches, num_micro_batches)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine

from megatron.engine.protocols import Engine
from megatron.engine.step_times import StepTimes


def backward_scale(engine: Engine) -> float:
    """The gradient that backward gives one micro batch's mean loss (deepspeed/runtime/engine.py, backward)."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    scale = 1.0 if scaler is None else float(scaler.loss_scale)
    return scale / engine.gradient_accumulation_steps()


def set_global_batch_size(engine: Engine, size: int, data_parallel_size: int) -> None:
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


def train_step(
    engine: Engine, micro_batches: Iterator[Mapping[str, torch.Tensor]], times: StepTimes | None = None
) -> float:
    """One optimizer step over one global batch; returns its mean loss. Collective over the world.

    `micro_batches` yields this rank's micro batches: {"tokens", "labels", "loss_mask"}, each [b, s]. `times` is told
    which part of the step begins and ends.
    """
    times = times or StepTimes()
    if isinstance(engine, PipelineEngine):
        engine.step_times = times
        return float(engine.train_batch(_pipe_items(engine, micro_batches)))
    engine.train()
    total = torch.zeros((), dtype=torch.float32, device=engine.device)
    for _ in range(engine.gradient_accumulation_steps()):
        with times.part("data"):
            batch = _to_device(next(micro_batches), engine.device)
        with times.part("forward"):
            loss = engine(batch["tokens"], batch["labels"], batch["loss_mask"])
        with times.part("backward"):
            engine.backward(loss)
        with times.part("optimizer"):
            engine.step()
        total += loss.detach().float()
    return _mean_over_data_parallel(engine, total / engine.gradient_accumulation_steps())


@torch.no_grad()
def evaluate(
    engine: Engine, micro_batches: Iterator[Mapping[str, torch.Tensor]], num_batches: int, num_micro_batches: int
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


def _pipe_items(engine: Engine, micro_batches: Iterator[Mapping[str, torch.Tensor]]) -> Iterator:
    """What DeepSpeed's pipeline takes: (inputs of the first stage, labels of the last)."""
    for batch in micro_batches:
        batch = _to_device(batch, engine.device)
        yield batch["tokens"], (batch["labels"], batch["loss_mask"])


def _to_device(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def _mean_over_data_parallel(engine: Engine, loss: torch.Tensor) -> float:
    if engine.dp_world_size > 1:
        dist.all_reduce(loss, group=engine.data_parallel_group)
        loss /= engine.dp_world_size
    return loss.item()
