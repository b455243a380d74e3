"""The training loop: step, log, evaluate, save, stop; reads top to bottom as the story of a run.

run = build_run(config, launch)     # training/build.py
fit(run)
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron.checkpoint.live_run import LiveRun
from megatron.checkpoint.progress import Progress
from megatron.checkpoint.state_watch import StateChangedError, StateWatch
from megatron.config.config import Config
from megatron.engine.step_times import StepTimes
from megatron.engine.steps import backward_scale, evaluate, set_global_batch_size, train_step
from megatron.layers.router_ledger import RouterLedger
from megatron.parallel.rank_errors import reported_by_rank_0
from megatron.training.batches import Batches
from megatron.training.expert_metrics import expert_metrics
from megatron.training.metrics import Rate, StepMetrics, Throughput, console_line, duration
from megatron.training.profiler import Profiler
from megatron.training.saves import Saves
from megatron.training.stop_signal import StopSignal
from megatron.training.tensorboard import RunLog

log = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; training on would destroy the model. Nothing is saved."""


class LossScaleError(RuntimeError):
    """fp16 gradients overflow even at the smallest loss scale. Nothing is saved."""


class OutOfSamplesError(RuntimeError):
    """No sample is left for the next step. Nothing is saved."""


@dataclass
class Run:
    """Everything a run consists of, built and ready."""

    config: Config
    live: LiveRun
    batches: Batches
    progress: Progress
    run_log: RunLog
    flops_per_token: float
    ledger: RouterLedger
    """What the MoE layers add to the loss and tell of themselves; empty without experts."""
    times: StepTimes = field(default_factory=StepTimes)
    peak_tflops: float | None = None
    """Of one device in the run's precision, where it is known."""
    is_stopped_by_signal: bool = False
    """Set by `fit`."""
    ownership: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    """Entered already; its end gives the folder of --save free for another run."""

    @property
    def last_iteration(self) -> int:
        """At which it ends, from where it has come to."""
        progress = self.progress
        return self.config.length.last_iteration(
            progress.iteration, progress.consumed_train_samples, progress.consumed_train_tokens
        )


def fit(run: Run, begins: Callable[[int], None] = lambda iteration: None) -> Progress:
    """Train until train_iters or an exit condition; returns how far it came. `begins` is told each iteration as it
    begins. Collective over the world."""
    progress, last_iteration = run.progress, run.last_iteration
    if progress.iteration >= last_iteration:
        log.info(
            "nothing to train: iteration %d of %d is reached, %d samples",
            progress.iteration,
            last_iteration,
            progress.consumed_train_samples,
        )
        return progress
    with Saves(run.config.checkpoint, run.live, progress, run.run_log) as saves:
        try:
            return _fit(run, saves, last_iteration, begins)
        except (NonFiniteLossError, LossScaleError, OutOfSamplesError):  # raised on all ranks: what is staged is whole
            saves.finish_last()
            raise
        except StateChangedError as error:  # so is this, but what was saved since the step may not be
            saves.finish_and_mark(error)
            raise


def _fit(run: Run, saves: Saves, last_iteration: int, begins: Callable[[int], None]) -> Progress:
    config, progress = run.config, run.progress
    started = time.monotonic()
    stop = None
    if config.run.exit_signal_handler:
        stop = StopSignal.install(config.run.exit_signal, config.run.exit_signal_grace)
    train = run.batches.train(progress.consumed_train_samples)
    throughput = Throughput(progress.consumed_train_tokens, run.flops_per_token, dist.get_world_size(), run.peak_tflops)
    watch, watched_every = StateWatch(run.live.state), config.run.verify_state_every
    losses: list[float] = []
    skipped = since_line = 0
    with Profiler.of(config.run, dist.get_rank()) as profiler:
        profiler.warn_of(progress.iteration + 1, last_iteration)
        while progress.iteration < last_iteration:
            begins(progress.iteration + 1)
            profiler.before(progress.iteration + 1)
            is_logged = (progress.iteration + 1) % config.run.log_interval == 0
            watch.check()
            with run.times.measuring() if is_logged or run.times.is_free else contextlib.nullcontext():
                step = _one_iteration(run, train)
            profiler.after(progress.iteration)
            if watched_every and progress.iteration % watched_every == 0:
                watch.remember(progress.iteration)
            run.run_log.step(step)
            skipped += step.is_skipped
            if not step.is_skipped:
                losses.append(step.loss)
            since_line += 1
            if progress.iteration % config.run.log_interval == 0:
                rate, since_line = throughput.since_last(since_line, progress.consumed_train_tokens), 0
                _log(run, step, rate, losses, skipped, last_iteration)
                losses, skipped = [], 0
            if config.run.eval_iters and progress.iteration % config.run.eval_interval == 0:
                with throughput.paused():
                    validate(run)
            reason = _exit_reason(config, progress, started, stop, run.live.engine.device)
            with throughput.paused():
                saves.after_step(is_last=reason is not None or progress.iteration >= last_iteration)
            if reason:
                if stop is not None:
                    stop.ignore()
                run.is_stopped_by_signal = reason == config.run.exit_signal
                log.info("stopping at iteration %d: %s", progress.iteration, reason)
                break
        if not run.is_stopped_by_signal:  # whoever sent it does not wait long
            saves.finish_exports()
        return progress


def _one_iteration(run: Run, train: Iterator) -> StepMetrics:
    engine, progress = run.live.engine, run.progress
    learning_rate = run.live.schedule.learning_rate
    scaler = run.live.state.loss_scaler if run.config.optimizer.precision == "fp16" else None
    loss_scale = None if scaler is None else float(scaler.cur_scale)
    skipped_before = engine.skipped_steps
    global_batch_size = run.config.batch_sizes.at(progress.consumed_train_samples)
    set_global_batch_size(engine, global_batch_size, run.live.context.dp_size)
    try:
        with _explained_loss_scale(progress.iteration + 1):
            run.ledger.scale = backward_scale(engine)
            loss = train_step(engine, train, run.times)
    except StopIteration as error:
        raise OutOfSamplesError(
            f"the training set ended at iteration {progress.iteration + 1}, before --train-iters. What to do: resume "
            "from the last checkpoint; the data is planned anew from there"
        ) from error
    is_skipped = engine.skipped_steps > skipped_before
    if not math.isfinite(loss) and not is_skipped:
        with reported_by_rank_0(dist.get_rank()):
            raise NonFiniteLossError(
                f"loss is {loss} at iteration {progress.iteration + 1} (learning rate {learning_rate:.3e}). The last "
                "checkpoint is untouched; resume from it with a lower --lr, or look at the data of this iteration."
            )
    progress.iteration += 1
    progress.consumed_train_samples += global_batch_size
    progress.consumed_train_tokens += global_batch_size * run.config.model.seq_length
    progress.skipped_iterations += is_skipped
    if not is_skipped:
        run.live.schedule.step(global_batch_size)
    norm = engine.get_global_grad_norm()
    return StepMetrics(
        iteration=progress.iteration,
        consumed_samples=progress.consumed_train_samples,
        consumed_tokens=progress.consumed_train_tokens,
        loss=loss,
        learning_rate=learning_rate,
        grad_norm=math.nan if norm is None else float(norm),
        loss_scale=loss_scale,
        is_skipped=is_skipped,
        global_batch_size=global_batch_size,
        experts=expert_metrics(run.ledger, run.config.model, run.live.context, engine.device),
    )


@contextlib.contextmanager
def _explained_loss_scale(iteration: int) -> Iterator[None]:
    """DeepSpeed's own word for it is a bare Exception (runtime/fp16/loss_scaler.py, update_scale)."""
    try:
        yield
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        with reported_by_rank_0(dist.get_rank()):
            raise LossScaleError(
                f"the gradients of iteration {iteration} overflow at the smallest loss scale. The last checkpoint is "
                "untouched; resume from it with --bf16, a lower --lr or a lower --min-loss-scale."
            ) from error


def validate(run: Run) -> float | None:
    """Mean loss over eval_iters batches of the validation split, logged; moves consumed_valid_samples."""
    config, progress = run.config, run.progress
    batches = run.batches.valid(progress.consumed_valid_samples)
    if batches is None:
        return None
    with run.live.streams.preserved():
        loss = evaluate(run.live.engine, batches, config.run.eval_iters, _final_micro_batches(run))
    progress.consumed_valid_samples += config.run.eval_iters * config.run.global_batch_size
    log.info("validation at iteration %d | loss %.6f | ppl %.4g", progress.iteration, loss, math.exp(min(20, loss)))
    run.run_log.validation(progress.iteration, progress.consumed_train_samples, progress.consumed_train_tokens, loss)
    return loss


def _final_micro_batches(run: Run) -> int:
    """Of an evaluation's global batches: of one size, however far a ramp-up has come (as Megatron's)."""
    config = run.config.run
    return config.global_batch_size // (config.micro_batch_size * run.live.context.dp_size)


def test(run: Run) -> float | None:
    """Mean loss over eval_iters batches of the test split, logged."""
    batches = run.batches.test()
    if batches is None:
        log.info("no test: --split leaves no test part")
        return None
    loss = evaluate(run.live.engine, batches, run.config.run.eval_iters, _final_micro_batches(run))
    log.info("test | loss %.6f | ppl %.4g", loss, math.exp(min(20, loss)))
    return loss


def _log(run: Run, step: StepMetrics, rate: Rate, losses: list[float], skipped: int, last_iteration: int) -> None:
    mean = sum(losses) / len(losses) if losses else math.nan
    log.info(console_line(step, rate, last_iteration, mean, skipped))
    run.run_log.rate(step.iteration, rate)
    run.run_log.times(step.iteration, run.times.taken())
    run.run_log.expert_shares(step)


def _exit_reason(
    config: Config, progress: Progress, started: float, stop: StopSignal | None, device: torch.device
) -> str | None:
    """The same on every rank: rank 0's clock and any rank's signal decide."""
    run = config.run
    if run.exit_interval and progress.iteration % run.exit_interval == 0:
        return f"--exit-interval {run.exit_interval}"
    if run.exit_duration_in_mins is None and stop is None:
        return None
    minutes = (time.monotonic() - started) / 60
    is_late = run.exit_duration_in_mins is not None and minutes > run.exit_duration_in_mins
    flags = torch.tensor([is_late and dist.get_rank() == 0, stop is not None and stop.is_set], dtype=torch.int32)
    flags = flags.to(device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    if flags[1]:
        return run.exit_signal
    if flags[0]:
        return f"--exit-duration-in-mins {run.exit_duration_in_mins} ({duration(minutes * 60)} passed)"
    return None
