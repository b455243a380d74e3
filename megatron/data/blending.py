"""Several datasets as one, in proportion to weights: "--data-path 0.3 books 0.7 web".

Megatron's rule: each next sample comes from the dataset that lags most behind its weight, so
the proportions hold at every point of the run, not only at its end.

    dataset_index, sample_index = blending_index([0.3, 0.7], 10)      # sample i is datasets[d][s]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron.data.errors import BlendError

try:
    from megatron.data import _index_helpers  # type: ignore[attr-defined]
except ImportError:  # built without a compiler: the Python below gives the same bits
    _index_helpers = None

SPARE = 1.005
"""Every dataset is built with 0.5 % more samples than its share, as in Megatron."""


@dataclass(frozen=True)
class BlendEntry:
    prefix: str
    weight: float
    """Share of the samples; the weights of a blend sum to 1."""


def parse_data_path(paths: Sequence[str]) -> tuple[BlendEntry, ...]:
    """--data-path: one prefix, or weight prefix weight prefix ..., as words of their own or quoted together. Weights
    are in proportion to each other; a dataset of weight 0 is left out, as if it were not there."""
    words = list(paths)
    parts = " ".join(words).split()
    if len(parts) > len(words) and _is_blend(parts):  # otherwise a blank belongs to a path
        words = parts
    if len(words) == 1 and words[0].strip():
        return (BlendEntry(words[0], 1.0),)
    weights = [_weight(word) or 0.0 for word in words[::2]]
    if not words or not _is_blend(words) or not 0 < sum(weights) < math.inf:
        raise BlendError(
            "--data-path is neither one prefix nor pairs of weight and prefix",
            found=" ".join(words) or "nothing",
            expected="one prefix, or a weight >= 0 before each prefix, not all 0",
            where="--data-path",
            do="for example --data-path 0.3 books_text_document 0.7 web_text_document",
        )
    entries = [BlendEntry(prefix, w / sum(weights)) for prefix, w in zip(words[1::2], weights)]
    return tuple(entry for entry in entries if entry.weight > 0)


def blending_index(weights: Sequence[float], num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """For every sample: which dataset (int16) and which of its samples (int64). `weights` sum to 1."""
    if _index_helpers is None:
        return blending_index_python(weights, num_samples)
    return _index_helpers.blending_index(np.asarray(weights, np.float64), num_samples)


def blending_index_python(weights: Sequence[float], num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The same as the C++ version, bit for bit."""
    weights = [float(weight) for weight in weights]
    given = [0] * len(weights)
    dataset_index = np.empty(num_samples, np.int16)
    sample_index = np.empty(num_samples, np.int64)
    for i in range(num_samples):
        wanted_total = max(float(i), 1.0)
        lags = [weight * wanted_total - count for weight, count in zip(weights, given)]
        best = lags.index(max(lags))
        dataset_index[i], sample_index[i] = best, given[best]
        given[best] += 1
    return dataset_index, sample_index


def samples_needed(weights: Sequence[float], dataset_index: np.ndarray, num_samples: int) -> list[int]:
    """How many samples each dataset is built with: Megatron's share plus spare, and never fewer than are drawn."""
    drawn = np.bincount(dataset_index, minlength=len(weights))
    return [max(math.ceil(num_samples * w * SPARE), int(n)) for w, n in zip(weights, drawn)]


class BlendedDataset:
    """`num_samples` samples drawn from several datasets. Pickles as what it was made of."""

    def __init__(self, datasets: Sequence, weights: Sequence[float], num_samples: int):
        self.datasets, self._weights, self._num_samples = list(datasets), list(weights), num_samples
        self.dataset_index, self.sample_index = blending_index(weights, num_samples)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if not 0 <= i < self._num_samples:
            raise IndexError(f"sample {i} of {self._num_samples}")
        return self.datasets[self.dataset_index[i]][int(self.sample_index[i])]

    def __reduce__(self):
        return type(self), (self.datasets, self._weights, self._num_samples)


def _is_blend(words: Sequence[str]) -> bool:
    return len(words) % 2 == 0 and all(_weight(word) is not None for word in words[::2])


def _weight(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
