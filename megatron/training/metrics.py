"""What a training step measured, and the one console line that tells it.

    throughput = Throughput(consumed_tokens, flops_per_token, world_size)
    print(console_line(step, throughput.since_last(num_iterations, consumed_tokens), ...))

TFLOP/s counts the model's own multiply-adds (forward + backward, no recomputation), per accelerator.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from deepspeed.accelerator import get_accelerator

from megatron.training.expert_metrics import ExpertMetrics


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, the same numbers on every rank."""

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    loss: float
    learning_rate: float
    grad_norm: float
    loss_scale: float | None
    """None unless fp16."""
    is_skipped: bool
    """The gradient overflowed (fp16); nothing was updated."""
    global_batch_size: int
    experts: tuple[ExpertMetrics, ...] = ()
    """One for each MoE layer."""


@dataclass(frozen=True)
class Rate:
    seconds_per_iteration: float
    tokens_per_second: float
    """Of the whole run."""
    tflops: float
    """Per rank."""
    mfu: float | None = None
    """Model FLOP/s utilisation: `tflops` of the device's peak; None where that is not known."""


@dataclass
class Throughput:
    """Wall time between log lines, turned into rates. The clock starts at construction."""

    consumed_tokens: int
    """Of the run, at the last line."""
    flops_per_token: float
    world_size: int
    peak_tflops: float | None = None
    _last_time: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of the block (an evaluation, a save)."""
        started = time.perf_counter()
        yield
        self._last_time += time.perf_counter() - started

    def since_last(self, num_iterations: int, consumed_tokens: int) -> Rate:
        now = time.perf_counter()
        seconds = now - self._last_time
        tokens_per_second = (consumed_tokens - self.consumed_tokens) / seconds
        self._last_time, self.consumed_tokens = now, consumed_tokens
        tflops = tokens_per_second * self.flops_per_token / self.world_size / 1e12
        mfu = None if self.peak_tflops is None else tflops / self.peak_tflops
        return Rate(seconds / num_iterations, tokens_per_second, tflops, mfu)


PEAK_TFLOPS = (
    *(("H200", 989.0), ("H100 PCIe", 756.0), ("H100 NVL", 835.0), ("H100", 989.0), ("H800", 989.0), ("GH200", 989.0)),
    *(("B200", 2250.0), ("A100", 312.0), ("A800", 312.0), ("A40", 150.0), ("A30", 165.0), ("A10", 125.0)),
    *(("L40S", 362.0), ("L40", 181.0), ("L4", 121.0), ("V100", 125.0), ("T4", 65.0), ("RTX 4090", 165.0)),
)
"""Dense fp16 or bf16 matrix products with sums in fp32, by a part of the card's name, first match; NVIDIA's data sheets
and the whitepapers of the architectures."""


def peak_tflops(precision: str) -> float | None:
    """Of this process's device; None for a CPU, an unknown card, and fp32, of which a card has several peaks."""
    if get_accelerator().device_name() != "cuda" or precision == "fp32":
        return None
    return peak_of_card(torch.get_device_module("cuda").get_device_name())


def peak_of_card(name: str) -> float | None:
    return next((peak for part, peak in PEAK_TFLOPS if part in name), None)


def memory_gib() -> float:
    """Peak memory of this process: the accelerator's where it counts, else resident memory."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return accelerator.max_memory_allocated() / 2**30


def console_line(step: StepMetrics, rate: Rate, train_iters: int, loss: float, skipped: int) -> str:
    """`loss` is the mean since the last line."""
    left = (train_iters - step.iteration) * rate.seconds_per_iteration
    fields = [
        f"iteration {step.iteration:>{len(str(train_iters))}}/{train_iters}",
        f"samples {step.consumed_samples}",
        f"loss {loss:.6f}",
        f"lr {step.learning_rate:.3e}",
        f"grad norm {step.grad_norm:.4f}",
        f"{rate.tokens_per_second:,.0f} tokens/s",
        f"{rate.tflops:.3g} TFLOP/s",
        f"{memory_gib():.2f} GiB",
        f"ETA {duration(left)}",
    ]
    if rate.mfu is not None:
        fields.insert(7, f"MFU {rate.mfu:.1%}")
    if step.loss_scale is not None:
        fields.insert(5, f"loss scale {step.loss_scale:g}")
    if step.experts:
        fields.insert(5, f"busiest expert {max(layer.largest_load for layer in step.experts):.2f}x")
    if skipped:
        fields.insert(5, f"skipped {skipped}")
    return " | ".join(fields)


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 under an hour."""
    minutes, second = divmod(int(round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
