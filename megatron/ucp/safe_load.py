"""The one function that reads a .pt file. It never runs code from the file.

The one idea: torch's restricted unpickler (`weights_only=True`), plus inert stand-ins for the few classes that
DeepSpeed puts into its files, so that they open without importing DeepSpeed; anything else is refused by name.

    state = load(path)["optimizer_state_dict"]      # tensors are memory-mapped: a page is read when it is touched
"""

from __future__ import annotations

import argparse
import pickle
import pickletools
import threading
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron.ucp.errors import CorruptFileError, MissingFileError, UnsafePickleError


class Inert:
    """What a class of DeepSpeed's becomes: its attributes, none of its methods."""

    def __init__(self, *values: Any):
        if values:
            self.values = values

    def __repr__(self) -> str:
        return f"{type(self).__name__}({vars(self)})"


class FragmentAddress(Inert):
    """`start` and `numel` of a parameter's fragment in a flat partition."""


class LossScaler(Inert):
    """cur_scale, and for the dynamic one cur_iter, last_overflow_iter, cur_hysteresis, ..."""


class DynamicLossScaler(LossScaler):
    pass


class SubparamShape(Inert):
    """patterns, shape, partition_dim."""


def _enum_value(value: Any) -> Any:
    return value


STAND_INS: list[tuple[Any, str]] = [
    (FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
    (LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (DynamicLossScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (SubparamShape, "deepspeed.checkpoint.universal_checkpoint.SubparamShape"),
    (_enum_value, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (argparse.Namespace, "argparse.Namespace"),
]

_LOCK = threading.Lock()
_PICKLES_IN_LEGACY_FILE = 4
"""Magic number, version, machine, content."""


def load(path: str | Path, mmap: bool = True) -> Any:
    """The file's content on the CPU. Raises MissingFileError, CorruptFileError or UnsafePickleError."""
    path = Path(path)
    if not path.is_file():
        raise MissingFileError("no such file", where=path)
    is_mapped = mmap and zipfile.is_zipfile(path)
    try:
        # The allow-list is the process's, so a second thread must not see it end.
        with _LOCK, torch.serialization.safe_globals(STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except pickle.UnpicklingError as error:
        unknown = _unknown_globals(path)
        if not unknown and "global" not in str(error).lower():
            raise CorruptFileError(f"not a readable .pt file: {str(error).splitlines()[0]}", where=path) from error
        raise UnsafePickleError(
            "the file wants classes or functions outside the allow-list; it was not executed",
            found=unknown or str(error),
            where=path,
            do="do not load it unless you know who made it; then save it again from plain tensors and dicts",
        ) from None
    except Exception as error:
        # Whatever torch's unpickler and zip reader stumble over (IndexError, MemoryError, struct.error, ...) comes of
        # what is in the file, and nothing of ours runs in there.
        raise CorruptFileError(
            f"not a readable .pt file ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})",
            where=path,
            do="copy it again from where it was saved",
        ) from error


def _unknown_globals(path: Path) -> list[str]:
    """Names outside the allow-list that the file's pickle asks for, found without unpickling."""
    known = {name for _, name in STAND_INS}
    try:
        if zipfile.is_zipfile(path):
            return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - known)
        names: set[str] = set()
        with open(path, "rb") as file:
            for _ in range(_PICKLES_IN_LEGACY_FILE):
                names |= _globals_of_pickle(file)
        return sorted(name for name in names - known if not name.startswith(("torch.", "collections.")))
    except Exception:  # a hostile file may break the scan too; the refusal stands without the list
        return []


def _globals_of_pickle(file: BinaryIO) -> set[str]:
    names, strings = set(), []
    try:
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "GLOBAL":
                names.add(argument.replace(" ", "."))
            elif operation.name == "STACK_GLOBAL":
                names.add(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    except ValueError:
        pass  # what follows is no pickle; what was found before counts
    return names
