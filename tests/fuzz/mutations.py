"""Our checks taken away one at a time, and which faults ought to show it.

with mutation.applied(): ...            # the check is gone
"""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fuzz.faults import Fault

from megatron.checkpoint import loading, saved_streams
from megatron.engine import schedule
from megatron.engine.optimizer_states import OptimizerStates
from megatron.ucp import (
    convert,
    doctor,
    errors,
    file_table,
    manifest,
    manifest_schema,
    ordinary_file,
    pointers,
    run_folder,
    safe_load,
    safe_paths,
    verify,
)
from megatron.ucp.sources import deepspeed_files, foreign, source
from megatron.ucp.stored import StoredTensor, as_stored
from megatron.ucp.targets import deepspeed as deepspeed_target


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _no_faults(*args: Any, **kwargs: Any) -> list:
    return []


def _joined(folder: str | Path, relative: str) -> Path:
    return Path(folder) / relative


def _opened(folder: str | Path, relative: str):
    return open(Path(folder) / relative, "rb")


def _believed(run_folder: str | Path, pointer: str) -> pointers.Pointer:
    name = (Path(run_folder) / pointer).read_bytes().decode(errors="replace").strip()
    return pointers.Pointer(Path(run_folder) / name, named=name)


def _unchecked_tensor(cache: source.FileCache, path: Path, key: tuple) -> StoredTensor:
    node = cache.load(path)
    for part in key:
        node = node[part]
    return as_stored(node).flat()


def _execute(path: Path, mmap: bool = True) -> Any:
    return torch.load(path, weights_only=False)


def _obey(path: Path) -> Any:
    """The reader without torch, if it did whatever a pickle says."""

    class Obeying(ordinary_file._Reader):
        find_class = pickle._Unpickler.find_class
        dispatch = pickle._Unpickler.dispatch

    with zipfile.ZipFile(path) as file:
        return Obeying(path, file).load()


@dataclass(frozen=True)
class Mutation:
    name: str
    faults: str
    """Part of the names of the faults that ought to be seen without the check."""
    changes: tuple[tuple[Any, str, Any], ...]
    """(module or class, attribute, what it becomes)"""
    base: str = ""
    also: Callable[[Fault], bool] = field(default=lambda fault: True)

    def applies_to(self, fault: Fault) -> bool:
        return self.faults in fault.name and self.base in fault.base and self.also(fault)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        kept = [(owner, name, getattr(owner, name)) for owner, name, _ in self.changes]
        for owner, name, value in self.changes:
            setattr(owner, name, value)
        try:
            yield
        finally:
            for owner, name, value in kept:
                setattr(owner, name, value)


MUTATIONS = (
    Mutation("ucp.json's own checksum", "a bit of the value of", ((manifest, "_check_checksum", _nothing),)),
    Mutation(
        "the schema of ucp.json", "of a wrong type", ((manifest, "manifest_faults", _no_faults),), "same topology"
    ),
    Mutation("half characters in ucp.json", "half a character", ((manifest, "_is_unicode", lambda data: True),)),
    Mutation(
        "what a name may be",
        "a parameter is named",
        ((safe_paths, "part_fault", _nothing), (manifest_schema, "part_fault", _nothing)),
    ),
    Mutation(
        "what a path may be",
        "a file is named",
        ((safe_paths, "path_fault", _nothing), (manifest_schema, "path_fault", _nothing)),
    ),
    Mutation(
        "links among files",
        "a link to the right content elsewhere",
        (
            (file_table, "existing_file", _joined),
            (file_table, "open_file", _opened),
            (manifest, "open_file", _opened),
            (saved_streams, "existing_file", _joined),
        ),
    ),
    Mutation(
        "checksums of files",
        "rng_state.safetensors: a bit is flipped",
        ((file_table, "checksum_of", lambda file: _Anything()),),
    ),
    Mutation("files that are too many", "is there again", ((verify, "data_files", _no_faults),), "same topology"),
    Mutation(
        "checksums of what a conversion copies",
        "rng_state.safetensors: a bit is flipped",
        ((convert, "require_unchanged", _nothing),),
    ),
    Mutation(
        "digests of what is written anew",
        "optim_states.pt: a bit is flipped",
        ((deepspeed_target, "require_saved", _nothing), (convert, "require_unchanged", _nothing)),
        "ZeRO-3",
    ),
    Mutation("digests after a load", "optim_states.pt: a bit is flipped", ((loading, "prove", _nothing),), "ZeRO"),
    Mutation("files that run code", "a pickle that runs code", ((safe_load, "_load", _execute),)),
    Mutation(
        "files that run code, read without torch", "a pickle that runs code", ((ordinary_file, "read_ordinary", _obey),)
    ),
    Mutation(
        "memory by a number",
        "an archive that asks for memory",
        ((safe_load, "_require_bounded", _nothing),),
        "DeepSpeed",
    ),
    Mutation(
        "tensors and the size of their file", "endless", ((source.FileCache, "tensor", _unchecked_tensor),), "DeepSpeed"
    ),
    Mutation(
        "values where DeepSpeed puts them",
        "frozen_param_fragments is",
        ((foreign, "_require_readable", _nothing),),
        "DeepSpeed",
    ),
    Mutation("the number of files", "p_size is out of range (7", ((deepspeed_files, "_MAX_MISSING", 1 << 80),)),
    Mutation(
        "the length of messages", "far too long", ((errors, "_MAX_TEXT", 1 << 40), (errors, "_MAX_ITEM", 1 << 40))
    ),
    Mutation("pointers", "the pointer is named", ((run_folder, "read_pointer", _believed),)),
    Mutation(
        "what a resume would take", "the pointer is named", ((doctor, "find_checkpoints", run_folder.FoundCheckpoints),)
    ),
    Mutation("the saved schedule", "common.schedule", ((schedule, "_SAVED", _nothing),)),
    Mutation(
        "kinds of hyper-parameters", "optimizer.groups", ((OptimizerStates, "hyper_parameter_faults", _no_faults),)
    ),
)


class _Anything:
    """Equal to every checksum."""

    crc32 = ""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0
