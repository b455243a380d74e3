"""What programs keep beside their weights: read without running it, left out of the output by name, refused where it
can only be meant to harm."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import logging
import pathlib
import types
import uuid
import zipfile

import numpy as np
import pytest
import torch
from ucp.synthetic import Topology, make_state, model, write_native

from megatron.ucp.convert import convert
from megatron.ucp.errors import CorruptFileError, UcpError, UnsafePickleError
from megatron.ucp.safe_load import load
from megatron.ucp.sources import open_source
from megatron.ucp.sources.source import FileCache
from megatron.ucp.stand_ins import Stranger, _number, _stand_in, is_dangerous, without_strangers
from megatron.ucp.verify import verify

STATE = make_state(model())


class Colour(enum.Enum):
    RED = 1


class Settings:
    ran = 0

    def __init__(self):
        self.rate, self.table = 0.1, {"a": [1, 2]}

    def __setstate__(self, state):
        Settings.ran += 1
        self.__dict__.update(state)


class Slotted:
    __slots__ = ("x",)

    def __init__(self):
        self.x = 1


class Named(dict):
    pass


class Listed(list):
    pass


def _factory():
    Settings.ran += 1


Pair = collections.namedtuple("Pair", "a b")

# As they come out; a type where nothing of the value is promised but that it is inert.
VALUES = {
    "numpy-state": (np.random.get_state(), tuple),
    "array": (np.arange(6.0).reshape(2, 3), Stranger),
    "text-array": (np.array(["a", "bc"]), Stranger),
    "generator": (np.random.default_rng(0), Stranger),
    "float64": (np.float64(2.5), 2.5),
    "float32": (np.float32(0.5), 0.5),
    "int64": (np.int64(-7), -7),
    "bool": (np.bool_(True), True),
    "half": (np.float16(0.5), 0.5),
    "complex-scalar": (np.complex64(1j), Stranger),
    "text-scalar": (np.str_("a"), Stranger),
    "path": (pathlib.Path("/runs/a"), "/runs/a"),
    "date": (datetime.datetime(2026, 1, 1), Stranger),
    "span": (datetime.timedelta(1), Stranger),
    "deque": (collections.deque([1, 2], maxlen=3), [1, 2]),
    "defaultdict": (collections.defaultdict(list, {"a": [1]}), {"a": [1]}),
    "defaultdict-of-a-function": (collections.defaultdict(_factory, {"a": 1}), {"a": 1}),
    "counter": (collections.Counter("aab"), collections.Counter("aab")),
    "enum": (Colour.RED, Stranger),
    "settings": (Settings(), Stranger),
    "slots": (Slotted(), Stranger),
    "namedtuple": (Pair(1, 2), Stranger),
    "dict-of-a-class": (Named(a=1), {"a": 1}),
    "list-of-a-class": (Listed([1, 2]), [1, 2]),
    "class": (Settings, type),
    "function": (_factory, type),
    "namespace": (types.SimpleNamespace(a=1), Stranger),
    "arguments": (argparse.Namespace(a=1, colour=Colour.RED), argparse.Namespace),
    "fraction": (fractions.Fraction(1, 3), Stranger),
    "decimal": (decimal.Decimal("1.5"), Stranger),
    "uuid": (uuid.UUID(int=7), Stranger),
    "frozenset": (frozenset([1]), Stranger),
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_harmless_value_is_no_reason_to_refuse(kind, tmp_path):
    value, expected = VALUES[kind]
    torch.save({"before": torch.arange(4.0), "value": value, "after": [1, {"x": value}]}, tmp_path / "x.pt")
    ran = Settings.ran
    found = load(tmp_path / "x.pt")
    assert Settings.ran == ran
    assert torch.equal(found["before"], torch.arange(4.0)) and found["after"][0] == 1
    if isinstance(expected, type):
        assert isinstance(found["value"], expected)
    else:
        assert found["value"] == expected and type(found["value"]) is type(expected)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_save_full_of_them_converts_bitwise_and_says_what_it_left_out(zero_stage, tmp_path, caplog):
    topology = Topology(dp_size=1 if zero_stage == 0 else 2)
    for name in ("plain", "full"):
        write_native(tmp_path / name, STATE, topology, zero_stage, with_manifest=False)
    for path in (tmp_path / "full").glob("*model_states.pt"):
        content = torch.load(path, weights_only=False)
        torch.save(content | {kind: value for kind, (value, _) in VALUES.items()}, path)
    with caplog.at_level(logging.WARNING):
        made = convert(tmp_path / "full", tmp_path / "u", num_workers=1).manifest
    assert made.digests == convert(tmp_path / "plain", tmp_path / "v", num_workers=1).manifest.digests
    assert verify(tmp_path / "u").is_sound
    assert "settings (ucp.test_ucp_stand_ins.Settings)" in caplog.text.replace("tests.", "")
    assert "array (numpy.ndarray)" in caplog.text
    for path in (tmp_path / "u").glob("*model_states.pt"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            kept = torch.load(path, weights_only=True)
        assert kept["int64"] == -7 and kept["path"] == "/runs/a" and kept["arguments"].a == 1
        assert "settings" not in kept and not hasattr(kept["arguments"], "colour")


def test_what_is_needed_is_read_strictly(tmp_path):
    """A stranger where a tensor, a number or a table has to be is an error, by file."""
    for key in ("param_shapes", "checkpoint_parallel_dimensions", "optimizer_state_dict"):
        folder = tmp_path / key
        write_native(folder, STATE, Topology(dp_size=2), 1, with_manifest=False)
        name = "zero_pp_rank_0_mp_rank_00_optim_states.pt" if "optimizer" in key else "mp_rank_00_model_states.pt"
        content = torch.load(folder / name, weights_only=False)
        torch.save(content | {key: Settings()}, folder / name)
        with pytest.raises(UcpError, match="Settings, not loaded|'?Settings'?|optimizer_state_dict|param_shapes"):
            convert(folder, tmp_path / "out", num_workers=1)
        assert not (tmp_path / "out").exists()


def test_places_are_kept_where_something_is_left_out():
    inert = type("X", (Stranger,), {"name": "my.X"})()
    content = {"a": [1, inert, 2], "b": (inert,), "c": {"d": inert, "e": 1}, "f": 3}
    assert without_strangers(content) == (
        {"a": [1, None, 2], "b": (None,), "c": {"e": 1}, "f": 3},
        ["a[1] (my.X)", "b[0] (my.X)", "c.d (my.X)"],
    )
    assert without_strangers({"a": [1]}) == ({"a": [1]}, [])
    # Functions of ours that stand for a class are no more to be written than the class.
    kept, left_out = without_strangers({"queue": _stand_in("collections.deque", None), "x": 1})
    assert (kept, left_out) == ({"x": 1}, ["queue (collections.deque)"])


def test_what_is_referred_to_often_is_walked_through_once():
    """Forty lines of a pickle that hold 2^40 ways to one object."""
    inert = type("X", (Stranger,), {"name": "my.X"})()
    value = [inert]
    for _ in range(40):
        value = [value, value]
    kept, left_out = without_strangers(value)
    assert len(left_out) == 1
    for _ in range(40):
        assert kept[0] is kept[1]
        kept = kept[0]
    assert kept == [None]
    itself: list = []
    itself.append(itself)
    with pytest.raises(CorruptFileError, match="in itself"):
        without_strangers(itself)


def test_a_scalar_of_another_byte_order():
    dtype = type("dtype", (Stranger,), {"name": "numpy.dtype"})("i4", False, True)
    for order, content in (("<", b"\x03\0\0\0"), (">", b"\0\0\0\x03")):
        dtype.state = (3, order, None, None, None, -1, -1, 0)
        assert _number(dtype, content) == 3
    assert isinstance(_number(dtype, b"12345"), Stranger)


def test_two_classes_called_alike(tmp_path):
    """One of them a list, one a dict: each becomes what it is."""
    import sys

    modules = {name: types.ModuleType(name) for name in ("alike_a", "alike_b", "alike_c")}
    for (name, module), base in zip(modules.items(), (list, dict, object)):
        module.Config = type("Config", (base,), {"__module__": name})
        sys.modules[name] = module
    try:
        listed, mapped = modules["alike_a"].Config([1]), modules["alike_b"].Config(a=1)
        torch.save({"a": listed, "b": mapped, "c": modules["alike_c"].Config()}, tmp_path / "x.pt")
    finally:
        for name in modules:
            del sys.modules[name]
    found = load(tmp_path / "x.pt")
    assert found["a"] == [1] and found["b"] == {"a": 1} and found["c"].name == "alike_c.Config"


class _Calls:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


HARMFUL = {
    "exec": (exec, "raise SystemExit"),
    "getattr": (getattr, "a", "upper"),
    "import": (__import__, "os"),
    "open": (open, "x", "w"),
    "system": (pathlib.os.system, "true"),
    "popen": (__import__("subprocess").Popen, ["true"]),
    "remove": (__import__("shutil").rmtree, "x"),
}


@pytest.mark.parametrize("kind", HARMFUL)
def test_what_can_only_harm_is_refused(kind, tmp_path):
    torch.save({"x": _Calls(*HARMFUL[kind])}, tmp_path / "x.pt")
    with pytest.raises(UnsafePickleError, match=HARMFUL[kind][0].__name__):
        load(tmp_path / "x.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("function", [bytearray, torch.FloatTensor, torch.cuda.sparse.LongTensor])
def test_memory_by_a_number_is_refused(function, is_zip, tmp_path):
    value = {"x": _Calls(function, 10**9)}
    torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UnsafePickleError, match="memory by a number"):
        load(tmp_path / "x.pt")


def test_a_tensor_made_by_a_number_is_not_taken(tmp_path):
    """A class that honest files name too: what it makes is as large as the number says, and nothing of it is there."""
    write_native(tmp_path / "n", STATE, Topology(), 1, with_manifest=False)
    path = tmp_path / "n/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(path, weights_only=False)
    flats = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    flats[0] = _Calls(torch.Tensor, 1 << 28)
    torch.save(content, path)
    with pytest.raises(UcpError, match="the weights in one file are not those of the optimizer's states"):
        convert(tmp_path / "n", tmp_path / "u", num_workers=1)
    with pytest.raises(CorruptFileError, match="claims more than the file holds"):
        FileCache().tensor(path, ("optimizer_state_dict", "single_partition_of_fp32_groups", 0))


def test_a_compressed_file_is_refused(tmp_path):
    """32 million zeros in 32 kB."""
    torch.save({"x": torch.zeros(1 << 23)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as stored, zipfile.ZipFile(tmp_path / "y.pt", "w") as packed:
        for info in stored.infolist():
            packed.writestr(info.filename, stored.read(info), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "y.pt").stat().st_size < 1 << 16
    for mmap in (True, False):
        with pytest.raises(CorruptFileError, match="its size does not bound what it unpacks to"):
            load(tmp_path / "y.pt", mmap=mmap)


def test_names_by_hand():
    for name in (
        "os.system",
        "posix.system",
        "builtins.eval",
        "builtins.getattr",
        "subprocess.Popen",
        "torch.hub.load",
    ):
        assert is_dangerous(name), name
    for name in ("numpy.ndarray", "builtins.list", "my.os.Settings", "omegaconf.DictConfig", "pathlib.PosixPath"):
        assert not is_dangerous(name), name


def test_an_unreadable_foreign_save_is_told_by_its_folder(tmp_path):
    write_native(tmp_path / "n", STATE, Topology(dp_size=2), 1, with_manifest=False)
    content = torch.load(tmp_path / "n/mp_rank_00_model_states.pt", weights_only=False)
    for key, value in (
        ("param_shapes", 7),
        ("param_shapes", [7]),
        ("param_shapes", [{"a": 1}]),
        ("checkpoint_parallel_dimensions", {"tp_degree": "x"}),
    ):
        torch.save(content | {key: value}, tmp_path / "n/mp_rank_00_model_states.pt")
        with pytest.raises(CorruptFileError, match="not as DeepSpeed writes them|not a file of DeepSpeed's") as caught:
            open_source(tmp_path / "n")
        assert str(tmp_path / "n") in str(caught.value)
