"""TensorBoard curves under upstream's keys, and run.json, which says what run they are of.

    with RunLog.open(folder, description, rank, progress) as run_log:      # writes on rank 0 only
        run_log.step(metrics)
        run_log.validation(iteration, samples, tokens, loss)

The keys are those of Megatron-DeepSpeed (megatron/training.py, training_log), so tools that read its events read ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron.checkpoint.progress import Progress
from megatron.engine.step_times import PARTS
from megatron.training.metrics import Rate, StepMetrics

RUN_FILE = "run.json"

_OF_STEPS = (
    "lm-loss-training/lm loss",
    "learning-rate/learning-rate",
    "grad-norm/grad-norm",
    "batch-size/batch-size",
    "loss-scale/loss-scale",
)
_OF_RATES = (
    *("iteration-time/iteration-time", "throughput/tokens per second", "throughput/TFLOPs per rank", "throughput/MFU"),
    *(f"step-time/{part}" for part in (*PARTS, "checkpoint")),
    *(f"checkpoint/{stage}" for stage in ("staged", "written", "durable", "failed")),
)
_OF_ROUTERS = ("load balancing loss", "z loss", "router entropy", "dropped")
_OF_VALIDATION = ("lm loss validation", "lm loss validation ppl")


class RunLog:
    """A no-op without a folder or on ranks other than 0."""

    def __init__(self, writer: Any | None, experts: Mapping[int, int] | None = None) -> None:
        self._writer, self._experts = writer, experts or {}

    @classmethod
    def open(
        cls,
        folder: str | None,
        description: Mapping[str, Any],
        rank: int,
        progress: Progress,
        experts: Mapping[int, int] | None = None,
        queue_size: int = 1000,
    ) -> RunLog:
        """Start an event file in `folder`; `description` becomes run.json beside it. What earlier files there say of
        steps after `progress` is of another branch, which is no longer shown. `experts`: layer -> how many."""
        if folder is None or rank != 0:
            return cls(None)
        from torch.utils.tensorboard import SummaryWriter

        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / RUN_FILE).write_text(json.dumps(description, indent=2, default=str) + "\n")
        goes_on = any(Path(folder).glob("*events.out.tfevents*"))
        run_log = cls(SummaryWriter(log_dir=folder, max_queue=queue_size), experts)
        if goes_on:
            run_log.go_back(progress)
        return run_log

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def go_back(self, progress: Progress) -> None:
        """What was said of steps after `progress` is no longer shown."""
        if self._writer is not None:
            _purge(self._writer, progress, self._experts)

    def step(self, step: StepMetrics) -> None:
        """Every iteration: the curves that a resume is judged by."""
        curves = {
            "lm-loss-training/lm loss": step.loss,
            "learning-rate/learning-rate": step.learning_rate,
            "grad-norm/grad-norm": step.grad_norm,
            "batch-size/batch-size": step.global_batch_size,
        }
        if step.loss_scale is not None:
            curves["loss-scale/loss-scale"] = step.loss_scale
        curves |= _expert_curves(step)
        for key, value in curves.items():
            self._add(key, value, step.iteration)
            self._add(f"{key} vs samples", value, step.consumed_samples)
            self._add(f"{key} vs tokens", value, step.consumed_tokens)

    def rate(self, iteration: int, rate: Rate) -> None:
        self._add("iteration-time/iteration-time", rate.seconds_per_iteration, iteration)
        self._add("throughput/tokens per second", rate.tokens_per_second, iteration)
        self._add("throughput/TFLOPs per rank", rate.tflops, iteration)
        if rate.mfu is not None:
            self._add("throughput/MFU", rate.mfu, iteration)

    def times(self, iteration: int, seconds: Mapping[str, float]) -> None:
        """Of the parts of a step on rank 0, and of saves."""
        for part, value in seconds.items():
            self._add(f"step-time/{part}", value, iteration)

    def save(self, iteration: int, stage: str, seconds: float) -> None:
        """How long after its begin a save was staged, written, durable, or had failed."""
        self._add(f"checkpoint/{stage}", seconds, iteration)

    def expert_shares(self, step: StepMetrics) -> None:
        """Each expert's share of its layer's choices: many curves, so not of every iteration."""
        for layer in step.experts:
            for expert, share in enumerate(layer.shares):
                self._add(f"moe-layer-{layer.layer}/share of expert {expert}", share, step.iteration)

    def validation(self, step: int, samples: int, tokens: int, loss: float) -> None:
        perplexity = math.exp(min(20.0, loss))
        for suffix, at in (("", step), (" vs samples", samples), (" vs tokens", tokens)):
            self._add(f"lm-loss-validation/lm loss validation{suffix}", loss, at)
            self._add(f"lm-loss-validation/lm loss validation ppl{suffix}", perplexity, at)

    def _add(self, key: str, value: float, step: int) -> None:
        if self._writer is not None:
            self._writer.add_scalar(key, value, step)


def _expert_curves(step: StepMetrics) -> dict[str, float]:
    """Of routers: means over the MoE layers, and each layer's busiest and idlest expert, 1 being an even share."""
    if not step.experts:
        return {}
    count = len(step.experts)
    curves = {
        "moe-training/load balancing loss": sum(layer.load_balancing_loss for layer in step.experts) / count,
        "moe-training/z loss": sum(layer.z_loss for layer in step.experts) / count,
        "moe-training/router entropy": sum(layer.entropy for layer in step.experts) / count,
        "moe-training/dropped": sum(layer.dropped for layer in step.experts) / count,
    }
    for layer in step.experts:
        curves[f"moe-layer-{layer.layer}/largest load"] = layer.largest_load
        curves[f"moe-layer-{layer.layer}/smallest load"] = layer.smallest_load
    return curves


def _purge(writer: Any, progress: Progress, experts: Mapping[int, int]) -> None:
    """Have readers forget what is said of steps after `progress`.

    TensorBoard's own mark of a restart (SummaryWriter's purge_step) is one number for all curves, so it cannot serve
    curves over iterations, samples and tokens at once. What serves is the older rule, which TensorBoard follows where
    a file says that it is of version 1: an event of a lower step than the one before it ends the curves that it names
    there (event_accumulator.py, _CheckForOutOfOrderStepAndMaybePurge). A value without a number names a curve and adds
    nothing to it. TensorBoard's data server follows the same rule in every version.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    events = writer._get_file_writer()  # torch's own way to its FileWriter, which takes any event
    events.add_event(Event(file_version="brain.Event:1"), step=0)
    over_all, over_iterations = curve_names(experts)
    for suffix, reached, names in (
        ("", progress.iteration, (*over_all, *over_iterations)),
        (" vs samples", progress.consumed_train_samples, over_all),
        (" vs tokens", progress.consumed_train_tokens, over_all),
    ):
        events.add_event(Event(summary=Summary()), step=2**62)
        values = [Summary.Value(tag=f"{name}{suffix}") for name in names]
        events.add_event(Event(summary=Summary(value=values)), step=reached + 1)
    events.add_event(Event(file_version="brain.Event:2"), step=progress.iteration)


def curve_names(experts: Mapping[int, int]) -> tuple[list[str], list[str]]:
    """(curves that there are over iterations, samples and tokens, those over iterations only) of a run with so many
    `experts` in each layer that has any."""
    over_all = [*_OF_STEPS, *(f"lm-loss-validation/{name}" for name in _OF_VALIDATION)]
    over_iterations = list(_OF_RATES)
    if experts:
        over_all += [f"moe-training/{name}" for name in _OF_ROUTERS]
    for layer, count in experts.items():
        over_all += [f"moe-layer-{layer}/{end} load" for end in ("largest", "smallest")]
        over_iterations += [f"moe-layer-{layer}/share of expert {expert}" for expert in range(count)]
    return over_all, over_iterations
