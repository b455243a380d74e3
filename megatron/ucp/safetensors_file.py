"""Reads and writes .safetensors files: a length, a JSON header of names, types, shapes and places, and the elements.

    tensors = read_safetensors(path)                          # {name: StoredTensor}; none of their elements is read
    info = write_safetensors(path, {"lm_head.weight": StreamedTensor(shape, BFLOAT16, write)}, {"format": "pt"})

The header is a stranger's: every entry is checked against the file before one is believed. The library `safetensors`
gives tensors, not their places, which is what slices of them are read by. Source: its README, "Format".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.ucp.crc32 import crc32, crc32_join
from megatron.ucp.disk import disk_errors
from megatron.ucp.errors import CorruptFileError
from megatron.ucp.json_checks import list_of, passes, shown, whole
from megatron.ucp.manifest import FileInfo
from megatron.ucp.output_file import open_output
from megatron.ucp.stored import DTYPES, MappedFile, Storage, StoredTensor, row_major
from megatron.ucp.torch_file import Record, StreamedTensor

MAX_HEADER = 100_000_000
"""Bytes, as the library has it."""
_LENGTH = 8
_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_CODES = {name: code for code, name in _NAMES.items()}
_SHAPE = list_of(whole(), 0, 64)
_OFFSETS = list_of(whole(), 2, 2)
_METADATA = "__metadata__"


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """By name, in the order of the header. Raises CorruptFileError with all that is wrong, or OSError."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_LENGTH), "little")
        if not 2 <= length <= min(MAX_HEADER, size - _LENGTH):
            raise _corrupt(path, [f"a header of {length} bytes in a file of {size}"])
        raw = file.read(length)
    entries = _header(path, raw)
    origin, start = MappedFile(path), _LENGTH + length
    tensors, faults, spans = {}, list[str](), list[tuple[int, int, str]]()
    for name, entry in entries.items():
        if fault := _entry_fault(entry, size - start):
            faults.append(f"{name}: {fault}")
            continue
        first, last = entry["data_offsets"]
        dtype, shape = DTYPES[_NAMES[entry["dtype"]]], tuple(entry["shape"])
        tensors[name] = StoredTensor(dtype, shape, row_major(shape), 0, Storage(origin, start + first, last - first))
        spans.append((first, last, name))
    spans.sort()
    for (_, end, one), (begin, _, other) in zip(spans, spans[1:]):
        if begin < end:
            faults.append(f"{one} and {other} lie in the same bytes")
    if faults:
        raise _corrupt(path, faults)
    return tensors


def _header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, [f"its header is not JSON: {error}"[:400]]) from error
    if not isinstance(entries, dict):
        raise _corrupt(path, [f"its header is {type(entries).__name__}, not an object"])
    entries.pop(_METADATA, None)
    return entries


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _entry_fault(entry: Any, num_bytes: int) -> str | None:
    if not isinstance(entry, dict) or not passes(_SHAPE, entry.get("shape")):
        return f"no entry of a tensor: {shown(entry)}"
    if not isinstance(entry.get("dtype"), str) or entry["dtype"] not in _NAMES:
        return f"elements of type {shown(entry.get('dtype'))}; read are {', '.join(_NAMES)}"
    if not passes(_OFFSETS, entry.get("data_offsets")):
        return f"no place in the file: {shown(entry.get('data_offsets'))}"
    first, last = entry["data_offsets"]
    needed = math.prod(entry["shape"]) * DTYPES[_NAMES[entry["dtype"]]].itemsize
    if not first <= last <= num_bytes or last - first != needed:
        return f"{needed} bytes at {first} to {last} of {num_bytes}"
    return None


def _corrupt(path: Path, faults: list[str]) -> CorruptFileError:
    return CorruptFileError(
        f"no .safetensors file that can be read: {len(faults)} fault(s)",
        found=faults,
        where=path,
        do="download or copy it again",
    )


def write_safetensors(path: Path, tensors: Mapping[str, StreamedTensor], metadata: Mapping[str, str]) -> FileInfo:
    """From front to back; a tensor is made while it is written. Returns size and checksum of the file. Raises
    NotEnoughSpaceError, what making a tensor raises, and ValueError where it is not as long as it said."""
    entries: dict[str, Any] = {_METADATA: dict(metadata)}
    position = 0
    for name, tensor in tensors.items():
        place = [position, position + tensor.num_bytes]
        entries[name] = {"dtype": _CODES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": place}
        position += tensor.num_bytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _LENGTH)
    head = len(header).to_bytes(_LENGTH, "little") + header
    with disk_errors(path):
        output = open_output(path)
        try:
            output.write(head)
            crc = crc32(head)
            for name, tensor in tensors.items():
                record = Record(output, tensor.dtype)
                tensor.write(record)
                if record.num_bytes != tensor.num_bytes:
                    raise ValueError(f"{name}: {record.num_bytes} bytes written of {tensor.num_bytes}")
                crc = crc32_join(crc, record.crc, record.num_bytes)
            return FileInfo(output.close(), f"{crc:08x}")
        except BaseException:
            output.abandon()
            raise
