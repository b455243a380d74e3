"""Loads whose outcome cannot be luck: the Target's whole state is noise before each one.

found = run_ranks(2, take_all, argv, [("direct", folder), ("universal", other)])     # by rank: [Taken, ...]
assert_same_tensors(universal, again)                                                # of folders, with plain torch
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from matrix.recording import build

NOISE = 777.0


class Taken(NamedTuple):
    """What stands in the engine after a load."""

    digests: dict
    steps: set
    iteration: int
    samples: int
    losses: dict[int, float]
    """Of the steps after it, if the run went on."""


def take_all(
    rank: int, world_size: int, argv: list[str], plans: list[tuple], save_last: str | None = None, goes_on: bool = False
) -> list[Taken]:
    """The body of a rank: load every planned Source into one live engine, one after the other. A plan is (kind, folder)
    or (kind, folder, where to save what was loaded). The last one is saved, and trained on to --train-iters, where
    asked."""
    from megatron.checkpoint.loading import load
    from megatron.checkpoint.resume import ResumePlan, open_planned
    from megatron.checkpoint.saving import save
    from megatron.checkpoint.state_digest import state_digests
    from megatron.training.loop import fit

    run = build(argv, rank, world_size)
    state = run.live.state
    found = []
    for kind, folder, *save_to in plans:
        fill_with_noise(run)
        progress = load(run.live, open_planned(ResumePlan(kind, Path(folder), "")))
        steps = {state.step_of(interval.flat) for interval in state.intervals}
        if save_to and save_to[0] is not None:
            save(run.live, Path(save_to[0]), progress)
        found.append(Taken(state_digests(state), steps, progress.iteration, progress.consumed_train_samples, {}))
    if save_last is not None:
        save(run.live, Path(save_last), progress)
    if goes_on:
        run.progress = progress
        fit(run)
        found[-1].losses.update({step.iteration: step.loss for step in run.run_log.steps})
    return found


def fill_with_noise(run) -> None:
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    state = run.live.state
    state.make_states()
    for interval in state.intervals:
        for part in state.states_of(interval):
            part.values.fill_(NOISE)
        state.set_step(interval.flat, NOISE)
        for key in state.scalars_of(interval.flat):
            state.set_scalar(interval.flat, key, NOISE)
    for interval in state.frozen_intervals:
        interval.weights.fill_(NOISE)
    state.refresh_weights()
    with GatheredParameters(list(run.live.engine.module.parameters())):  # whole under ZeRO-3 too
        assert all(bool((p == NOISE).all()) and p.numel() for p in run.live.engine.module.parameters())


def assert_same_tensors(first: Path, second: Path, at_least: int = 100) -> None:
    """Bitwise, with plain torch.load: independent of our readers and of the digest."""
    files = sorted(path.relative_to(first) for path in (first / "zero").rglob("*.pt") if "optimizer" not in path.name)
    assert len(files) > at_least
    assert files == sorted(p.relative_to(second) for p in (second / "zero").rglob("*.pt") if "optimizer" not in p.name)
    for file in files:
        # Our own files of a moment ago; DeepSpeed's format has a class of its own in them.
        a, b = (torch.load(folder / file, weights_only=False) for folder in (first, second))
        a, b = (x["param"] if isinstance(x, dict) else x for x in (a, b))
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), file
