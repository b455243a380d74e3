"""Samples as a trainer sees them: content, determinism, blends, splits, and what is refused."""

import pickle

import numpy as np
import pytest

from megatron.data.blending import BlendedDataset
from megatron.data.errors import (
    IndexCacheError,
    MissingDatasetError,
    NotEnoughTokensError,
    SplitError,
    VocabularyMismatchError,
)
from megatron.data.gpt_dataset import build_datasets, check_vocabulary
from megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter

SEQ = 16


def make(prefix, sizes, first=0):
    """Document d of size n is first + 1000 * d, + 1, ...: each token says where it comes from."""
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for d, n in enumerate(sizes):
            writer.add_document(np.arange(n) + 1000 * d + first)
    return str(prefix)


@pytest.fixture
def prefix(tmp_path):
    return make(tmp_path / "data", np.random.RandomState(1).randint(0, 60, 40))


def test_every_token_of_an_epoch_once_and_in_order(prefix, tmp_path):
    (train, valid, test) = build_datasets([prefix], "100,0,0", SEQ, 5, (1, 4, 4), tmp_path / "cache")
    assert valid is None and test is None
    indexed = IndexedDataset(prefix)
    stream = np.concatenate([indexed[d] for d in train.index.document_index])
    unshuffled = np.empty((len(train), SEQ + 1), np.int64)
    for i, k in enumerate(train.index.shuffle_index):
        unshuffled[k] = train[i]["tokens"]
    for k, row in enumerate(unshuffled):
        assert row.tolist() == stream[k * SEQ : (k + 1) * SEQ + 1].tolist()
    assert (len(train) + 1) * SEQ + 1 > len(stream)


def test_parts_do_not_share_documents(prefix, tmp_path):
    parts = build_datasets([prefix], "70,20,10", SEQ, 5, (30, 10, 5), tmp_path / "cache")
    seen = [{int(t) // 1000 for i in range(len(part)) for t in part[i]["tokens"]} for part in parts]
    assert all(seen) and not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert max(seen[0]) < min(seen[1]) and max(seen[1]) < min(seen[2])


def test_order_depends_on_the_seed_and_nothing_hidden(prefix, tmp_path):
    def read(seed, cache):
        train = build_datasets([prefix], "90,5,5", SEQ, seed, (100, 0, 0), tmp_path / cache)[0]
        return np.stack([train[i]["tokens"] for i in range(100)])

    assert np.array_equal(read(1, "a"), read(1, "b")) and np.array_equal(read(1, "a"), read(1, "a"))
    assert not np.array_equal(read(1, "a"), read(2, "a"))


def test_pickles_small_and_reads_the_same(prefix, tmp_path):
    other = make(tmp_path / "other", [500], 10**6)
    train = build_datasets(["0.5", prefix, "0.5", other], "1,0,0", SEQ, 1, (5000, 0, 0), tmp_path / "cache")[0]
    data = pickle.dumps(train)
    assert len(data) < 5000
    copy = pickle.loads(data)
    assert all(np.array_equal(copy[i]["tokens"], train[i]["tokens"]) for i in range(0, 5000, 97))


def test_blend_takes_from_each_by_weight(prefix, tmp_path):
    other = make(tmp_path / "other", [300, 400], 10**6)
    for paths in ([f"1 {prefix} 3 {other}"], ["1", prefix, "3", other]):
        train, valid, _ = build_datasets(paths, "1,1,0", SEQ, 1, (400, 8, 0), tmp_path / "cache")
        assert isinstance(train, BlendedDataset) and (len(train), len(valid)) == (400, 8)
        from_other = [bool(train[i]["tokens"][0] >= 10**6) for i in range(400)]
        assert sum(from_other) == 300
        assert all(abs(sum(from_other[:n]) - 0.75 * n) <= 1 for n in range(1, 401))
        # Each dataset's own samples are taken in its own order, none left out.
        assert train.sample_index[np.array(from_other)].tolist() == list(range(300))


def test_index_out_of_range(prefix, tmp_path):
    train = build_datasets([prefix], "1", SEQ, 1, (5, 0, 0), tmp_path / "cache")[0]
    for i in (-1, len(train)):
        with pytest.raises(IndexError):
            train[i]


def test_missing_prefix_in_a_blend(prefix, tmp_path):
    with pytest.raises(MissingDatasetError, match="nowhere"):
        build_datasets(["1", prefix, "1", str(tmp_path / "nowhere")], "1", SEQ, 1, (5, 0, 0))


def test_split_without_documents(prefix):
    with pytest.raises(SplitError, match="no document for test") as caught:
        build_datasets([prefix], "989,10,1", SEQ, 1, (5, 0, 5))
    assert "40 documents" in str(caught.value) and "--eval-iters" in str(caught.value)


def test_documents_without_tokens(tmp_path):
    with pytest.raises(NotEnoughTokensError, match="train documents hold no token"):
        build_datasets([make(tmp_path / "e", [0, 0])], "1", SEQ, 1, (5, 0, 0))


def test_another_vocabulary_is_caught(prefix, tmp_path):
    top = int(IndexedDataset(prefix).tokens.max())
    build_datasets([prefix], "1", SEQ, 1, (5, 0, 0), tmp_path / "cache", vocab_size=top + 1)
    with pytest.raises(VocabularyMismatchError) as caught:
        build_datasets([prefix], "1", SEQ, 1, (5, 0, 0), tmp_path / "cache", vocab_size=top)
    assert str(top) in str(caught.value) and f"0 to {top - 1}" in str(caught.value)


def test_another_vocabulary_is_caught_in_a_sample(prefix, tmp_path):
    train = build_datasets([prefix], "1", SEQ, 1, (5, 0, 0), tmp_path / "cache")[0]
    train.vocab_size = 10
    with pytest.raises(VocabularyMismatchError, match="sample 3"):
        train[3]


def test_negative_ids_are_caught(tmp_path):
    with IndexedDatasetWriter(tmp_path / "n", np.int32) as writer:
        writer.add_document([3, -2])
    with pytest.raises(VocabularyMismatchError, match="-2"):
        check_vocabulary(IndexedDataset(tmp_path / "n"), 100)


def test_cache_beside_the_data_or_in_memory(prefix, tmp_path):
    arguments = ([prefix], "1", SEQ, 1, (5, 0, 0))
    train = build_datasets(*arguments)[0]
    assert list((tmp_path / "data.index_cache").glob("train-*.index"))
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    with pytest.raises(IndexCacheError, match="--data-cache-path"):
        build_datasets(*arguments, cache_dir=blocked)
    for file in (tmp_path / "data.index_cache").iterdir():
        file.unlink()
    (tmp_path / "data.index_cache").rmdir()
    (tmp_path / "data.index_cache").write_text("")
    in_memory = build_datasets(*arguments)[0]
    assert np.array_equal(in_memory.index.sample_index, train.index.sample_index)
