"""Where a run ends, by hand: in iterations, samples and tokens, after a change of the batch size."""

import pytest

from megatron.config.batch_sizes import BatchSizes
from megatron.config.length import RunLength


@pytest.mark.parametrize(
    "batch, given, done, last, reach",
    [
        # 40 of 80 samples at batch 4; then another batch size.
        (4, {"train_samples": 80}, (10, 40, 640), 20, 80),
        (8, {"train_samples": 80}, (10, 40, 640), 15, 80),
        (2, {"train_samples": 80}, (10, 40, 640), 30, 80),
        (16, {"train_samples": 80}, (10, 40, 640), 12, 80),  # 8 samples do not fill a batch
        (8, {"train_samples": 80}, (20, 80, 1280), 20, 80),  # nothing is left
        (8, {"train_samples": 80}, (0, 0, 0), 10, 80),
        # Tokens, 16 to a sample: a batch that they begin is trained on.
        (8, {"train_tokens": 1280}, (10, 40, 640), 15, 80),
        (2, {"train_tokens": 1280}, (10, 40, 640), 30, 80),
        (8, {"train_tokens": 1281}, (10, 40, 640), 16, 88),
        (8, {"train_tokens": 1280}, (10, 40, 0), 15, 80),  # a checkpoint that does not count them
        (8, {"train_iters": 12}, (10, 40, 640), 12, 56),
        (8, {"train_iters": 100, "train_tokens": 1280}, (10, 40, 640), 15, 80),
    ],
)
def test_last_iteration(batch, given, done, last, reach):
    length = RunLength(BatchSizes(batch), 16, **given)
    assert length.last_iteration(*done) == last
    assert length.samples(*done) == reach


def test_the_schedule_is_made_for_the_same_samples_under_every_batch_size():
    for batch in (2, 4, 8, 16):
        assert RunLength(BatchSizes(batch), 16, train_samples=80).planned_samples == 80
        assert RunLength(BatchSizes(batch), 16, train_tokens=1281).planned_samples == 81
        assert RunLength(BatchSizes(batch), 16, train_iters=10).planned_samples == 10 * batch
