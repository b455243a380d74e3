"""The reader without torch finds in a file what torch finds, and leaves to torch whatever is not ordinary."""

import argparse
import io
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.utils.tensor_fragment import fragment_address
from ucp.synthetic import make_state, model, write_native

from megatron.ucp.errors import CorruptFileError
from megatron.ucp.inert import FragmentAddress, Inert
from megatron.ucp.ordinary_file import NotOrdinary, read_ordinary
from megatron.ucp.safe_load import load
from megatron.ucp.sources.source import FileCache
from megatron.ucp.stored import DTYPES, DType, StoredTensor, are_equal, is_rounded
from megatron.ucp.topology import Topology
from megatron.ucp.torch_file import save_streamed

ROOT = Path(__file__).resolve().parents[2]


def assert_same(ours: Any, theirs: Any) -> None:
    """`theirs`: torch's. In values, types and shapes, all the way down."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, StoredTensor), type(ours)
        layout = tuple(theirs.shape), theirs.stride(), theirs.storage_offset()
        assert (ours.shape, ours.strides, ours.offset) == layout
        assert str(ours.dtype) == str(theirs.dtype) and ours.numel() == theirs.numel()
        expected = theirs.detach().reshape(-1).contiguous()
        for found in (ours.to_torch().reshape(-1), ours.flat().to_torch()):
            assert not len(expected) or torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    elif isinstance(theirs, torch.dtype):
        assert isinstance(ours, DType) and str(ours) == str(theirs)
    elif isinstance(theirs, torch.Size):
        assert type(ours).__name__ == "Size" and tuple(ours) == tuple(theirs)
    elif isinstance(theirs, (Inert, argparse.Namespace)):
        assert type(ours) is type(theirs)
        assert_same(vars(ours), vars(theirs))
    elif isinstance(theirs, dict):
        assert type(ours) is type(theirs) and list(ours) == list(theirs)
        for key, value in theirs.items():
            assert_same(ours[key], value)
    elif isinstance(theirs, (list, tuple)):
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert type(ours) is type(theirs) and ours == theirs


def everything() -> dict[str, Any]:
    shared = torch.arange(12.0)
    metadata = OrderedDict(weight=torch.ones(2))
    metadata._metadata = {"": {"version": 1}}
    address = fragment_address(numel=3, start=5)
    return {
        **{name: torch.ones(5).to(getattr(torch, name)) for name in DTYPES},
        "numbers": [1, -1, 255, 65536, 2**31, 2**40, -(2**70), 0.5, float("inf"), True, False, None],
        "text": ["", "ä€", "x" * 300, b"".decode()],
        "views": [shared, shared[3:7], shared.view(3, 4).t(), shared[::2], shared[:0], torch.tensor(2.5)],
        "strange": [torch.zeros(3, 0, 2), torch.full((2,), float("nan")), torch.nn.Parameter(torch.ones(2, 2))],
        "state dict": metadata,
        "shape": torch.Size((2, 3)),
        "dtype": torch.bfloat16,
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "address": {"w": address, "again": address},
        "scaler": LossScaler(512.0),
        "args": argparse.Namespace(a=1, b=[2, 3]),
        7: {8: "numbers as keys"},
    }


def test_it_finds_what_torch_finds(tmp_path):
    content = everything()
    torch.save(content, tmp_path / "x.pt")
    ours = read_ordinary(tmp_path / "x.pt")
    theirs = load(tmp_path / "x.pt")
    assert_same(ours, theirs)
    assert ours["address"]["w"] is ours["address"]["again"] and isinstance(ours["address"]["w"], FragmentAddress)
    assert ours["views"][0].storage is not None and vars(ours["state dict"])["_metadata"] == {"": {"version": 1}}


def test_what_it_read_can_be_written_again(tmp_path):
    torch.save(everything(), tmp_path / "x.pt")
    save_streamed(read_ordinary(tmp_path / "x.pt"), tmp_path / "y.pt")
    first, second = load(tmp_path / "x.pt"), load(tmp_path / "y.pt")
    assert list(first) == list(second) and second["dtype"] is torch.bfloat16 and second["shape"] == torch.Size((2, 3))
    for name in DTYPES:
        assert torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype
    for one, other in zip(first["views"], second["views"], strict=True):
        assert torch.equal(one, other)
    assert second["scaler"].cur_scale == 512.0 and second["args"].b == [2, 3] and second["address"]["w"].start == 5


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_files_of_checkpoints_are_ordinary(zero_stage, tmp_path):
    write_native(tmp_path / "n", make_state(model()), Topology(dp_size=2), zero_stage)
    paths = sorted((tmp_path / "n").glob("*.pt"))
    for path in paths:
        assert_same(read_ordinary(path), load(path))
    assert paths


class _Runs:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


class _Attribute:
    """An OrderedDict whose `items` is something else."""

    def __reduce__(self):
        return OrderedDict, (), {"items": 1}


UNUSUAL = {
    "code": _Runs(),
    "an attribute that hides a method": _Attribute(),
    "numpy": np.arange(3),
    "a path": Path("x"),
    "bytes": b"raw",
    "a set": {1, 2},
    "sparse": torch.eye(3).to_sparse(),
    "meta": torch.zeros(3, device="meta"),
    "float8": torch.ones(3).to(torch.float8_e4m3fn),
    "a device": torch.device("cpu"),
    "conjugated": torch.ones(3, dtype=torch.complex64).conj(),
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_what_is_unusual_is_left_to_torch(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"value": UNUSUAL[what]}, tmp_path / "x.pt")
    with pytest.raises(NotOrdinary):
        read_ordinary(tmp_path / "x.pt")
    assert not (tmp_path / "it-ran").exists()


NO_STATES = {
    "complex numbers": torch.ones(3, dtype=torch.complex64),
    "truth values": torch.ones(3, dtype=torch.bool),
    "a meta tensor": torch.ones(3, device="meta"),
    "a sparse one": torch.eye(3).to_sparse(),
    "an endless one": torch.ones(1).expand(1 << 40),
    "a number": 1.0,
    "nothing": None,
}


@pytest.mark.parametrize("what", NO_STATES)
def test_what_cannot_be_a_state_is_refused_by_its_place(what, tmp_path):
    torch.save({"held": [NO_STATES[what], torch.ones(3)]}, tmp_path / "x.pt")
    cache = FileCache()
    with pytest.raises(CorruptFileError, match=r"x\.pt") as caught:
        cache.tensor(tmp_path / "x.pt", ("held", 0))
    assert "held / 0" in str(caught.value)
    assert cache.tensor(tmp_path / "x.pt", ("held", 1)).numel() == 3


def archive(path: Path, pickled: bytes, records: dict[str, bytes] | None = None, **options: Any) -> None:
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, content in {"data.pkl": pickled, **(records or {})}.items():
            file.writestr(f"x/{name}", content)


def tensor_pickle(storage: tuple, offset: Any = 0, shape: Any = (2,), strides: Any = (1,)) -> bytes:
    """Of one tensor, with what a file may say instead."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, value: Any) -> Any:
            return storage if value is storage else None

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (storage, offset, shape, strides, False, OrderedDict())

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(Tensor())
    return buffer.getvalue()


FLOATS = ("storage", torch.FloatStorage, "0", "cpu", 2)
WRONG = {
    "a longer storage": tensor_pickle(("storage", torch.FloatStorage, "0", "cpu", 3)),
    "no record": tensor_pickle(("storage", torch.FloatStorage, "9", "cpu", 2)),
    "another record": tensor_pickle(("storage", torch.FloatStorage, "../../data.pkl", "cpu", 2)),
    "negative": tensor_pickle(("storage", torch.FloatStorage, "0", "cpu", -2)),
    "no number": tensor_pickle(("storage", torch.FloatStorage, "0", "cpu", 2.0)),
    "no storage": tensor_pickle(("module", torch.FloatStorage, "0", "cpu", 2)),
    "beyond": tensor_pickle(FLOATS, offset=1),
    "before": tensor_pickle(FLOATS, offset=-1),
    "too wide": tensor_pickle(FLOATS, shape=(1 << 60,)),
    "strides that leave": tensor_pickle(FLOATS, strides=(1 << 40,)),
    "negative strides": tensor_pickle(FLOATS, offset=1, strides=(-1,)),
    "two dimensions, one stride": tensor_pickle(FLOATS, shape=(1, 2)),
    "a boolean extent": tensor_pickle(FLOATS, shape=(True,)),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_tensor_that_does_not_fit_its_record_is_not_made(what, tmp_path):
    archive(tmp_path / "x.pt", WRONG[what], {"data/0": bytes(8)})
    with pytest.raises(NotOrdinary):
        read_ordinary(tmp_path / "x.pt")
    archive(tmp_path / "y.pt", tensor_pickle(FLOATS), {"data/0": bytes(8)})
    assert read_ordinary(tmp_path / "y.pt").numel() == 2


def test_an_endless_tensor_takes_no_memory(tmp_path):
    """One element, repeated by a stride of 0: made, as torch makes it, and refused by whoever wants its values."""
    archive(tmp_path / "x.pt", tensor_pickle(FLOATS, shape=(1 << 50,), strides=(0,)), {"data/0": bytes(8)})
    assert read_ordinary(tmp_path / "x.pt").numel() == 1 << 50


@pytest.mark.parametrize(
    "operations",
    [
        b"\x80\x02cos\nmkdir\nX\x06\0\0\0it-ran\x85R.",  # GLOBAL, REDUCE
        b"\x80\x02(X\x06\0\0\0it-ranios\nmkdir\n.",  # INST
        b"\x80\x02cos\nmkdir\n)\x81.",  # NEWOBJ
        b"\x80\x04X\x02\0\0\0osX\x05\0\0\0mkdir\x93.",  # STACK_GLOBAL
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02Pname\n.",  # PERSID
        b"\x80\x02]R.",  # a call of a list
        b"\x80\x02}}b.",  # BUILD on a dict
        b"\x80\x02ccollections\nOrderedDict\n}X\x01\0\0\0aK\x01sb.",  # BUILD on a class
        b"\x80\x02ctorch\nFloatStorage\n)R.",  # a call of a storage
        b"\x80\x02cmegatron.ucp.inert\nFragmentAddress\n)\x81.",  # by our own name
        b"\x80\x02" + b"]" * 3,  # no end
        b"",
        b".",
        b"\x80\x02r\xff\xff\xff\xff.",  # LONG_BINPUT of nothing
        b"\x80\x02Nr\xff\xff\xff\xff.",  # LONG_BINPUT far away: a list of as many places would be 32 GiB
        b"\x80\x02B\xff\xff\xff\x7f.",  # BINBYTES of 2 GiB
        b"\x80\x02X\xff\xff\xff\x7f.",  # BINUNICODE of 2 GiB
        b"\x80\x02\x8b\xff\xff\xff\x7f.",  # LONG4 of 2 GiB
    ],
    ids=str,
)
def test_hostile_opcodes_do_nothing(operations, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    archive(tmp_path / "x.pt", operations)
    if operations == b"\x80\x02Nr\xff\xff\xff\xff.":
        assert read_ordinary(tmp_path / "x.pt") is None
    else:
        with pytest.raises(NotOrdinary):
            read_ordinary(tmp_path / "x.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pt"]


def test_archives_of_another_form_are_left_to_torch(tmp_path):
    path, good = tmp_path / "x.pt", tensor_pickle(FLOATS)
    archive(path, good, {"data/0": bytes(8)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(NotOrdinary, match="compressed"):
        read_ordinary(path)
    archive(path, good, {"data/0": bytes(8), "byteorder": b"big"})
    with pytest.raises(NotOrdinary, match="byte order"):
        read_ordinary(path)
    archive(path, good, {"data/0": bytes(8), "y/data.pkl": b""})
    with pytest.raises(NotOrdinary):
        read_ordinary(path)
    torch.save(torch.ones(3), path, _use_new_zipfile_serialization=False)
    with pytest.raises(NotOrdinary):
        read_ordinary(path)
    os.mkfifo(tmp_path / "pipe.pt")  # whoever opened it would wait for ever
    for name in ("missing.pt", "pipe.pt", "."):
        with pytest.raises(NotOrdinary, match="no regular file"):
            read_ordinary(tmp_path / name)


def test_damage_is_never_more_than_not_ordinary(tmp_path):
    """Bits of the pickle, of headers and of the directory, flipped one at a time; what is still read is what torch
    reads."""
    torch.save({"a": torch.arange(3.0), "n": [1, 2.5], "step": torch.tensor(3.0)}, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    rng, read = random.Random(0), 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (tmp_path / "y.pt").write_bytes(damaged)
        try:
            ours = read_ordinary(tmp_path / "y.pt")
        except NotOrdinary:
            continue
        read += 1
        try:
            theirs = load(tmp_path / "y.pt")
        except Exception:
            theirs = None  # torch asks for records that hold nothing here (its version of the format)
        if theirs is not None:
            assert_same(ours, theirs)
    assert 0 < read < 400


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_comparisons_are_torchs(dtype):
    values = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    values[3] = float("nan")
    weight = StoredTensor.of_torch(values.to(getattr(torch, dtype)))
    master = StoredTensor.of_torch(values)
    assert is_rounded(master, weight)
    changed = weight.to_torch().clone()
    changed[7] += 1
    assert not is_rounded(master, StoredTensor.of_torch(changed))
    assert not is_rounded(master.part(0, 10), weight)
    assert are_equal(weight.part(4, 900), weight.part(4, 900)) and not are_equal(weight, weight)  # nan
    assert not are_equal(weight.part(4, 900), weight.part(5, 901))


@pytest.mark.parametrize(
    "command", [["inspect", "n"], ["verify", "n"], ["convert", "n", "u"], ["plan", "n"], ["diff", "n", "n", "--full"]]
)
@pytest.mark.parametrize("has_manifest", [True, False])
def test_the_command_line_works_without_torch(command, has_manifest, tmp_path):
    write_native(tmp_path / "n", make_state(model()), Topology(dp_size=2), 1, with_manifest=has_manifest)
    without = "import sys; sys.modules['torch'] = None; from megatron.ucp.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", without, *command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_without_torch_there_is_no_other_way(tmp_path):
    """The test above would see an import."""
    torch.save({"value": np.arange(3)}, tmp_path / "x.pt")
    code = "import sys; sys.modules['torch'] = None; from megatron.ucp.sources.source import FileCache; from pathlib "
    code += "import Path; FileCache().load(Path('x.pt'))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode and "torch" in done.stderr


def test_an_endless_tensor_is_written_again_as_it_lies(tmp_path):
    torch.save({"a": torch.arange(2.0)[1:].expand(1 << 40), "b": torch.ones(3)}, tmp_path / "x.pt")
    info = save_streamed(read_ordinary(tmp_path / "x.pt"), tmp_path / "y.pt")
    again = torch.load(tmp_path / "y.pt", weights_only=True)
    assert info.bytes < 4096 and again["a"].shape == (1 << 40,) and float(again["a"][-1]) == 1
    assert torch.equal(again["b"], torch.ones(3))
