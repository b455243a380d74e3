"""Blending proportions, C++ against Python, --data-path and --split as typed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data import blending
from megatron.data.blending import blending_index, blending_index_python, parse_data_path, samples_needed
from megatron.data.errors import BlendError, SplitError
from megatron.data.split import parse_split, split_documents

WEIGHTS = st.lists(st.integers(1, 1000), min_size=1, max_size=6).map(lambda w: [x / sum(w) for x in w])


def test_first_samples_by_hand():
    # lag = weight * max(i, 1) - given; ties go to the first.
    datasets, samples = blending_index([0.25, 0.75], 8)
    assert datasets.tolist() == [1, 0, 1, 1, 0, 1, 1, 1]
    assert samples.tolist() == [0, 0, 1, 2, 1, 3, 4, 5]


@settings(max_examples=50, deadline=None)
@given(WEIGHTS, st.integers(0, 300))
def test_proportions_hold_all_along(weights, num_samples):
    datasets, samples = blending_index(weights, num_samples)
    for d, weight in enumerate(weights):
        mine = datasets == d
        assert samples[mine].tolist() == list(range(mine.sum()))
        given_so_far = np.cumsum(mine)
        assert np.all(np.abs(given_so_far - weight * np.arange(1, num_samples + 1)) <= len(weights))
    needed = samples_needed(weights, datasets, num_samples)
    assert all(n >= (datasets == d).sum() for d, n in enumerate(needed))


@pytest.mark.skipif(blending._index_helpers is None, reason="built without a C++ compiler")
@settings(max_examples=50, deadline=None)
@given(WEIGHTS, st.integers(0, 500))
def test_cpp_equals_python(weights, num_samples):
    for a, b in zip(blending_index(weights, num_samples), blending_index_python(weights, num_samples)):
        assert a.dtype == b.dtype and np.array_equal(a, b)


def test_data_path():
    assert [(e.prefix, e.weight) for e in parse_data_path(["a"])] == [("a", 1.0)]
    assert [(e.prefix, e.weight) for e in parse_data_path(["my data/a"])] == [("my data/a", 1.0)]
    for words in (["1", "a", "3", "b"], ["1 a 3 b"], ["1 a", "3 b"], [" 1  a 3 b "], ["0", "c", "1", "a", "3", "b"]):
        assert [(e.prefix, e.weight) for e in parse_data_path(words)] == [("a", 0.25), ("b", 0.75)]
    assert [e.prefix for e in parse_data_path(["0", "a", "1", "b"])] == ["b"]


@pytest.mark.parametrize("words", [["a", "b"], ["1", "a", "2"], ["0", "a"], ["-1", "a", "2", "b"], ["nan", "a"], [""]])
def test_bad_data_path(words):
    with pytest.raises(BlendError, match="--data-path"):
        parse_data_path(words)


def test_split_as_megatron_rounds():
    assert split_documents("949,50,1", 1972) == [(0, 1871), (1871, 1970), (1970, 1972)]
    assert split_documents("969,30,1", 10) == [(0, 10), (10, 10), (10, 10)]
    assert split_documents("90/10", 10) == [(0, 9), (9, 10), (10, 10)]
    assert split_documents("100", 7) == [(0, 7), (7, 7), (7, 7)]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=3).filter(any), st.integers(0, 3000))
def test_split_covers_every_document_once(weights, num_documents):
    parts = split_documents(",".join(map(str, weights)), num_documents)
    assert parts[0][0] == 0 and parts[-1][1] == num_documents
    assert all(a[1] == b[0] and a[0] <= a[1] for a, b in zip(parts, parts[1:] + [(num_documents,) * 2]))


@pytest.mark.parametrize("text", ["", "0,0,0", "1,2,3,4", "a,b", "-1,2", "nan,1", "inf", "1;2"])
def test_bad_split(text):
    with pytest.raises(SplitError, match="949,50,1"):
        parse_split(text)
