"""The files of a Hugging Face model folder: its configuration, its tensors wherever they lie, what comes with it.

    folder = ModelFolder.open(path)            # raises what is wrong with its files, nothing of the model judged
    folder.config["model_type"]
    folder.tensors["lm_head.weight"]           # (file, key in it, StoredTensor)
    companions(path)                           # generation_config.json, the tokenizer's files

Names in an index are a stranger's, and so is whatever stands in the files: .safetensors are read by our reader,
pytorch_model.bin by the one that runs no code. Of links only those are followed that the hub's own cache makes, into
its `blobs`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.ucp.errors import (
    CorruptFileError,
    MissingFileError,
    NotACheckpointError,
    UcpError,
    UnsafePathError,
    UnsupportedCheckpointError,
)
from megatron.ucp.json_checks import MAX_DEPTH, passes, plain
from megatron.ucp.ordinary_file import read_content
from megatron.ucp.safe_paths import existing_file, part_fault
from megatron.ucp.safetensors_file import read_safetensors
from megatron.ucp.stored import StoredTensor, as_stored, is_tensor

CONFIG = "config.json"
_MAX_JSON = 64 << 20
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Each alone, or with an index and in parts."""
_INDEX = ".index.json"
_PARTS = re.compile(r"(model|pytorch_model)-\d{5}-of-\d{5}\.(safetensors|bin)")
_OF_THE_CACHE = re.compile(r"\.\./\.\./blobs/[0-9a-f]{40,64}")
"""What a file in huggingface_hub's cache (snapshots/<revision>/) is a link to."""
_COMPANIONS = re.compile(
    r"generation_config\.json|tokenizer(_config)?\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt|chat_template\.(jinja|json)|spiece\.model"
)


@dataclass(frozen=True)
class HeldTensor:
    file: Path
    tensor: StoredTensor


@dataclass(frozen=True)
class ModelFolder:
    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, HeldTensor]

    @classmethod
    def open(cls, path: Path) -> ModelFolder:
        """Raises NotACheckpointError, CorruptFileError, MissingFileError or UnsafePathError."""
        config = read_json(path, CONFIG)
        files = _weight_files(path)
        held: dict[str, HeldTensor] = {}
        faults: list[str] = []
        for name in files:
            try:
                content = tensors_of(path, name)
            except UcpError as error:
                faults.append(f"{name}: {error.what}" + (f" ({error.found})" if error.found else ""))
                continue
            faults += [f"{key} is in {name} and in {held[key].file.name}" for key in content if key in held]
            held |= content
        if faults:
            raise CorruptFileError(
                f"the weights cannot be read: {len(faults)} fault(s)",
                found=faults,
                where=path,
                do="download these files again",
            )
        return cls(path, config, held)


def is_model_folder(path: Path) -> bool:
    """By what lies in it."""
    return (path / CONFIG).is_file() and any(
        os.path.lexists(path / name) for weights in _WEIGHTS for name in (weights, weights + _INDEX)
    )


def companions(path: Path) -> list[str]:
    """Names of files that belong to the model beside its weights and its configuration."""
    return sorted(entry.name for entry in path.iterdir() if _COMPANIONS.fullmatch(entry.name) and entry.is_file())


def read_json(path: Path, name: str) -> dict[str, Any]:
    """An object in a small file. Raises CorruptFileError, MissingFileError or UnsafePathError."""
    file = file_of(path, name)
    with open(file, "rb") as opened:
        raw = opened.read(_MAX_JSON + 1)
    fault = f"longer than {_MAX_JSON >> 20} MiB" if len(raw) > _MAX_JSON else None
    content = None
    if fault is None:
        try:
            content = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            fault = f"{error}"[:300]
    if fault is None and not isinstance(content, dict):
        fault = f"{type(content).__name__}, not an object"
    if fault is None and not passes(plain, content):
        fault = f"nested more than {MAX_DEPTH} deep, or with giant names"
    if fault is not None or content is None:
        raise CorruptFileError(f"{name} is no description in JSON", found=fault, where=file, do="download it again")
    return content


def _weight_files(path: Path) -> list[str]:
    """Names, of .safetensors files where there are such."""
    for weights in _WEIGHTS:
        if os.path.lexists(path / (weights + _INDEX)):
            return _indexed(path, weights + _INDEX)
        if os.path.lexists(path / weights):
            return [weights]
    parts = sorted(entry.name for entry in path.iterdir() if _PARTS.fullmatch(entry.name))
    raise NotACheckpointError(
        "no weights in the folder",
        found=f"{len(parts)} parts without their index" if parts else sorted(p.name for p in path.iterdir())[:20],
        expected=" or ".join([*_WEIGHTS, *(name + _INDEX for name in _WEIGHTS)]),
        where=path,
        do="download the model again, or give the folder that save_pretrained wrote",
    )


def _indexed(path: Path, index: str) -> list[str]:
    table = read_json(path, index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CorruptFileError(f"{index} names no files", where=path, do="download it again")
    names = set(table.values()) if all(isinstance(name, str) for name in table.values()) else None
    if names is None or (faults := [f"{name!r} {fault}" for name in names if (fault := part_fault(name))]):
        found = "a file's name that is no text" if names is None else faults
        raise UnsafePathError(f"{index} names what is no file of the folder", found=found, where=path)
    if missing := sorted(name for name in names if not os.path.lexists(path / name)):
        raise MissingFileError(
            f"{len(missing)} file(s) of the model are missing", found=missing, where=path, do="download them"
        )
    return sorted(names)


def file_of(path: Path, name: str) -> Path:
    """A regular file of the folder, or what a link of the hub's cache leads to. Raises UnsafePathError or
    MissingFileError."""
    link = path / name
    if part_fault(name) is None and link.is_symlink() and _OF_THE_CACHE.fullmatch(os.readlink(link)):
        blobs = path.resolve().parent.parent / "blobs"
        return existing_file(blobs, os.readlink(link).rpartition("/")[2])
    return existing_file(path, name)


def tensors_of(path: Path, name: str) -> dict[str, HeldTensor]:
    """Of a .safetensors of the folder, or of what torch saved. Raises what is wrong with the file."""
    file = file_of(path, name)  # in the hub's cache its own name says nothing
    content = read_safetensors(file) if name.endswith(".safetensors") else _tensors_of_bin(file)
    return {key: HeldTensor(file, tensor) for key, tensor in content.items()}


def _tensors_of_bin(file: Path) -> dict[str, StoredTensor]:
    content = read_content(file)
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise CorruptFileError("not a table of tensors by name", found=type(content).__name__, where=file)
    if others := sorted(key for key, value in content.items() if not is_tensor(value)):
        raise UnsupportedCheckpointError("it holds what is no tensor", found=others, where=file)
    try:
        return {key: as_stored(value) for key, value in content.items()}
    except (TypeError, ValueError) as error:
        raise UnsupportedCheckpointError(str(error), where=file) from error
