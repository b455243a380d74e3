"""The counters that DeepSpeed's engine keeps: read at a save, written at a resume.

set_counters(engine, iteration=100, samples=800, skipped=0)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.engine.protocols import Engine, LossScaler

LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def set_counters(engine: Engine, *, iteration: int, samples: int, skipped: int) -> None:
    """`iteration`: optimizer steps, those skipped on overflow (`skipped`) included. `samples`: as the engine counts
    them, which is once for each rank of a sequence-parallel group."""
    engine.global_steps = iteration
    engine.global_samples = samples
    engine.skipped_steps = skipped
    # The accumulation boundary is counted in this run's micro batches, whatever a Source's were.
    engine.micro_steps = iteration * engine.gradient_accumulation_steps()


def loss_scaler_state(scaler: LossScaler | None) -> dict[str, Any] | None:
    if scaler is None:
        return None
    return {key: getattr(scaler, key) for key in LOSS_SCALER_FIELDS if hasattr(scaler, key)}


def set_loss_scaler_state(scaler: LossScaler | None, saved: Mapping[str, Any]) -> None:
    """A dynamic scale goes on only from a dynamic one: bf16's constant 1 is no start for fp16, nor the reverse."""
    if getattr(scaler, "dynamic", False) and "last_overflow_iter" in saved:
        for key, value in saved.items():
            setattr(scaler, key, value)
