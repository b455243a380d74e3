"""`.metadata` of a PyTorch DCP folder: which tensors and values there are, in which chunks, and where those lie.

metadata = read_metadata(folder)          # raises UnsafePickleError, CorruptFileError
metadata.tensors["model.norm.weight"].chunks[0].place

The file is a pickle. Of the classes that it names only those that torch writes into it are known, and they become inert
records; any other ends the reading. Source: torch/distributed/checkpoint/metadata.py and filesystem.py (2.13).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.ucp.errors import CorruptFileError, UnsafePickleError, UnsupportedCheckpointError
from megatron.ucp.safe_paths import open_file, path_fault
from megatron.ucp.stored import DTYPES, DType

METADATA = ".metadata"
_MAX_BYTES = 1 << 30
_MAX_DIMS, _MAX_EXTENT = 16, 1 << 48


@dataclass(frozen=True)
class Place:
    """Of one record of torch.save's in a file of many."""

    file: str
    start: int
    num_bytes: int


@dataclass(frozen=True)
class Chunk:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class SavedTensor:
    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Metadata:
    tensors: Mapping[str, SavedTensor]
    values: Mapping[str, Place]
    """Everything that is no tensor."""


class _Record:
    """Stands for an object of torch's: its attributes, and nothing that can be done with it."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        return self.state.get(name) if isinstance(self.state, dict) else None


def _record(name: str) -> type[_Record]:
    return type(name, (_Record,), {})


_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    f"{_METADATA}.{name}": _record(name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "ChunkStorageMetadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "StorageMeta",
    )
}
_RECORDS["torch.distributed.checkpoint.filesystem._StorageInfo"] = _record("_StorageInfo")
_RECORDS |= {
    f"torch.distributed.checkpoint.planner.{name}": _record(name)
    for name in ("SavePlan", "WriteItem", "TensorWriteData")  # Megatron-Core keeps every rank's plan
}
_INDEX, _WHOLE = _RECORDS[f"{_METADATA}.MetadataIndex"], _RECORDS[f"{_METADATA}.Metadata"]
_INFO = _RECORDS["torch.distributed.checkpoint.filesystem._StorageInfo"]
_TENSOR, _BYTES = _RECORDS[f"{_METADATA}.TensorStorageMetadata"], _RECORDS[f"{_METADATA}.BytesStorageMetadata"]


def _shape(values: Any = ()) -> tuple[int, ...]:
    """Of anything but whole numbers from 0 on one that no tensor has."""
    is_one = isinstance(values, (tuple, list)) and all(_is_count(value) for value in values)
    return tuple(values) if is_one else (-1,)


def _nothing(*_: Any) -> None:
    """What a call would have made does not matter here: layouts, memory formats, where the folder once was."""


_CALLED: dict[str, Callable[..., Any]] = {
    "torch.Size": _shape,
    "torch.serialization._get_layout": _nothing,
    f"{_METADATA}._MEM_FORMAT_ENCODING": _nothing,
    "torch.distributed.checkpoint.planner.WriteItemType": _nothing,
    "pathlib.PosixPath": _nothing,
    "pathlib._local.PosixPath": _nothing,
}
_DTYPES = {str(dtype): dtype for dtype in DTYPES.values()}


class _Unpickler(pickle.Unpickler):
    """Whatever it gives to the file is in the tables above, so that a call or a state can only fill a record."""

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        for known in (_RECORDS, _CALLED, _DTYPES):
            if full in known:
                return known[full]
        if module == "torch" and name.isidentifier():
            return None  # a layout, a memory format, or a type of elements that is not read
        raise UnsafePickleError(
            "the file wants classes or functions outside the allow-list; it was not executed",
            found=full,
            where=METADATA,
            do="do not load it unless you know who made it",
        )

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError("the file refers to what is outside of it", found=repr(pid)[:100], where=METADATA)


def read_metadata(folder: Path) -> Metadata:
    """All faults of what it says are told at once."""
    with open_file(folder, METADATA) as file:
        raw = file.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise CorruptFileError(f"longer than {_MAX_BYTES >> 20} MiB", where=folder / METADATA)
    try:
        whole = _Unpickler(io.BytesIO(raw)).load()
    except UnsafePickleError:
        raise
    except Exception as error:  # whatever an unpickler stumbles over comes of what is in the file
        raise CorruptFileError(
            f"not readable ({type(error).__name__}: {error})"[:300], where=folder / METADATA, do=_COPY
        ) from error
    reading = _Reading(folder, whole)
    if reading.faults:
        raise CorruptFileError(
            f"{METADATA} is not what torch writes: {len(reading.faults)} fault(s)",
            found=reading.faults,
            where=folder,
            do=_COPY,
        )
    return Metadata(reading.tensors, reading.values)


_COPY = "copy it again from where it was saved, or use another checkpoint"


class _Reading:
    def __init__(self, folder: Path, whole: Any):
        self.faults: list[str] = []
        self.tensors: dict[str, SavedTensor] = {}
        self.values: dict[str, Place] = {}
        kinds = whole.get("state_dict_metadata") if isinstance(whole, _WHOLE) else None
        infos = whole.get("storage_data") if isinstance(whole, _WHOLE) else None
        if not isinstance(kinds, dict) or not isinstance(infos, dict):
            self.faults.append("no table of what it holds and where")
            return
        places = dict(self._places(folder, infos))
        for name, kind in kinds.items():
            if not isinstance(name, str):
                self.faults.append(f"a name that is no text: {name!r}"[:100])
            elif isinstance(kind, _BYTES):
                if (place := places.get((name, None))) is not None:
                    self.values[name] = place
            elif isinstance(kind, _TENSOR):
                self._tensor(name, kind, places)
            else:
                self.faults.append(f"{name} is neither a tensor nor a value")

    def _places(self, folder: Path, infos: dict[Any, Any]) -> Iterator[tuple[tuple[str, Any], Place]]:
        for index, info in infos.items():
            name = index.get("fqn") if isinstance(index, _INDEX) else None
            if not isinstance(name, str) or not isinstance(info, _INFO):
                self.faults.append(f"no place of a chunk: {type(index).__name__}, {type(info).__name__}")
                continue
            file, start, num_bytes = (info.get(key) for key in ("relative_path", "offset", "length"))
            if info.get("transform_descriptors"):
                raise UnsupportedCheckpointError("its chunks are compressed or encrypted", found=name, where=folder)
            if fault := path_fault(file):
                self.faults.append(f"{name}: its file's name {fault}")
            elif not _is_count(start) or not _is_count(num_bytes):
                self.faults.append(f"{name}: {num_bytes!r} bytes at {start!r}"[:200])
            else:
                offset = index.get("offset")
                yield (name, None if offset is None else _shape(offset)), Place(file, start, num_bytes)

    def _tensor(self, name: str, kind: _Record, places: Mapping[Any, Place]) -> None:
        shape, dtype = _shape(kind.get("size")), _dtype_of(kind.get("properties"))
        told = kind.get("chunks")
        if dtype is None or len(shape) > _MAX_DIMS or -1 in shape or not isinstance(told, list):
            self.faults.append(f"{name}: no shape, chunks or type of elements that is read ({shape})"[:200])
            return
        chunks = []
        for chunk in told:
            offsets, sizes = (
                _shape(chunk.get(key) if isinstance(chunk, _Record) else None) for key in ("offsets", "sizes")
            )
            place = places.get((name, offsets))
            fits = len(offsets) == len(sizes) == len(shape) and all(
                first >= 0 and extent >= 0 and first + extent <= whole
                for first, extent, whole in zip(offsets, sizes, shape)
            )
            if not fits or place is None:
                self.faults.append(f"{name}: no chunk of {shape}: {sizes} at {offsets}"[:200])
                return
            if all(sizes):
                chunks.append(Chunk(offsets, sizes, place))
        self.tensors[name] = SavedTensor(dtype, shape, tuple(chunks))


def _dtype_of(properties: Any) -> DType | None:
    """`TensorProperties` keeps its values in a tuple, or by name."""
    state = properties.state if isinstance(properties, _Record) else None
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (tuple, list)) else ()
    return next((value for value in values if isinstance(value, DType)), None)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_EXTENT
