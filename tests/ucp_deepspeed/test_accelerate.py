"""Accelerate with the one line: `load_state` of what another number of ranks saved under another ZeRO stage."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from ucp_deepspeed.accelerate_program import Ran, differences, program
from ucp_deepspeed.seen import raised_by_deepspeed

from harness.ranks import RankFailure, run_ranks

SOURCES = [(stage, ranks) for stage in (1, 2, 3) for ranks in (1, 2, 3, 4)]
TARGETS = [(stage, ranks) for stage in (1, 2, 3) for ranks in (1, 2, 3, 4)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[..., tuple[Path, Ran]]:
    @functools.cache
    def make(stage: int, ranks: int, installs: bool = True) -> tuple[Path, Ran]:
        folder = tmp_path_factory.mktemp(f"zero{stage}dp{ranks}")
        [ran] = run_ranks(ranks, program, str(folder), stage, [], installs)[0]
        assert (folder / "pytorch_model" / "ucp.json").is_file() == installs
        return folder, ran

    return make


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"to-zero{target[0]}dp{target[1]}")
def test_every_stage_and_size_into(target: tuple[int, int], saved):
    made = [saved(*source) for source in SOURCES] + [saved(stage, 2, False) for stage in (1, 2, 3)]
    folders = [str(folder) for folder, _ in made]
    for by_rank in run_ranks(target[1], program, "", target[0], folders, True):
        for (folder, before), found in zip(made, by_rank, strict=True):
            assert not differences(found, before), folder


@pytest.mark.parametrize("source, target", [((1, 2), (1, 1)), ((2, 2), (3, 2)), ((3, 2), (3, 1))])
def test_stock_accelerate_beside_it(source: tuple[int, int], target: tuple[int, int], saved):
    folder, before = saved(*source, False)
    try:
        [found] = run_ranks(target[1], program, "", target[0], [str(folder)], False)[0]
    except RankFailure as error:
        assert raised_by_deepspeed(error)
        return
    assert differences(found, before)
