"""Inert stand-ins for classes and functions that a .pt file names and that are not needed to understand it.

The one idea: what a program puts beside its weights (numpy's random state, paths, dates, hyper-parameters of its own
classes) must not make the checkpoint unreadable, and must not run either. So each unknown name becomes a class of our
own that only keeps what it was given. Common values come out as what they mean: numpy scalars as numbers, paths as
text, deques as lists, defaultdicts as dicts. Names that can do harm in any form are refused as before.

    classes = stand_ins({"numpy.ndarray", "my.Config"})     # [(class, "numpy.ndarray"), ...] for torch's allow-list
    content, left_out = without_strangers(content)          # for a file that others will read
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping
from typing import Any

_DANGEROUS = frozenset(
    {
        "os", "posix", "nt", "sys", "subprocess", "commands", "importlib", "runpy", "shutil", "socket", "pty", "ctypes",
        "code", "codeop", "pickle", "_pickle", "marshal", "dill", "cloudpickle", "webbrowser", "timeit", "pdb", "bdb",
        "cProfile", "profile", "trace", "multiprocessing", "threading", "asyncio", "http", "urllib", "ftplib",
        "smtplib", "pip", "io.open", "_io.open", "torch.hub", "torch.serialization", "torch.utils.cpp_extension",
    }
)  # fmt: skip
"""Modules, and two functions, of which a checkpoint has no reason to name anything. What they name would be inert too;
that it is there at all says what the file is for."""
_HARMLESS_BUILTINS = frozenset(
    {
        "list", "dict", "tuple", "set", "frozenset", "int", "float", "str", "bytes", "bool", "complex", "range",
        "slice", "object",
    }
)  # fmt: skip
_NUMPY_SCALARS = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I", "b1": "?"}


class Stranger:
    """What stands for an object of an unknown class: the values it was made of and the state it was given."""

    name = ""
    """Of the class or function that the file asked for."""

    def __new__(cls, *values: Any) -> Stranger:
        stranger = super().__new__(cls)
        stranger.values = values
        stranger.state = None
        return stranger

    def __init__(self, *values: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<{self.name}, not loaded>"

    def __hash__(self) -> int:
        return id(self)


def is_dangerous(name: str) -> bool:
    """Whether nothing good is named so in a checkpoint."""
    module, _, attribute = name.rpartition(".")
    if module in ("builtins", "__builtin__", ""):
        return attribute not in _HARMLESS_BUILTINS
    parts = name.split(".")
    return any(".".join(parts[: i + 1]) in _DANGEROUS for i in range(len(parts)))


def stand_ins(names: Collection[str], containers: Mapping[str, type] | None = None) -> list[tuple[Callable, str]]:
    """One for each name. `containers`: name -> list or dict, for those that the file fills as such."""
    return [(_stand_in(name, (containers or {}).get(name)), name) for name in sorted(names)]


def _stand_in(name: str, container: type | None) -> Callable:
    leaf = name.rpartition(".")[2]
    if name.startswith(("numpy.core.multiarray.", "numpy._core.multiarray.")) and leaf == "scalar":
        return _number
    if name.startswith(("pathlib.", "pathlib._local.")):
        return _path
    if name == "collections.deque":
        return _new_list
    if name == "collections.defaultdict":
        return _new_dict
    kind = type(leaf, (Stranger,), {"name": "numpy.ndarray" if leaf == "_reconstruct" else name})
    if container is not None:
        kind.__new__ = staticmethod(lambda cls, *values: container())  # type: ignore[method-assign]
    return kind


def _number(dtype: Any, content: Any = b"") -> Any:
    """A numpy scalar; as it came where it is not of one of the common types."""
    kind = dtype.values[0] if isinstance(dtype, Stranger) and dtype.values else None
    order = dtype.state[1] if isinstance(dtype, Stranger) and isinstance(dtype.state, tuple) else "<"
    code = _NUMPY_SCALARS.get(kind) if isinstance(kind, str) else None
    content = content.encode("latin1") if isinstance(content, str) else content
    if code is None or not isinstance(content, bytes) or len(content) != struct.calcsize(code):
        return None
    return struct.unpack((">" if order == ">" else "<") + code, content)[0]


def _path(*parts: Any) -> str:
    return "/".join(str(part) for part in parts).replace("//", "/")


def _new_list(values: Any = (), *_: Any) -> list:
    return list(values) if isinstance(values, (list, tuple)) else []


def _new_dict(*_: Any) -> dict:
    return {}


def without_strangers(content: Any) -> tuple[Any, list[str]]:
    """(a copy of dicts, lists and tuples without them, what was left out: "args.policy (my.Policy)"). In lists and
    tuples None keeps their place."""
    left_out: list[str] = []
    return _without(content, "", left_out, 0), left_out


_LEFT_OUT = object()
_MAX_DEPTH = 100


def _without(value: Any, place: str, left_out: list[str], depth: int) -> Any:
    if isinstance(value, (Stranger, type)) and (isinstance(value, Stranger) or issubclass(value, Stranger)):
        left_out.append(f"{place} ({value.name})")
        return _LEFT_OUT
    if depth > _MAX_DEPTH:
        return value
    if isinstance(value, dict):
        kept = {}
        for key, entry in value.items():
            inside = f"{place}.{key}" if place else str(key)
            if isinstance(key, Stranger):
                left_out.append(f"{inside} ({key.name})")
            elif (clean := _without(entry, inside, left_out, depth + 1)) is not _LEFT_OUT:
                kept[key] = clean
        return kept if len(kept) < len(value) or any(kept[k] is not value[k] for k in kept) else value
    if type(value) in (list, tuple, set):
        kept_list = [_without(entry, f"{place}[{i}]", left_out, depth + 1) for i, entry in enumerate(value)]
        if all(new is old for new, old in zip(kept_list, value)):
            return value
        return type(value)(None if entry is _LEFT_OUT else entry for entry in kept_list)
    state = getattr(value, "__dict__", None)
    if isinstance(state, dict) and type(value).__module__ in ("argparse", "megatron.ucp.safe_load"):
        clean = _without(state, place, left_out, depth + 1)
        if clean is not state:
            copied = type(value).__new__(type(value))
            copied.__dict__.update(clean)
            return copied
    return value
