"""Reads any .pt file with torch, and has the last word on what is refused. It never runs code from the file. Files of
plain values and dense tensors need no torch: ordinary_file.py.

Torch's restricted unpickler (`weights_only=True`), plus inert stand-ins: for the few classes that
DeepSpeed puts into its files, so that they open without importing DeepSpeed, and for whatever else a program keeps
beside its weights (stand_ins.py). Names that can do harm are refused, and so are compressed records, whose size in
memory has nothing to do with the file's.

    state = load(path)["optimizer_state_dict"]      # tensors are memory-mapped: a page is read when it is touched
"""

from __future__ import annotations

import pickle
import pickletools
import re
import threading
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron.ucp.errors import CorruptFileError, MissingFileError, UnsafePickleError
from megatron.ucp.inert import INERT
from megatron.ucp.stand_ins import is_dangerous, stand_ins

_GLOBAL = re.compile(rb"c([\w.]+)\n(bytearray|\w+Tensor)\n")
_BY_NUMBER = re.compile(r"(?:__builtin__|builtins)\.bytearray|torch[\w.]*\.\w+Tensor")
"""What makes `bytearray(n)` and `torch.FloatTensor(n)`, allowed to torch. `torch.Tensor` is in honest files too, as a
class; `FileCache.tensor` holds every tensor against its file's size."""
_MAX_CONTAINERS = 50
"""Unknown classes of lists and dicts in one file; for each the file is read once more."""
_LOCK = threading.Lock()
_PICKLES_IN_LEGACY_FILE = 4
"""Magic number, version, machine, content."""


def load(path: str | Path, mmap: bool = True) -> Any:
    """The file's content on the CPU. Raises MissingFileError, CorruptFileError or UnsafePickleError."""
    path = Path(path)
    if not path.is_file():
        raise MissingFileError("no such file", where=path)
    try:
        return _load(path, mmap)
    except pickle.UnpicklingError as error:
        unknown = [name for name in _unknown_globals(path) if is_dangerous(name)]
        if not unknown and "global" not in str(error).lower():
            raise CorruptFileError(f"not a readable .pt file: {str(error).splitlines()[0]}", where=path) from error
        raise UnsafePickleError(
            "the file wants classes or functions outside the allow-list; it was not executed",
            found=unknown or str(error),
            where=path,
            do="do not load it unless you know who made it; then save it again from plain tensors and dicts",
        ) from None
    except (CorruptFileError, UnsafePickleError):
        raise
    except Exception as error:
        # Whatever torch's unpickler and zip reader stumble over (IndexError, MemoryError, struct.error, ...) comes of
        # what is in the file, and nothing of ours runs in there.
        raise CorruptFileError(
            f"not a readable .pt file ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})",
            where=path,
            do="copy it again from where it was saved",
        ) from error


def _load(path: Path, mmap: bool) -> Any:
    is_zip = zipfile.is_zipfile(path)
    _require_bounded(path, is_zip)
    unknown: set[str] | None = None
    containers: dict[str, type] = {}
    while True:
        more = stand_ins(unknown or (), containers)
        try:
            # The allow-list is the process's, so a second thread must not see it end.
            with _LOCK, torch.serialization.safe_globals([*INERT, *more]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
        except pickle.UnpicklingError as error:
            if unknown is None:  # the first time: now they are worth looking for
                unknown = set(_unknown_globals(path))
                if not unknown or any(map(is_dangerous, unknown)):
                    raise
                continue
            # A class that the file fills as a list or a dict becomes one.
            filled = next((pair for pair in more if repr(pair[0]) in str(error)), None)
            if filled is None or filled[1] in containers or len(containers) >= _MAX_CONTAINERS:
                raise
            containers[filled[1]] = dict if "SETITEM" in str(error) else list


def _require_bounded(path: Path, is_zip: bool) -> None:
    """What the file holds says what it needs: torch.save compresses nothing, and asks for no memory by a number."""
    packed: list[str] = []
    if is_zip:
        with zipfile.ZipFile(path) as file:
            packed = [info.filename for info in file.infolist() if info.compress_type != zipfile.ZIP_STORED]
            pickles = [] if packed else [info for info in file.infolist() if info.filename.endswith("/data.pkl")]
            found = {match for info in pickles for match in _GLOBAL.findall(file.read(info))}
        names = {f"{module.decode()}.{name.decode()}" for module, name in found}
    else:
        names = _globals_of_legacy_file(path)
    if by_number := sorted(filter(_BY_NUMBER.fullmatch, names)):
        raise UnsafePickleError(
            "the file calls for memory by a number, whatever it holds itself",
            found=by_number,
            where=path,
            do="save it again from plain tensors and dicts",
        )
    if packed:
        raise CorruptFileError(
            "the file is compressed, so that its size does not bound what it unpacks to",
            found=packed[:5],
            expected="records as torch.save writes them",
            where=path,
            do="save it again with torch.save",
        )


def _unknown_globals(path: Path) -> list[str]:
    """Names outside the allow-list that the file's pickle asks for, found without unpickling."""
    known = {name for _, name in INERT}
    try:
        if zipfile.is_zipfile(path):
            return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - known)
        names = _globals_of_legacy_file(path)
        return sorted(name for name in names - known if not name.startswith(("torch.", "collections.")))
    except Exception:  # a hostile file may break the scan too; the refusal stands without the list
        return []


def _globals_of_legacy_file(path: Path) -> set[str]:
    names: set[str] = set()
    with open(path, "rb") as file:
        for _ in range(_PICKLES_IN_LEGACY_FILE):
            names |= _globals_of_pickle(file)
    return names


def _globals_of_pickle(file: BinaryIO) -> set[str]:
    names: set[str] = set()
    strings: list[Any] = []
    try:
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "GLOBAL":
                names.add(str(argument).replace(" ", "."))
            elif operation.name == "STACK_GLOBAL":
                names.add(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    except ValueError:
        pass  # what follows is no pickle; what was found before counts
    return names
