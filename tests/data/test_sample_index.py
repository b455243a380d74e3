"""Indices against a slow, obvious cutting of the token stream, and C++ against Python."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data import sample_index
from megatron.data.errors import NotEnoughTokensError
from megatron.data.sample_index import build_sample_index, cut_samples_python, plan_epochs


def slow_cut(sizes, document_index, seq_length, num_samples):
    """Write down where every token of the stream lies; sample k begins at token k * seq_length."""
    stream = [(p, o) for p, d in enumerate(document_index) for o in range(sizes[d])]
    return [(0, 0)] + [stream[k * seq_length] for k in range(1, num_samples + 1)]


def megatron_order(num_documents, first, tokens_per_epoch, num_samples, seq_length, seed):
    """Document order and shuffle as Megatron's gpt_dataset.py makes them, step by step."""
    random = np.random.RandomState(seed=seed)
    epochs, total = 0, 0
    while True:
        epochs, total = epochs + 1, total + tokens_per_epoch
        if (total - 1) // seq_length >= num_samples:
            break
    separate = False
    before_last = 0
    if epochs > 1:
        before_last = ((epochs - 1) * tokens_per_epoch - 1) // seq_length
        separate = num_samples - before_last < int(0.80 * ((tokens_per_epoch - 1) // seq_length))

    def documents(count):
        grid = np.mgrid[0:count, 0:num_documents][1]
        grid[:] = np.arange(first, first + num_documents)
        flat = grid.reshape(-1).astype(np.int32)
        random.shuffle(flat)
        return flat

    order = np.concatenate([documents(epochs - 1), documents(1)]) if separate else documents(epochs)
    all_samples = (epochs * tokens_per_epoch - 1) // seq_length
    split = before_last if separate else all_samples
    head, tail = np.arange(split, dtype=np.uint32), np.arange(split, all_samples, dtype=np.uint32)
    random.shuffle(head)
    if len(tail):
        random.shuffle(tail)
    return order, np.concatenate([head, tail]), separate


CASES = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda s: sum(s) > 1),
        "seq_length": st.integers(1, 50),
        "num_samples": st.integers(0, 60),
        "seed": st.integers(0, 2**32 - 1),
    }
)


@settings(max_examples=150, deadline=None)
@given(CASES)
def test_equals_the_obvious_reference(case):
    sizes = np.array(case["sizes"], np.int32)
    index = build_sample_index(sizes, (0, len(sizes)), case["num_samples"], case["seq_length"], case["seed"])
    order, shuffle, _ = megatron_order(
        len(sizes), 0, int(sizes.sum()), case["num_samples"], case["seq_length"], case["seed"]
    )
    assert index.document_index.dtype == np.int32 and index.document_index.tolist() == order.tolist()
    assert index.shuffle_index.dtype == np.uint32 and index.shuffle_index.tolist() == shuffle.tolist()
    assert len(shuffle) >= case["num_samples"]
    expected = slow_cut(sizes, order, case["seq_length"], len(shuffle))
    assert index.sample_index.dtype == np.int32
    assert [tuple(row) for row in index.sample_index.tolist()] == expected


@pytest.mark.skipif(sample_index._index_helpers is None, reason="built without a C++ compiler")
@settings(max_examples=100, deadline=None)
@given(CASES)
def test_cpp_equals_python(case):
    sizes = np.array(case["sizes"], np.int32)
    order = np.random.RandomState(case["seed"]).randint(0, len(sizes), 50).astype(np.int32)
    num_samples = max(int(sizes[order].sum()) - 1, 0) // case["seq_length"]
    arguments = (sizes, order, case["seq_length"], num_samples)
    expected = cut_samples_python(*arguments)
    for build in (sample_index._index_helpers.sample_index_int32, sample_index._index_helpers.sample_index_int64):
        assert np.array_equal(build(*arguments), expected)
    with pytest.raises(IndexError, match="documents end"):
        cut_samples_python(sizes, order, case["seq_length"], num_samples + 1)
    with pytest.raises(IndexError, match="documents end"):
        sample_index._index_helpers.sample_index_int32(sizes, order, case["seq_length"], num_samples + 1)


def test_without_the_extension_the_arrays_are_the_same(monkeypatch):
    sizes = np.random.RandomState(0).randint(0, 900, 500).astype(np.int32)
    with_cpp = build_sample_index(sizes, (10, 400), 5000, 64, 7)
    monkeypatch.setattr(sample_index, "_index_helpers", None)
    without = build_sample_index(sizes, (10, 400), 5000, 64, 7)
    for name in ("document_index", "sample_index", "shuffle_index"):
        a, b = getattr(with_cpp, name), getattr(without, name)
        assert a.dtype == b.dtype and np.array_equal(a, b)
    assert with_cpp.document_index.min() == 10 and with_cpp.document_index.max() == 399


@pytest.mark.parametrize(
    ("num_samples", "epochs", "separate"),
    [(10, 1, False), (11, 2, True), (16, 2, True), (18, 2, False), (20, 2, False), (21, 3, True), (0, 1, False)],
)
def test_last_epoch_rule(num_samples, epochs, separate):
    # 101 tokens, 10 a sample: 10 samples an epoch, 20 in two; 80 % of the last one is 8.
    plan = plan_epochs(101, num_samples, 10)
    assert (plan.num_epochs, plan.is_last_epoch_separate) == (epochs, separate)
    assert plan.num_samples >= num_samples


def test_separate_last_epoch_comes_last():
    sizes = np.full(100, 11, np.int32)
    plan = plan_epochs(1100, 120, 10)
    assert plan.is_last_epoch_separate
    index = build_sample_index(sizes, (0, 100), 120, 10, 3)
    first = plan.num_samples_before_last_epoch
    assert sorted(index.shuffle_index[:first]) == list(range(first))
    assert index.shuffle_index[:first].tolist() != list(range(first))
    assert sorted(index.document_index[:100]) == list(range(100))


def test_no_tokens_is_an_error_and_not_a_loop():
    with pytest.raises(NotEnoughTokensError):
        build_sample_index(np.zeros(3, np.int32), (0, 3), 5, 8, 1)
