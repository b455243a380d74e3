"""Where the time of a step goes: the accounting by a clock of our own, the parts by real runs."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from harness.ranks import run_ranks
from matrix.cells import Cell
from matrix.recording import build, command_line
from megatron.engine.step_times import PARTS, StepTimes


class Clock:
    """Moves when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_parts_do_not_overlap_and_their_sum_is_the_step():
    clock = Clock()
    times = StepTimes(clock=clock)
    for scale in (1, 3):
        with times.measuring():
            clock.now += 1 * scale
            with times.part("forward"):
                clock.now += 10 * scale
                with times.part("communication"):
                    clock.now += 100 * scale
                clock.now += 1000 * scale
            with times.part("data"):
                clock.now += 10000 * scale
    taken = times.taken()
    assert taken == {
        "other": 2, "forward": 2020, "communication": 200, "data": 20000, "backward": 0, "optimizer": 0,
    }  # fmt: skip
    assert times.taken() == {}


def test_what_is_not_measured_is_not_counted_and_an_error_leaves_nothing_replaced():
    clock = Clock()
    times, collective = StepTimes(clock=clock), dist.all_reduce
    with times.part("forward"):
        clock.now += 1
    assert times.taken() == {}
    with pytest.raises(ZeroDivisionError, match="division"), times.measuring():
        assert dist.all_reduce is not collective
        with times.part("backward"):
            clock.now += 5
            1 / 0  # noqa: B018
    assert dist.all_reduce is collective
    with times.measuring():
        clock.now += 7
    # Of the step that failed nothing is told as if it were a step's mean.
    assert times.taken()["other"] == 7


def test_a_device_is_waited_for_at_each_boundary():
    waits = []
    times = StepTimes(wait=lambda: waits.append(1))
    assert not times.is_free and StepTimes().is_free
    with times.measuring(), times.part("forward"):
        pass
    assert len(waits) == 4


class Log:
    """In place of RunLog."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict]] = []

    def step(self, metrics) -> None:
        pass

    def rate(self, iteration, rate) -> None:
        pass

    def expert_shares(self, step) -> None:
        pass

    def times(self, iteration, seconds) -> None:
        self.told.append((iteration, dict(seconds)))


def _timed(rank: int, world_size: int, argv: list[str]):
    from megatron.training.loop import fit

    collective = dist.all_reduce
    run = build(argv, rank, world_size)
    run.run_log = Log()
    fit(run)
    assert dist.all_reduce is collective
    return run.run_log.told


CELLS = (Cell(), Cell(dp=2, zero=1), Cell(dp=2, zero=3), Cell(tp=2), Cell(pp=2), Cell(tp=2, pp=2, zero=1))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_every_part_of_a_real_step_is_told(cell: Cell, data, tmp_path):
    argv = command_line(data, **{**cell.flags, "log_interval": 2}, iters=4, save=tmp_path, save_interval=4)
    for told in run_ranks(cell.world_size, _timed, argv):
        assert [iteration for iteration, _ in told] == [2, 4, 4]
        for _, seconds in told[:2]:
            assert set(seconds) == set(PARTS)
            assert all(seconds[part] > 0 for part in ("data", "forward", "backward", "optimizer", "other"))
            if cell.world_size > 1:
                assert seconds["communication"] > 0
        assert set(told[2][1]) == {"checkpoint"} and told[2][1]["checkpoint"] > 0
