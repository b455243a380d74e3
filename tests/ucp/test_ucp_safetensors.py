"""Our reader and writer of .safetensors against the library that defines the format, also on files that are wrong."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from megatron.ucp.errors import CorruptFileError
from megatron.ucp.execute import rounded
from megatron.ucp.safetensors_file import read_safetensors, write_safetensors
from megatron.ucp.stored import DTYPES, StoredTensor
from megatron.ucp.torch_file import StreamedTensor

TENSORS = {
    "weights.0": torch.arange(12, dtype=torch.float32).view(3, 4),
    "half": torch.linspace(-2, 2, 7).bfloat16(),
    "other half": torch.linspace(-2, 2, 5).half(),
    "a number": torch.tensor(3, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False]),
    "bytes": torch.arange(3, dtype=torch.uint8),
}


def as_file(path, entries, num_bytes=48, header=None):
    raw = header if header is not None else json.dumps(entries).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(num_bytes))
    return path


def is_read_by_the_library(path):
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                file.get_tensor(name)
    except (SafetensorError, OSError, ValueError):
        return False
    return True


def test_what_the_library_writes_we_read(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors", {"format": "pt"})
    found = read_safetensors(tmp_path / "a.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].shape == tuple(tensor.shape)
        assert torch.equal(found[name].to_torch(), tensor)


def test_what_we_write_the_library_reads(tmp_path):
    def streamed(tensor):
        held = StoredTensor.of_torch(tensor)
        return StreamedTensor(held.shape, held.dtype, lambda record: record.write(held.array()))

    path = tmp_path / "a.safetensors"
    info = write_safetensors(path, {name: streamed(t) for name, t in TENSORS.items()}, {"format": "pt"})
    found = load_file(path)
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    from megatron.ucp.commit import checksum_file

    assert info == checksum_file(path)
    with pytest.raises(ValueError, match="bytes written of 16"):
        write_safetensors(path, {"w": StreamedTensor((4,), DTYPES["float32"], lambda record: None)}, {})


ENTRY = {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}
WRONG = {
    "no file of tensors": b"PK\3\4 and more of it",
    "empty": b"",
    "a header longer than the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "no JSON": (4).to_bytes(8, "little") + b"{{{{",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "not Unicode": (4).to_bytes(8, "little") + b'"\xff\xfe"',
    "nested": (20000).to_bytes(8, "little") + b"[" * 10000 + b"]" * 10000,
}
WRONG_ENTRIES = {
    "more than the file has": {"data_offsets": [0, 52], "shape": [13]},
    "fewer bytes than elements": {"data_offsets": [0, 44]},
    "backwards": {"data_offsets": [48, 0]},
    "negative": {"data_offsets": [-48, 0]},
    "one offset": {"data_offsets": [0]},
    "a shape of text": {"shape": ["3", "4"]},
    "a negative shape": {"shape": [-3, -4]},
    "a giant shape": {"shape": [1 << 40, 1 << 40]},
    "a type that nobody knows": {"dtype": "F33"},
    "a type that is a list": {"dtype": ["F32"]},
    "numbers with a point": {"shape": [3.0, 4]},
    "true": {"shape": [True, 12]},
}


@pytest.mark.parametrize("what", WRONG)
def test_files_that_are_none(what, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(WRONG[what])
    assert not is_read_by_the_library(path)
    with pytest.raises(CorruptFileError, match=r"no \.safetensors file"):
        read_safetensors(path)


@pytest.mark.parametrize("what", WRONG_ENTRIES)
def test_entries_that_are_none(what, tmp_path):
    path = as_file(tmp_path / "a.safetensors", {"w": {**ENTRY, **WRONG_ENTRIES[what]}})
    assert not is_read_by_the_library(path)
    with pytest.raises(CorruptFileError, match="w: "):
        read_safetensors(path)


def test_all_entries_that_are_wrong_are_named(tmp_path):
    entries = {name: {**ENTRY, **change} for name, change in WRONG_ENTRIES.items()}
    with pytest.raises(CorruptFileError, match=rf"{len(entries)} fault") as error:
        read_safetensors(as_file(tmp_path / "a.safetensors", entries))
    assert all(name in str(error.value) for name in list(entries)[:3])


def test_two_tensors_in_one_place_and_one_name_twice(tmp_path):
    other = {"dtype": "F32", "shape": [2], "data_offsets": [40, 48]}
    with pytest.raises(CorruptFileError, match="w and z lie in the same bytes"):
        read_safetensors(as_file(tmp_path / "a.safetensors", {"w": ENTRY, "z": other}))
    double = b'{"w": ' + json.dumps(ENTRY).encode() + b', "w": ' + json.dumps(ENTRY).encode() + b"}"
    with pytest.raises(CorruptFileError, match="twice"):
        read_safetensors(as_file(tmp_path / "a.safetensors", {}, header=double))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_bytes_that_changed(tmp_path_factory, data):
    """What is read of a damaged file the library reads too, and the same; nothing else comes out than our error."""
    folder = tmp_path_factory.mktemp("damaged")
    save_file({"a": TENSORS["weights.0"], "b": TENSORS["half"]}, folder / "a.safetensors")
    raw = bytearray((folder / "a.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.sampled_from([raw[place] ^ 1, 0, 255, ord("9"), ord("]"), ord('"')]))
    raw = raw[: data.draw(st.sampled_from([len(raw), len(raw) - 1, 20]))]
    path = folder / "a.safetensors"
    path.write_bytes(raw)
    try:
        found = read_safetensors(path)
    except CorruptFileError:
        return
    if not is_read_by_the_library(path):
        return  # it asks for more: no holes between tensors, metadata of text
    expected = load_file(path)
    for name, tensor in found.items():
        assert torch.equal(tensor.to_torch().view(torch.uint8), expected[name].view(torch.uint8))


def test_rounding_is_torchs():
    bits = np.arange(1 << 16, dtype=np.uint32)
    # Every upper half of a number with lower halves around the middle: ties, carries, infinities, not-a-numbers.
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = ((bits << np.uint32(16)) | np.uint32(low)).view(np.float32)
        for name in ("bfloat16", "float16"):
            expected = torch.from_numpy(values.copy()).to(getattr(torch, name))
            found = torch.from_numpy(rounded(values, DTYPES[name]).copy()).view(expected.dtype)
            is_nan = expected.isnan()
            assert torch.equal(found[~is_nan].view(torch.int16), expected[~is_nan].view(torch.int16))
            assert bool(found[is_nan].isnan().all())
