"""fp16: the dynamic loss scale and the counts of skipped steps go on where they were.

These runs answer for the CPU that it can (`allow_fp16`), and are otherwise what a GPU runs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.ranks import RankFailure, run_ranks
from matrix.cells import Cell
from matrix.recording import allow_fp16, build, command_line

HALF, WHOLE = 6, 12


def _scaler(state) -> dict:
    names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    return {name: getattr(state.loss_scaler, name, None) for name in names}


def _train(rank: int, world_size: int, argv: list[str], forget: str | None = None):
    """(steps as plain values, scaler at the start and at the end, skipped steps, digests)"""
    from megatron.checkpoint.state_digest import state_digests
    from megatron.training.loop import fit

    allow_fp16()
    run = build(argv, rank, world_size)
    at_start = _scaler(run.live.state)
    if forget is not None:
        setattr(run.live.state.loss_scaler, forget, at_start[forget] - 1)
    fit(run)
    steps = {
        s.iteration: (s.loss, s.learning_rate, s.loss_scale, s.is_skipped, None if s.is_skipped else s.grad_norm)
        for s in run.run_log.steps
    }
    skipped = run.progress.skipped_iterations, run.live.engine.skipped_steps
    return steps, at_start, _scaler(run.live.state), skipped, state_digests(run.live.state)


def _argv(data: Path, cell: Cell, **flags) -> list[str]:
    values = {"fp16": True, "initial_loss_scale": 2.0**20, "loss_scale_window": 4, "hysteresis": 1, "iters": WHOLE}
    return command_line(data, **cell.flags, **(values | flags))


CELLS = (Cell(dp=2, zero=1), Cell(dp=2, zero=2), Cell(dp=2, zero=3), Cell(tp=2, zero=1), Cell(pp=2, zero=1))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_same_topology_is_bitwise_through_overflows(cell: Cell, data, tmp_path):
    whole = run_ranks(2, _train, _argv(data, cell))
    first = run_ranks(2, _train, _argv(data, cell, exit_interval=HALF, save=tmp_path))
    second = run_ranks(2, _train, _argv(data, cell, load=tmp_path))
    for rank in range(2):
        assert {**first[rank][0], **second[rank][0]} == whole[rank][0]
        assert second[rank][1:4:2] == (first[rank][2], whole[rank][3])
        assert second[rank][2] == whole[rank][2]
        assert second[rank][4] == whole[rank][4]
    steps, at_start, at_half, skipped, _ = first[0]
    # It did overflow before the save, and the scale had moved: nothing above is true of a scaler at rest.
    assert skipped[0] == skipped[1] == sum(step[3] for step in steps.values()) > 0
    assert at_half["cur_scale"] < at_start["cur_scale"] and at_half["last_overflow_iter"] >= 0


@pytest.mark.parametrize("field", ["cur_iter", "last_overflow_iter"])
def test_planted_fault_a_counter_that_is_off_by_one(field: str, fp16_source, data):
    """The comparison above must see it, in the scales of the steps or in the scaler at the end."""
    folder, _ = fp16_source
    argv = _argv(data, Cell(dp=2, zero=1), load=folder)
    right, wrong = (run_ranks(2, _train, argv, forget)[0] for forget in (None, field))
    assert (right[0], right[2]) != (wrong[0], wrong[2])


@pytest.fixture(scope="module")
def fp16_source(tmp_path_factory, data):
    """(folder, what rank 0 saw) of a run that overflowed and saved at HALF."""
    folder = tmp_path_factory.mktemp("fp16")
    argv = _argv(data, Cell(dp=2, zero=1), exit_interval=HALF, save=folder)
    return folder, run_ranks(2, _train, argv)[0]


@pytest.mark.parametrize("cell", [Cell(zero=1), Cell(tp=2, zero=2)], ids=lambda cell: cell.name)
def test_another_topology_takes_the_scale_over(cell: Cell, fp16_source, data):
    folder, (_, _, scaler, skipped, _) = fp16_source
    # Another initial scale on the command line: the Source's state wins over it.
    argv = _argv(data, cell, initial_loss_scale=2.0**4, load=folder)
    for steps, at_start, _, skipped_in_all, _ in run_ranks(cell.world_size, _train, argv):
        assert at_start == scaler and scaler["cur_scale"] != 2.0**4
        assert steps[HALF + 1][2] == scaler["cur_scale"]
        assert skipped_in_all[0] == skipped_in_all[1] == skipped[0] + sum(step[3] for step in steps.values())


def _loaded(rank: int, world_size: int, argv: list[str]):
    from megatron.checkpoint.state_digest import state_digests

    allow_fp16()
    run = build(argv, rank, world_size)
    return _scaler(run.live.state), run.progress.skipped_iterations, state_digests(run.live.state)


def test_across_precisions_each_keeps_its_own_scale(fp16_source, data, tmp_path):
    """A bf16 run has a constant scale of 1, which is no start for a dynamic one, nor the reverse."""
    folder, (_, _, _, skipped, digests) = fp16_source
    argv = command_line(data, zero=1, iters=WHOLE, bf16=True, load=folder)
    [(scaler, skipped_iterations, found)] = run_ranks(1, _loaded, argv)
    assert (scaler["cur_scale"], skipped_iterations, found) == (1.0, skipped[0], digests)

    saved = run_ranks(1, _train, command_line(data, zero=1, iters=2, bf16=True, save=tmp_path))[0][4]
    [(scaler, _, found)] = run_ranks(1, _loaded, _argv(data, Cell(zero=1), load=tmp_path))
    assert (scaler["cur_scale"], scaler["cur_iter"], found) == (2.0**20, 0, saved)


def test_a_fixed_scale_is_the_flags(fp16_source, data):
    folder, (_, _, _, _, digests) = fp16_source
    [(scaler, _, found)] = run_ranks(1, _loaded, _argv(data, Cell(zero=1), loss_scale=64.0, load=folder))
    assert (scaler["cur_scale"], found) == (64.0, digests)


def test_no_scale_is_small_enough(data, tmp_path):
    argv = _argv(data, Cell(zero=1), initial_loss_scale=2.0**40, min_loss_scale=2.0**40, save=tmp_path / "save")
    with pytest.raises(RankFailure, match=r"LossScaleError: the gradients of iteration \d .*resume .* with --bf16"):
        run_ranks(1, _train, argv)
    assert not list((tmp_path / "save").iterdir())
