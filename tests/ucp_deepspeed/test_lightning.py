"""Lightning with the one line, and stock Lightning on what `ucp convert --to` writes: other ranks, other stages.

Truth is the run that never stopped. It saves at the end of an epoch: in the middle of one Lightning itself begins the
epoch's data anew.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from ucp_deepspeed.lightning_program import SAVED_AT, Ran, checkpoint_in, differences, program
from ucp_deepspeed.seen import raised_by_deepspeed

from harness.ranks import RankFailure, run_ranks
from megatron.ucp.reshape import reshape
from megatron.ucp.targets.native_target import NativeTarget

SOURCES = [(stage, ranks) for stage in (1, 2, 3) for ranks in (1, 2)]
TARGETS = [(stage, ranks) for stage in (1, 2, 3) for ranks in (1, 2, 3)]
Whole = tuple[Path, list[Ran]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[..., Whole]:
    @functools.cache
    def make(stage: int, ranks: int, installs: bool = True) -> Whole:
        folder = checkpoint_in(tmp_path_factory.mktemp(f"zero{stage}dp{ranks}"))
        by_rank = run_ranks(ranks, program, str(folder.parent), stage, [], installs)
        assert (folder / "checkpoint" / "ucp.json").is_file() == installs
        return folder, [whole for [whole] in by_rank]

    return make


def resumed(target: tuple[int, int], folders: list[Path], installs: bool) -> list[list[Ran]]:
    """By folder, by rank."""
    by_rank = run_ranks(target[1], program, "", target[0], list(map(str, folders)), installs, timeout=300)
    return [list(of_folder) for of_folder in zip(*by_rank, strict=True)]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"to-zero{target[0]}dp{target[1]}")
def test_every_stage_and_size_into(target: tuple[int, int], saved):
    made = [saved(*source) for source in SOURCES] + [saved(stage, 2, False) for stage in (1, 2, 3)]
    for (folder, whole), found in zip(made, resumed(target, [folder for folder, _ in made], True), strict=True):
        assert not differences(found, whole), folder


@pytest.mark.parametrize("target", [(1, 3), (2, 1), (3, 2)], ids=str)
def test_stock_lightning_resumes_what_is_written_for_it(target: tuple[int, int], saved, tmp_path):
    made = [saved(stage, 2, False) for stage in (1, 2, 3)]
    folders = [reshape(folder, tmp_path / str(i), NativeTarget(*target)).output for i, (folder, _) in enumerate(made)]
    for (_, whole), found in zip(made, resumed(target, folders, False), strict=True):
        assert not differences(found, whole)


@pytest.mark.parametrize("source, target", [((1, 2), (1, 1)), ((2, 2), (3, 2)), ((3, 2), (3, 1))])
def test_stock_lightning_beside_it(source: tuple[int, int], target: tuple[int, int], saved):
    folder, whole = saved(*source, False)
    try:
        [found] = resumed(target, [folder], False)
    except RankFailure as error:
        assert raised_by_deepspeed(error)
        return
    assert differences(found, whole)


def test_planted_fault_is_found_by_the_comparison(saved):
    """A sample seen twice, a loss that is off, and a moment of one parameter."""
    _, whole = saved(1, 2)
    found = copy.deepcopy(whole)
    for ran in found:
        ran.epoch, ran.rates = 1, {step: rate for step, rate in ran.rates.items() if step > SAVED_AT}
        ran.losses = {step: loss for step, loss in ran.losses.items() if step > SAVED_AT}
    found[1].state = found[0].state
    assert not differences(found, whole)
    found[1].samples[6] = found[1].samples[7]
    found[0].losses[8] += 1e-4
    found[1].state = copy.deepcopy(found[0].state)
    found[1].state.state["net.0.weight", "exp_avg"][0, 0] += 1e-7
    assert differences(found, whole) == ["losses", "('net.0.weight', 'exp_avg')", "samples of step 6"]
