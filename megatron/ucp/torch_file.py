"""Writes .pt files, without torch: what torch.save writes, of any size, from a small buffer.

A .pt file is an uncompressed zip with a pickle that describes tensors and one record of bytes for each.
So a file can be written front to back, its zip CRCs and the checksum of the whole file coming out of the same pass;
torch.load, with mmap too, reads it as any other.

    def write(record):
        for _ in range(6): record.write(np.zeros(1000, np.float32))
    info = save_streamed({"cat_dim": 0, "param": StreamedTensor((2, 3000), FLOAT32, write)}, "fp32.pt")
    info.bytes, info.crc32                     # of the whole file

Tensors in the content may be torch's, StoredTensors, or made while they are written. Classes of DeepSpeed's that are
inert here are written under DeepSpeed's names.
"""

from __future__ import annotations

import copyreg
import io
import math
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from megatron.ucp import native
from megatron.ucp.crc32 import crc32, crc32_join
from megatron.ucp.digest import Digest
from megatron.ucp.disk import disk_errors
from megatron.ucp.errors import CorruptFileError
from megatron.ucp.inert import INERT
from megatron.ucp.manifest import FileInfo
from megatron.ucp.output_file import OutputFile, open_output
from megatron.ucp.stand_ins import Stranger, global_of
from megatron.ucp.stored import DTYPES, DType, Size, StoredTensor, as_stored, is_tensor, row_major
from megatron.ucp.zip_layout import Entry, central_directory, local_header

_ALIGNMENT = 64
_CRC_FIELD = 14
"""Byte of a local header."""
_STRETCH = 1 << 18
"""Bytes that are summed right after they were copied, while they are in the cache."""


class _Global:
    """Stands in a pickle for a class or function of torch's."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *_: Any) -> NoReturn:
        raise TypeError(f"{self.name} is only named here")


_REBUILD = _Global("torch._utils._rebuild_tensor_v2")
_STORAGES = {dtype: _Global(f"torch.{dtype.storage}") for dtype in DTYPES.values()}
_FOREIGN_NAMES = {Size: "torch.Size", **{cls: name for cls, name in INERT if isinstance(cls, type)}}


@dataclass(frozen=True, eq=False)
class StreamedTensor:
    """A tensor in a content that is to be saved, whose values are made while they are written. One that stands in two
    places is one tensor in the file too."""

    shape: tuple[int, ...]
    dtype: DType
    write: Callable[[Record], None]
    """Gives the flattened values to the record, in order."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Record:
    """Where a tensor's values go."""

    def __init__(self, output: OutputFile, dtype: DType):
        self._output, self._dtype = output, dtype
        self.num_bytes, self.crc = 0, 0

    @property
    def gathers(self) -> bool:
        """Whether values can be taken from files in one pass: of fp32, where the kernel was built."""
        return native.kernel is not None and self._dtype.name == "float32"

    def write(self, values: np.ndarray) -> None:
        """The next ones, contiguous. Raises ValueError where they are not the tensor's."""
        if values.dtype != self._dtype.numpy:
            raise ValueError(f"values of {values.dtype} for a tensor of {self._dtype}")
        content = values.reshape(-1).view(np.uint8)
        for start in range(0, content.size, _STRETCH):
            part = content[start : start + _STRETCH]
            self._output.write(part)
            self.crc = crc32(part, self.crc)
        self.num_bytes += content.size

    def gather(
        self, handles: list[int], rows: np.ndarray, index: int, seeds: tuple[int, int]
    ) -> tuple[Digest, np.ndarray]:
        """Where `gathers`: the next values, from open files. `rows`: int64 [n, 3], (number of the handle, first byte,
        bytes); `index`: of the first value in the atomic tensor. Returns their digest (digest.seeds), and the CRC-32 of
        each row, -1 of small ones. Raises EOFError with the number of a file that ends too early."""
        rows, crcs = np.ascontiguousarray(rows, dtype=np.int64), np.empty(len(rows), dtype=np.int64)
        writer: Any = self._output
        addresses = rows.ctypes.data, len(rows), crcs.ctypes.data
        *lanes, self.crc = writer.gather(handles, *addresses, index, *seeds, self.crc)
        self.num_bytes += int(rows[:, 2].sum())
        return Digest(*lanes), crcs


def save_streamed(content: Any, path: str | Path) -> FileInfo:
    """torch.save of a content in which tensors may be StreamedTensors or StoredTensors. What safe_load put in the place
    of objects of unknown classes is written as those objects, so that a program that knows their classes has them
    again.

    Returns size and checksum of the file. Raises NotEnoughSpaceError, CorruptFileError for a value that cannot be
    written (nested too deep), and ValueError where fewer or more values came than
    their tensor has."""
    path = Path(path)
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    try:
        pickler.dump(content)
    except (AttributeError, RecursionError, TypeError, ValueError, pickle.PicklingError) as error:
        raise CorruptFileError(
            "it holds a value that cannot be written again",
            found=f"{type(error).__name__}: {error}"[:200],
            where=path.name,
            do="use another checkpoint",
        ) from error
    return write_archive(path, buffer.getvalue(), pickler.tensors)


def write_archive(path: Path, content: bytes, tensors: Sequence[StreamedTensor]) -> FileInfo:
    """The file of a content that is pickled already, whose tensors are numbered in it. Raises as save_streamed."""
    with disk_errors(path):
        archive = _Archive(open_output(path), path.stem)
        try:
            archive.add("data.pkl", content)
            archive.add("byteorder", b"little")
            for number, tensor in enumerate(tensors):
                archive.add_tensor(f"data/{number}", tensor)
            archive.add("version", b"3\n")
            archive.add(".data/serialization_id", b"0" * 40)
            return archive.close()
        except BaseException:
            archive.abandon()
            raise


class _Storage:
    def __init__(self, tensor: StreamedTensor, number: int):
        self.identity = "storage", _STORAGES[tensor.dtype], str(number), "cpu", math.prod(tensor.shape)


class _Pickler(pickle._Pickler):
    """Protocol 2, as torch's; tensors become records of the archive, and inert stand-ins what they stand for."""

    dispatch = dict(pickle._Pickler.dispatch)

    def __init__(self, file: BinaryIO):
        super().__init__(file, protocol=2)
        self.tensors: list[StreamedTensor] = []
        self._of_torch: dict[int, tuple[str, Any]] = {}

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Storage):
            return value.identity
        torch = sys.modules.get("torch")
        if torch is None or not (isinstance(value, torch.storage.TypedStorage) or torch.is_storage(value)):
            return None
        return self._identity_of_torchs(value)

    def _identity_of_torchs(self, value: Any) -> Any:
        """Of the storage of a tensor that is not described as its elements (of a type without a storage class, sparse,
        quantized): its bytes, and torch's own word for the rest, as torch.save has it."""
        import torch

        is_typed = isinstance(value, torch.storage.TypedStorage)
        storage = value._untyped_storage if is_typed else value
        kind = getattr(torch, value._pickle_storage_type()) if is_typed else torch.UntypedStorage
        size = value._size() if is_typed else storage.nbytes()
        if storage._cdata not in self._of_torch:
            number = len(self.tensors)
            raw = torch.empty(0, dtype=torch.uint8).set_(storage.cpu())
            self.tensors.append(_streamed(StoredTensor.of_torch(raw)))
            self._of_torch[storage._cdata] = str(number), storage  # kept, so that no other takes its place
        return "storage", kind, self._of_torch[storage._cdata][0], "cpu", size

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Stranger):  # inert here, and written as what the file had asked for
            made = (
                (type(value), value.values) if value.is_called else (copyreg.__newobj__, (type(value), *value.values))
            )
            return made if value.state is None else (*made, value.state)
        if isinstance(value, Size):
            return Size, (tuple(value),)
        if isinstance(value, StreamedTensor):
            return self._rebuilt(value, 0, value.shape, row_major(value.shape))
        if not is_tensor(value):
            return NotImplemented
        try:
            tensor = as_stored(value)
        except (TypeError, ValueError):  # it is not its elements, or of a type that has no name here: torch's own words
            return NotImplemented
        if tensor.numel() * tensor.element_size() <= tensor.storage.num_bytes:
            return self._rebuilt(_streamed(tensor), 0, tensor.shape, row_major(tensor.shape))
        # Fewer elements than places: as it lies, so that it takes no more room than it did.
        held = tensor.storage.num_bytes // tensor.element_size()
        whole = StoredTensor(tensor.dtype, (held,), (1,), 0, tensor.storage)
        return self._rebuilt(_streamed(whole), tensor.offset, tensor.shape, tensor.strides)

    def _rebuilt(self, held: StreamedTensor, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        storage = _Storage(held, len(self.tensors))
        self.tensors.append(held)
        return _REBUILD, (storage, offset, shape, strides, False, OrderedDict())

    def _write_global(self, value: Any, name: str) -> None:
        module, _, attribute = name.rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())
        self.memoize(value)

    def _save_type(self, cls: type) -> None:
        name = _FOREIGN_NAMES.get(cls) or global_of(cls)
        if name is None:
            self.save_type(cls)
        else:
            self._write_global(cls, name)

    dispatch[type] = _save_type
    dispatch[_Global] = lambda self, value: self._write_global(value, value.name)
    dispatch[DType] = lambda self, value: self._write_global(value, str(value))


def _streamed(tensor: StoredTensor) -> StreamedTensor:
    def write(record: Record) -> None:
        record.write(tensor.array())

    return StreamedTensor(tensor.shape, tensor.dtype, write)


class _Archive:
    """The zip: records one after the other, those of tensors at multiples of 64 bytes, as torch's own."""

    def __init__(self, output: OutputFile, stem: str):
        self._output = output
        self._stem = stem
        self._entries: list[Entry] = []
        self._crc = 0
        """Of what was written so far."""

    def add(self, name: str, content: bytes) -> None:
        entry = Entry(f"{self._stem}/{name}", self._output.position, len(content), crc32(content))
        self._entries.append(entry)
        self._write(local_header(entry) + content)

    def add_tensor(self, name: str, tensor: StreamedTensor) -> None:
        position = self._output.position
        entry = Entry(f"{self._stem}/{name}", position, tensor.num_bytes, 0, b"FB\0\0")
        # Padding goes into an extra field of the header.
        padding = -(position + len(local_header(entry))) % _ALIGNMENT
        entry = entry.with_extra(b"FB" + padding.to_bytes(2, "little") + b"Z" * padding)
        self._output.write(local_header(entry))
        record = Record(self._output, tensor.dtype)
        tensor.write(record)
        if record.num_bytes != tensor.num_bytes:
            raise ValueError(f"{name}: {record.num_bytes} bytes written of {tensor.num_bytes}")
        entry = entry.with_crc(record.crc)
        self._entries.append(entry)
        self._output.patch(position + _CRC_FIELD, record.crc.to_bytes(4, "little"))
        self._crc = crc32_join(crc32(local_header(entry), self._crc), record.crc, record.num_bytes)

    def close(self) -> FileInfo:
        self._write(central_directory(self._entries, self._output.position))
        return FileInfo(self._output.close(), f"{self._crc:08x}")

    def abandon(self) -> None:
        self._output.abandon()

    def _write(self, content: bytes) -> None:
        self._output.write(content)
        self._crc = crc32(content, self._crc)
