"""An evaluation's samples after a resume with another batch size: those that come next, none of them seen before."""

import pytest

from harness.ranks import run_ranks
from matrix.recording import build, command_line
from megatron.checkpoint.progress import Progress
from megatron.config.arguments import parse
from megatron.training.batches import _samples_needed, evaluation_start


def _evaluated(rank: int, world_size: int, argv: list[str], consumed: int) -> list[list[int]]:
    """The tokens of the next evaluation's samples."""
    batches = build(argv, rank, world_size).batches
    micro_batches = batches.samples_per_evaluation // batches.micro_batch_size
    loader = batches.valid(consumed)
    return [row for _, batch in zip(range(micro_batches), loader, strict=False) for row in batch["tokens"].tolist()]


def test_after_a_change_of_the_batch_size_no_sample_comes_twice(data):
    flags = {"split": "60,40,0", "eval_interval": 2, "eval_iters": 1, "iters": 12}
    small = [_evaluated_by_one(command_line(data, **flags, global_batch_size=4), consumed) for consumed in (0, 4, 8)]
    large = _evaluated_by_one(command_line(data, **flags, global_batch_size=8), 12)
    assert [len(rows) for rows in (*small, large)] == [4, 4, 4, 8]
    seen = [tuple(row) for rows in (*small, large) for row in rows]
    assert len(set(seen)) == len(seen)


def _evaluated_by_one(argv: list[str], consumed: int) -> list[list[int]]:
    return run_ranks(1, _evaluated, argv, consumed)[0]


@pytest.mark.parametrize("size", [1, 4, 7])
def test_of_one_size_evaluations_follow_each_other_and_begin_anew_after_the_last_whole_one(size):
    starts = [evaluation_start(index * size, 30, size) for index in range(2 * (30 // size))]
    assert starts == 2 * [index * size for index in range(30 // size)]


def test_an_evaluation_that_does_not_fit_any_more_begins_anew():
    assert [evaluation_start(consumed, 30, 8) for consumed in (20, 22, 23, 24)] == [20, 22, 0, 0]
    assert evaluation_start(5, 6, 8) == 0


def test_the_validation_part_has_room_for_evaluations_of_both_sizes(data):
    """12 iterations, an evaluation every 2; 3 of size 8 are behind, 4 of size 4 are planned for what is to come."""
    flags = {"split": "60,40,0", "eval_interval": 2, "eval_iters": 1, "iters": 12, "global_batch_size": 4}
    config = parse(command_line(data, **flags)).config.validate(1)
    behind = Progress(iteration=6, consumed_train_samples=48, consumed_valid_samples=24)
    assert _samples_needed(config, behind)[1] == 3 * 8 + 4 * 4
    of_one_size = Progress(iteration=6, consumed_train_samples=24, consumed_valid_samples=12)
    assert _samples_needed(config, of_one_size)[1] == _samples_needed(config, Progress())[1] == 7 * 4
