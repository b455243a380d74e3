"""A bit that flips between two steps is found, and told by rank, parameter, state and step."""

from __future__ import annotations

import random

import pytest

from harness.ranks import RankFailure, run_ranks
from matrix.recording import build, command_line

NUM_FLIPS = 1000


def _flip(values, element: int, bit: int) -> None:
    import torch

    kind = {4: torch.int32, 2: torch.int16}[values.element_size()]
    raw = values.view(kind)
    mask = (1 << bit) - (1 << 8 * values.element_size() if bit == 8 * values.element_size() - 1 else 0)
    raw[element] ^= mask


def _find_flips(rank: int, world_size: int, argv: list[str], count: int) -> tuple[int, int, list[str]]:
    """(found, told where they are, what else)."""
    from megatron.checkpoint.state_watch import StateChangedError, StateWatch
    from megatron.training.loop import fit

    run = build(argv, rank, world_size)
    fit(run)
    state, shared, chance = run.live.state, random.Random(7), random.Random(rank)
    places = [(i.name, held.state, held.values, held.runs) for i in state.intervals for held in state.states_of(i)]
    watch = StateWatch(state)
    watch.remember(3)
    watch.check()  # nothing has happened
    found = named = 0
    others = []
    for _ in range(count):
        victim = shared.randrange(world_size)  # the same on every rank; what each would flip is its own
        name, key, values, runs = places[chance.randrange(len(places))]
        _, start, length = runs[chance.randrange(len(runs))]  # not among the rows that only fill up the vocabulary
        element, bit = int(start) + chance.randrange(int(length)), chance.randrange(32)
        watch.remember(3)
        if rank == victim:
            _flip(values, element, bit)
        try:
            watch.check()
        except StateChangedError as error:
            found += 1
            mine = f"{name} ({key})"
            is_named = "step 3 had ended" in str(error) and f"rank {victim}:" in str(error)
            is_named = is_named and (rank != victim or mine in str(error))
            named += is_named
            if not is_named:
                others.append(f"{mine}, element {element}: {error}")
            if str(error).count("rank ") != 1:
                others.append(str(error))
        if rank == victim:
            _flip(values, element, bit)
    watch.remember(4)
    watch.check()
    return found, named, others


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_every_flip_is_found_and_named(zero: int, data):
    count = NUM_FLIPS // 3 + 1
    for found, named, others in run_ranks(2, _find_flips, command_line(data, zero=zero, iters=3), count, timeout=300):
        assert (found, named, others) == (count, count, [])


def _fit_with_a_flip(rank: int, world_size: int, argv: list[str], what: str) -> int:
    from megatron.training.loop import fit

    run = build(argv, rank, world_size)

    def begins(iteration: int) -> None:
        if iteration == 4 and rank == 1:
            interval = run.live.state.intervals[0]
            if what == "master":
                _flip(interval.master, 1, 3)
            elif what == "live weight":
                _flip(interval.param.data.view(-1)[interval.start :], 1, 3)

    fit(run, begins)
    return run.progress.iteration


def test_a_run_stops_at_the_step(data):
    argv = command_line(data, zero=1, iters=6, verify_state_every=3)
    assert run_ranks(2, _fit_with_a_flip, argv, "nothing") == [6, 6]
    with pytest.raises(RankFailure, match=r"(?s)StateChangedError: the state changed after step 3.*rank 1: .*\(fp32\)"):
        run_ranks(2, _fit_with_a_flip, argv, "master")
    # Only every third step is watched.
    assert run_ranks(2, _fit_with_a_flip, command_line(data, zero=1, iters=6, verify_state_every=5), "master") == [6, 6]


def test_a_live_weight_in_half_precision_is_watched_too(data):
    argv = command_line(data, zero=2, iters=6, bf16=True, verify_state_every=3)
    with pytest.raises(RankFailure, match=r"(?s)rank 1: .*\(live weights\)"):
        run_ranks(2, _fit_with_a_flip, argv, "live weight")
