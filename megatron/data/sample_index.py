"""Which tokens make sample i: Megatron's document, sample and shuffle indices.

Lay the (shuffled) documents of all epochs end to end, cut a sample every `seq_length` tokens,
shuffle the samples. A sample has seq_length + 1 tokens, so neighbours share one: labels are tokens moved by one.

    index = build_sample_index(sizes, documents=(0, 1871), num_samples=800, seq_length=128, seed=1)
    position, offset = index.sample_index[index.shuffle_index[i]]      # where sample i begins
    document = index.document_index[position]

The arrays equal those of Megatron-LM's GPTDataset (megatron/data/gpt_dataset.py) for the same arguments:
numpy's RandomState, whose stream is frozen, shuffles; when the last epoch is needed only in part, it is
shuffled apart, so that every earlier epoch is seen whole first.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from megatron.data.errors import NotEnoughTokensError

try:
    from megatron.data import _index_helpers  # type: ignore[attr-defined]
except ImportError:  # built without a compiler: the Python below gives the same bits
    _index_helpers = None

logger = logging.getLogger(__name__)

SEPARATE_LAST_EPOCH_BELOW = 0.80
"""The last epoch is shuffled apart when less than this share of its samples is needed (Megatron's rule)."""


@dataclass(frozen=True)
class SampleIndex:
    document_index: np.ndarray
    """int32 [num_epochs * num_documents]: document ids in the order in which they are laid end to end."""
    sample_index: np.ndarray
    """int32 or int64 [n + 1, 2]: (position in document_index, offset in that document) where sample k begins."""
    shuffle_index: np.ndarray
    """uint32 or int64 [n]: sample i of the dataset is sample shuffle_index[i] of sample_index."""


@dataclass(frozen=True)
class EpochPlan:
    """How often the documents are gone through, and whether the last time is shuffled apart."""

    tokens_per_epoch: int
    num_epochs: int
    num_samples: int
    """Of all epochs together: at least as many as were asked for."""
    num_samples_before_last_epoch: int
    is_last_epoch_separate: bool


def plan_epochs(tokens_per_epoch: int, num_samples: int, seq_length: int) -> EpochPlan:
    """The fewest epochs that give `num_samples`. Raises NotEnoughTokensError when there is no token at all."""
    if tokens_per_epoch < 1:
        raise NotEnoughTokensError(
            "the documents hold no token", found="0 tokens", expected="at least 1", do="check --split and the data"
        )
    # n samples need n * seq_length + 1 tokens: neighbours share one.
    num_epochs = max(1, -(-(num_samples * seq_length + 1) // tokens_per_epoch))
    before_last = ((num_epochs - 1) * tokens_per_epoch - 1) // seq_length
    in_last = num_samples - before_last
    per_epoch = (tokens_per_epoch - 1) // seq_length
    return EpochPlan(
        tokens_per_epoch,
        num_epochs,
        (num_epochs * tokens_per_epoch - 1) // seq_length,
        max(before_last, 0),
        num_epochs > 1 and in_last < int(SEPARATE_LAST_EPOCH_BELOW * per_epoch),
    )


def build_sample_index(
    sizes: np.ndarray, documents: tuple[int, int], num_samples: int, seq_length: int, seed: int
) -> SampleIndex:
    """Indices over documents [start, stop) for at least `num_samples` samples. `sizes`: tokens per document."""
    start, stop = documents
    plan = plan_epochs(int(sizes[start:stop].sum(dtype=np.int64)), num_samples, seq_length)
    logger.info(
        "%d samples of %d tokens wanted: %d epochs of %d tokens; the last one is %s",
        num_samples,
        seq_length,
        plan.num_epochs,
        plan.tokens_per_epoch,
        "shuffled apart" if plan.is_last_epoch_separate else "shuffled with the rest",
    )
    random = np.random.RandomState(seed)
    document_index = _document_index(start, stop, plan, random)
    sample_index = cut_samples(sizes, document_index, seq_length, plan.num_samples)
    first = plan.num_samples_before_last_epoch if plan.is_last_epoch_separate else plan.num_samples
    return SampleIndex(document_index, sample_index, _shuffle_index(first, plan.num_samples, random))


def cut_samples(sizes: np.ndarray, document_index: np.ndarray, seq_length: int, num_samples: int) -> np.ndarray:
    """`sample_index` of SampleIndex: [num_samples + 1, 2], by C++ where it is built."""
    wide = len(document_index) > np.iinfo(np.int32).max
    if _index_helpers is None:
        return cut_samples_python(sizes, document_index, seq_length, num_samples)
    build = _index_helpers.sample_index_int64 if wide else _index_helpers.sample_index_int32
    return build(sizes, document_index, seq_length, num_samples)


def cut_samples_python(sizes: np.ndarray, document_index: np.ndarray, seq_length: int, num_samples: int) -> np.ndarray:
    """The same as the C++ version, bit for bit, with a look-up in the running sum of tokens."""
    ends = np.cumsum(sizes[document_index], dtype=np.int64)
    tokens = np.arange(num_samples + 1, dtype=np.int64) * seq_length
    positions = np.searchsorted(ends, tokens, side="right")
    if num_samples and positions[-1] >= len(document_index):
        raise IndexError("the documents end before the last sample")
    dtype = np.int64 if len(document_index) > np.iinfo(np.int32).max else np.int32
    result = np.zeros((num_samples + 1, 2), dtype)
    result[1:, 0] = positions[1:]
    result[1:, 1] = tokens[1:] - (ends[positions[1:]] - sizes[document_index[positions[1:]]])
    return result


def _document_index(start: int, stop: int, plan: EpochPlan, random: np.random.RandomState) -> np.ndarray:
    once = np.arange(start, stop, dtype=np.int32)
    if not plan.is_last_epoch_separate:
        index = np.tile(once, plan.num_epochs)
        random.shuffle(index)
        return index
    first = np.tile(once, plan.num_epochs - 1)
    random.shuffle(first)
    random.shuffle(once)
    return np.concatenate((first, once))


def _shuffle_index(first: int, total: int, random: np.random.RandomState) -> np.ndarray:
    """[0, first) shuffled, then [first, total) shuffled."""
    dtype = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    head = np.arange(first, dtype=dtype)
    random.shuffle(head)
    if first == total:
        return head
    tail = np.arange(first, total, dtype=dtype)
    random.shuffle(tail)
    return np.concatenate((head, tail))
