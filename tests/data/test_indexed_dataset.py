"""The .bin/.idx format against bytes written by hand, and every way in which a pair can be broken."""

import pickle
import struct

import numpy as np
import pytest

from megatron.data.errors import CorruptDatasetError, DatasetExistsError, MissingDatasetError, TokenRangeError
from megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, best_dtype

# Two documents, [1, 2, 65535] and [7], as Megatron writes them with uint16: byte for byte from the format.
GOLDEN_BIN = bytes.fromhex("0100 0200 ffff 0700".replace(" ", ""))
GOLDEN_IDX = bytes.fromhex(
    (
        "4d4d49444944580000"  # MMIDIDX\0\0
        "0100000000000000"  # version 1
        "08"  # uint16
        "0200000000000000"  # 2 sequences
        "0300000000000000"  # 3 entries in the document index
        "03000000 01000000"  # sizes
        "0000000000000000 0600000000000000"  # byte offsets
        "0000000000000000 0100000000000000 0200000000000000"  # document index
    ).replace(" ", "")
)


@pytest.fixture
def golden(tmp_path):
    (tmp_path / "g.bin").write_bytes(GOLDEN_BIN)
    (tmp_path / "g.idx").write_bytes(GOLDEN_IDX)
    return tmp_path / "g"


def test_reads_bytes_of_the_format(golden):
    dataset = IndexedDataset(golden)
    assert len(dataset) == 2 and dataset.num_tokens == 4 and dataset.dtype == np.uint16
    assert dataset[0].tolist() == [1, 2, 65535] and dataset[1].tolist() == [7]
    assert dataset.get(0, offset=1, length=1).tolist() == [2]
    assert dataset.document_index.tolist() == [0, 1, 2]


def test_writes_bytes_of_the_format(tmp_path):
    with IndexedDatasetWriter(tmp_path / "w", np.uint16) as writer:
        writer.add_document([1, 2, 65535])
        writer.add_document(np.array([7]))
    assert (tmp_path / "w.bin").read_bytes() == GOLDEN_BIN
    assert (tmp_path / "w.idx").read_bytes() == GOLDEN_IDX
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.bin", "w.idx"]


def test_other_dtype_and_several_sequences_a_document(tmp_path):
    with IndexedDatasetWriter(tmp_path / "w", np.int32) as writer:
        writer.add_sequence([70000])
        writer.add_sequence([-1, 2])
        writer.end_document()
        writer.add_document([])
    dataset = IndexedDataset(tmp_path / "w")
    assert [dataset[i].tolist() for i in range(3)] == [[70000], [-1, 2], []]
    assert dataset.document_index.tolist() == [0, 2, 3]
    raw = (tmp_path / "w.idx").read_bytes()
    assert raw[17] == 4 and raw[18:34] == struct.pack("<QQ", 3, 3)
    assert raw[34:46] == struct.pack("<iii", 1, 2, 0) and raw[46:70] == struct.pack("<qqq", 0, 4, 12)


def test_empty_dataset(tmp_path):
    with IndexedDatasetWriter(tmp_path / "w"):
        pass
    assert len(IndexedDataset(tmp_path / "w")) == 0


def test_pickles_by_name(golden):
    data = pickle.dumps(IndexedDataset(golden))
    assert len(data) < 500
    assert pickle.loads(data)[0].tolist() == [1, 2, 65535]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(50257, "uint16"), (65500, "int32"), (None, "int32")])
def test_best_dtype_is_megatrons(vocab_size, dtype):
    assert best_dtype(vocab_size) == np.dtype(dtype)


def _changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


BROKEN_IDX = {
    "magic": (_changed(GOLDEN_IDX, 0, b"TNTIDX\0\0"), "not an index file"),
    "empty": (b"", "not an index file"),
    "version": (_changed(GOLDEN_IDX, 9, b"\x02"), "another version"),
    "dtype": (_changed(GOLDEN_IDX, 17, b"\x06"), "no integer type"),
    "cut-in-header": (GOLDEN_IDX[:20], "cut short"),
    "cut-in-arrays": (GOLDEN_IDX[:-1], "cut short"),
    "too-long": (GOLDEN_IDX + b"\0", "too long"),
    "count": (_changed(GOLDEN_IDX, 18, b"\x03"), "cut short"),
    "size": (_changed(GOLDEN_IDX, 34, b"\x02"), "contradicts itself"),
    "negative-size": (_changed(GOLDEN_IDX, 34, b"\xff\xff\xff\xff"), "contradicts itself"),
    "pointer": (_changed(GOLDEN_IDX, 50, b"\x04"), "contradicts itself"),
    "documents": (_changed(GOLDEN_IDX, 66, b"\x05"), "document index"),
}


@pytest.mark.parametrize("name", BROKEN_IDX)
def test_broken_idx_is_named(golden, name):
    data, message = BROKEN_IDX[name]
    golden.with_suffix(".idx").write_bytes(data)
    with pytest.raises(CorruptDatasetError, match=message) as caught:
        IndexedDataset(golden)
    text = str(caught.value)
    assert all(part in text for part in ("found:", "expected:", "g.idx", "what to do:"))


@pytest.mark.parametrize(
    ("data", "message"), [(GOLDEN_BIN[:-2], "cut short"), (GOLDEN_BIN + b"\0\0", "longer"), (b"", "cut short")]
)
def test_broken_bin_is_named(golden, data, message):
    golden.with_suffix(".bin").write_bytes(data)
    with pytest.raises(CorruptDatasetError, match=message) as caught:
        IndexedDataset(golden)
    assert f"{len(data)} bytes" in str(caught.value) and "8 bytes (4 tokens" in str(caught.value)


def test_missing_files_are_named(golden):
    with pytest.raises(MissingDatasetError, match="without the ending"):
        IndexedDataset(f"{golden}.bin")
    golden.with_suffix(".bin").rename(golden.with_name("p_text_document.bin"))
    with pytest.raises(MissingDatasetError) as caught:
        IndexedDataset(golden)
    assert "no " + str(golden) + ".bin" in str(caught.value) and f"and no {golden}.idx" not in str(caught.value)
    golden.with_suffix(".idx").rename(golden.with_name("p_text_document.idx"))
    with pytest.raises(MissingDatasetError, match="whole prefix: .*p_text_document"):
        IndexedDataset(golden.with_name("p"))


def test_nothing_is_left_when_writing_fails(tmp_path):
    with pytest.raises(RuntimeError, match="planted"), IndexedDatasetWriter(tmp_path / "w") as writer:
        writer.add_document([1])
        raise RuntimeError("planted")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(golden):
    with pytest.raises(DatasetExistsError, match=r"g\.bin"):
        IndexedDatasetWriter(golden)
    with IndexedDatasetWriter(golden, overwrite=True) as writer:
        writer.add_document([5])
    assert IndexedDataset(golden)[0].tolist() == [5]


@pytest.mark.parametrize("tokens", [[65536], [-1], np.array([1.5]), np.array([70000], np.int64)])
def test_tokens_that_do_not_fit_are_refused(tmp_path, tokens):
    with pytest.raises(TokenRangeError, match="does not fit"), IndexedDatasetWriter(tmp_path / "w") as writer:
        writer.add_document(tokens)
    assert not list(tmp_path.iterdir())


def test_a_file_being_written_is_no_dataset(tmp_path):
    writer = IndexedDatasetWriter(tmp_path / "w")
    writer.add_document([1])
    assert [p.suffix for p in tmp_path.iterdir()] == [".tmp"]
    with pytest.raises(MissingDatasetError):
        IndexedDataset(tmp_path / "w")
    writer.__exit__(None, None, None)
    assert IndexedDataset(tmp_path / "w")[0].tolist() == [1]
