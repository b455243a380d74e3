"""Checks of the batch: that every step's is whole micro batches on every data parallel rank, ramp-up included.

problems = [*batch_problems(config.run, config.parallel, world_size=8)]
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.batch_sizes import BatchSizes
from megatron.config.checking import at_least, divisors, nearest
from megatron.config.errors import Problem
from megatron.config.parallel import ParallelConfig
from megatron.config.run import RunConfig


def batch_problems(run: RunConfig, parallel: ParallelConfig, world_size: int) -> Iterator[Problem]:
    yield from at_least(1, run, "micro_batch_size")
    if run.global_batch_size is None or run.micro_batch_size < 1 or parallel.model_parallel_size < 1:
        return
    yield from at_least(1, run, "global_batch_size")
    dp_size = world_size // parallel.model_parallel_size
    step = run.micro_batch_size * dp_size
    if dp_size >= 1 and run.global_batch_size >= 1 and run.global_batch_size % step:
        below = run.global_batch_size // step * step
        legal = [n for n in divisors(run.global_batch_size) if run.global_batch_size % (n * dp_size) == 0]
        fix = f"--global-batch-size {' or '.join(str(n) for n in (below, below + step) if n)}"
        if legal:
            fix += ", or --micro-batch-size of " + nearest(legal, run.micro_batch_size)
        yield Problem(
            "the global batch is not a multiple of micro batch x data parallel size",
            found=f"--global-batch-size {run.global_batch_size} with --micro-batch-size {run.micro_batch_size} "
            f"on {dp_size} data parallel ranks",
            expected=f"a multiple of {step} = {run.micro_batch_size} x {dp_size}",
            flags=("--global-batch-size", "--micro-batch-size"),
            fix=fix,
        )


def rampup_problems(
    run: RunConfig, parallel: ParallelConfig, world_size: int, samples: int | None
) -> Iterator[Problem]:
    """What makes no ramp-up, or does not fit the ranks from `samples` on; None: where it goes on is not known yet."""
    if run.rampup_batch_size is None:
        return
    flags = ("--rampup-batch-size",)
    found = "--rampup-batch-size " + " ".join(map(str, run.rampup_batch_size))
    if len(run.rampup_batch_size) != 3 or min(run.rampup_batch_size) < 1:
        yield Problem(
            "--rampup-batch-size is not a ramp-up",
            found=found,
            expected="START INCREMENT SAMPLES, each at least 1",
            flags=flags,
            fix="give three whole numbers: --rampup-batch-size 16 16 100000",
        )
        return
    if run.train_iters is not None:
        yield Problem(
            "a ramp-up of the batch size needs a length in samples: iterations are not of one size",
            found=f"{found} with --train-iters {run.train_iters}",
            expected="--train-samples or --train-tokens",
            flags=(*flags, "--train-iters"),
            fix="give --train-samples, and the schedule's --lr-... flags in samples",
        )
    if run.global_batch_size is None:
        yield Problem(
            "a ramp-up of the batch size needs its end",
            found=found,
            expected="--global-batch-size",
            flags=flags,
            fix="give --global-batch-size, the size after the ramp-up",
        )
        return
    start, increment, _ = run.rampup_batch_size
    if run.global_batch_size < start or (run.global_batch_size - start) % increment:
        yield Problem(
            "the ramp-up of the batch size does not lead to the global batch size",
            found=f"{found} with --global-batch-size {run.global_batch_size}",
            expected="START and a whole number of INCREMENTs",
            flags=(*flags, "--global-batch-size"),
            fix=f"--global-batch-size {start + max(0, round((run.global_batch_size - start) / increment)) * increment}",
        )
        return
    step = run.micro_batch_size * (world_size // max(1, parallel.model_parallel_size))
    if samples is None or step < 1:
        return
    sizes = BatchSizes(run.global_batch_size, run.rampup_batch_size).to_come(samples)[:-1]  # the last: batch_problems
    if odd := [size for size in sizes if size % step]:
        yield Problem(
            "batches of the ramp-up are not multiples of micro batch x data parallel size",
            found=f"{found}: {', '.join(map(str, odd[:8]))}{', ...' if len(odd) > 8 else ''} with --micro-batch-size "
            f"{run.micro_batch_size} on {step // run.micro_batch_size} data parallel ranks",
            expected=f"multiples of {step} = {run.micro_batch_size} x {step // run.micro_batch_size}",
            flags=(*flags, "--micro-batch-size"),
            fix=f"a START and an INCREMENT that are multiples of {step}, or a smaller --micro-batch-size",
        )
