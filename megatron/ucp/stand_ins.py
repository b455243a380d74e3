"""Inert stand-ins for classes and functions that a .pt file names and that are not needed to understand it.

What a program puts beside its weights (numpy's random state, paths, dates, hyper-parameters of its own
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

from megatron.ucp.errors import CorruptFileError

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
_NUMPY_SCALARS = {
    "f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I", "u2": "H",
    "u1": "B", "b1": "?",
}  # fmt: skip
"""numpy's type codes -> struct's."""


_MODULE = "inert"
"""Of the classes that are made here."""


class Stranger:
    """What stands for an object of an unknown class: the values it was made of and the state it was given."""

    values: tuple[Any, ...]
    name = ""
    """Of the class or function that the file asked for."""
    state: Any
    """What it was given after it was made; None where it was given nothing."""
    is_called: bool
    """Made by a call; else by its class's __new__ alone."""

    def __new__(cls, *values: Any) -> Stranger:
        stranger = super().__new__(cls)
        stranger.values = values
        stranger.state = None
        stranger.is_called = False
        return stranger

    def __init__(self, *values: Any):
        # Pickle calls a function or class; of an object made by __new__ alone it does not get here.
        self.is_called = True

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<{self.name}, not loaded>"

    def __hash__(self) -> int:
        return id(self)


def global_of(cls: type) -> str | None:
    """The name by which the file asked for what this class stands for; None where it stands for nothing."""
    return cls.__qualname__ if issubclass(cls, Stranger) and cls.__module__ == _MODULE else None


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
    # Named in full, so that two classes called alike are told apart in torch's messages.
    names = {"name": "numpy.ndarray" if leaf == "_reconstruct" else name, "__module__": _MODULE, "__qualname__": name}
    kind = type(leaf, (Stranger,), names)
    if container is not None:
        kind.__new__ = staticmethod(lambda cls, *values: container())  # type: ignore[method-assign, assignment]
    return kind


class _Scalar(Stranger):
    name = "a numpy scalar"


def _number(dtype: Any, content: Any = b"") -> Any:
    """A numpy scalar; inert where it is not of one of the common types."""
    kind = dtype.values[0] if isinstance(dtype, Stranger) and dtype.values else None
    order = dtype.state[1] if isinstance(dtype, Stranger) and isinstance(dtype.state, tuple) else "<"
    code = _NUMPY_SCALARS.get(kind) if isinstance(kind, str) else None
    content = content.encode("latin1") if isinstance(content, str) else content
    if code is None or not isinstance(content, bytes) or len(content) != struct.calcsize(code):
        return _Scalar(dtype, content)
    return struct.unpack((">" if order == ">" else "<") + code, content)[0]


def _path(*parts: Any) -> str:
    return "/".join(str(part) for part in parts).replace("//", "/")


def _new_list(values: Any = (), *_: Any) -> list:
    return list(values) if isinstance(values, (list, tuple)) else []


def _new_dict(*_: Any) -> dict:
    return {}


_FUNCTIONS = {_number: "numpy.scalar", _path: "pathlib", _new_list: "collections.deque", _new_dict: "defaultdict"}


def without_strangers(content: Any) -> tuple[Any, list[str]]:
    """(a copy of dicts, lists and tuples without them, what was left out: "args.policy (my.Policy)"). In lists and
    tuples None keeps their place. Raises CorruptFileError for what is nested too deep or holds itself."""
    cleaner = _Cleaner()
    return cleaner.clean(content, "", 0), cleaner.left_out


_LEFT_OUT = object()
_MAX_DEPTH = 100


class _Cleaner:
    """Each object once, however often it is referred to: a few lines of a pickle can hold 2^100 ways to one."""

    def __init__(self) -> None:
        self.left_out: list[str] = []
        self._done: dict[int, Any] = {}

    def clean(self, value: Any, place: str, depth: int) -> Any:
        if name := _stranger_name(value):
            self.left_out.append(f"{place} ({name})")
            return _LEFT_OUT
        attributes = getattr(value, "__dict__", None) if type(value).__module__ in _WITH_ATTRIBUTES else None
        if not isinstance(value, dict) and type(value) not in (list, tuple, set) and attributes is None:
            return value
        if depth > _MAX_DEPTH:
            raise CorruptFileError(f"nested more than {_MAX_DEPTH} deep, or in itself", found=place[:200])
        if id(value) not in self._done:
            self._done[id(value)] = self._rebuilt(value, attributes, place, depth + 1)
        return self._done[id(value)]

    def _rebuilt(self, value: Any, attributes: dict | None, place: str, depth: int) -> Any:
        """`value` itself where nothing is left out of it."""
        if attributes is not None:
            clean = self.clean(attributes, place, depth)
            if clean is attributes:
                return value
            kind: Any = type(value)
            copied = kind.__new__(kind)
            copied.__dict__.update(clean)
            return copied
        if isinstance(value, dict):
            kept = {}
            for key, entry in value.items():
                inside = f"{place}.{key}" if place else str(key)
                if name := _stranger_name(key):
                    self.left_out.append(f"{inside} ({name})")
                elif (clean := self.clean(entry, inside, depth)) is not _LEFT_OUT:
                    kept[key] = clean
            return value if len(kept) == len(value) and all(kept[k] is value[k] for k in kept) else kept
        entries = [self.clean(entry, f"{place}[{i}]", depth) for i, entry in enumerate(value)]
        if all(new is old for new, old in zip(entries, value)):
            return value
        return type(value)(None if entry is _LEFT_OUT else entry for entry in entries)


_WITH_ATTRIBUTES = ("argparse", "megatron.ucp.safe_load")
"""Modules of the classes that are kept, with what they hold."""


def _stranger_name(value: Any) -> str | None:
    """What the file called it, if it is a stand-in or an object of one."""
    if isinstance(value, Stranger) or (isinstance(value, type) and issubclass(value, Stranger)):
        return value.name
    return _FUNCTIONS.get(value) if callable(value) else None
