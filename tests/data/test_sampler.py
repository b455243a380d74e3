"""Every sample exactly once, in the same global batches, whatever the ranks and micro batches become."""

import itertools

import numpy as np
import pytest
import torch

from megatron.data.errors import SamplerError
from megatron.data.loader import Collator, build_loader
from megatron.data.sampler import SampleIndexer


def global_batches(num_samples, consumed, gbs, micro_batch_size, dp_size, count):
    """What all ranks together read in each of the next `count` global batches."""
    ranks = [iter(SampleIndexer(num_samples, consumed, micro_batch_size, r, dp_size)) for r in range(dp_size)]
    steps = gbs // (micro_batch_size * dp_size)
    return [[i for _ in range(steps) for rank in ranks for i in next(rank)] for _ in range(count)]


TOPOLOGIES = [(m, d) for m, d in itertools.product((1, 2, 3, 4, 6, 12), (1, 2, 3, 4, 6, 12)) if 12 % (m * d) == 0]


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), TOPOLOGIES)
def test_global_batch_k_is_the_same_samples_everywhere(micro_batch_size, dp_size):
    batches = global_batches(120, 24, 12, micro_batch_size, dp_size, 8)
    assert batches == [list(range(24 + 12 * k, 36 + 12 * k)) for k in range(8)]


def test_there_are_enough_topologies():
    assert len(TOPOLOGIES) >= 15


def test_each_sample_once_across_changes():
    seen, consumed = [], 0
    for (micro_batch_size, dp_size), batches in zip([(1, 12), (3, 2), (2, 3), (12, 1), (1, 1)], (2, 1, 3, 1, 3)):
        for batch in global_batches(120, consumed, 12, micro_batch_size, dp_size, batches):
            seen += batch
            consumed += len(batch)
    assert seen == list(range(120))


def test_ends_before_an_incomplete_step():
    indexer = SampleIndexer(103, 80, 2, 1, 5)
    assert len(indexer) == 2 and list(indexer) == [[82, 83], [92, 93]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 10, 1, 0, 1), "10 consumed of 10"),
        ((10, 0, 0, 0, 1), "micro_batch_size 0"),
        ((10, 0, 1, 2, 2), "dp_rank 2"),
        ((10, -1, 1, 0, 1), "consumed_samples -1"),
        ((10, 0, 1, 0, 0), "dp_size 0"),
    ],
)
def test_impossible_positions(arguments, message):
    with pytest.raises(SamplerError, match=message):
        SampleIndexer(*arguments)


class Rows:
    def __len__(self):
        return 40

    def __getitem__(self, i):
        return {"tokens": np.arange(5, dtype=np.int64) + i}


def test_collator():
    batch = Collator(eod=3, eod_mask_loss=True)(
        [{"tokens": np.array([1, 3, 3, 4])}, {"tokens": np.array([5, 6, 7, 3])}]
    )
    assert batch["tokens"].tolist() == [[1, 3, 3], [5, 6, 7]] and batch["labels"].tolist() == [[3, 3, 4], [6, 7, 3]]
    assert batch["loss_mask"].tolist() == [[1, 0, 0], [1, 1, 1]] and batch["loss_mask"].dtype == torch.float32
    assert all(tensor.is_contiguous() for tensor in batch.values())
    assert Collator()([{"tokens": np.array([1, 3, 4])}])["loss_mask"].tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="eod"):
        Collator(eod_mask_loss=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_keeps_order_and_the_global_random_state(num_workers):
    before = torch.get_rng_state()
    loader = build_loader(Rows(), SampleIndexer(40, 8, 2, 1, 2), Collator(), num_workers)
    first = [batch["tokens"][:, 0].tolist() for batch in loader]
    assert first == [[10, 11], [14, 15], [18, 19], [22, 23], [26, 27], [30, 31], [34, 35], [38, 39]]
    assert torch.equal(before, torch.get_rng_state())
