"""Writes .pt files: torch.save for small things, and a streaming form for what is larger than memory should hold.

A .pt file is an uncompressed zip with a pickle that describes tensors and one record of bytes for each.
So a file can be written front to back from a small buffer, its zip CRCs and the checksum of the whole file coming out
of the same pass; torch.load, with mmap too, reads it as any other.

    stretches = lambda: (torch.zeros(1000) for _ in range(6))
    info = save_streamed({"cat_dim": 0, "param": StreamedTensor((2, 3000), torch.float32, stretches)}, "fp32.pt")
    info.bytes, info.crc32                     # of the whole file

Classes of DeepSpeed's for which safe_load has stand-ins are written under DeepSpeed's names.
"""

from __future__ import annotations

import contextlib
import copyreg
import io
import math
import pickle
import types
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron.ucp.disk import disk_errors
from megatron.ucp.errors import CorruptFileError
from megatron.ucp.manifest import FileInfo
from megatron.ucp.safe_load import STAND_INS
from megatron.ucp.stand_ins import Stranger, global_of

_ALIGNMENT = 64
_HEADER = 30
_ZIP64_EXTRA = 20
_BLOCK = 1 << 20
_READ_AGAIN = 1 << 16
"""Bytes of a record up to which reading it again costs less than joining its checksum to the others."""
_FOREIGN_NAMES = {cls: name for cls, name in STAND_INS if isinstance(cls, type)}


class _Pickler(pickle._Pickler):
    """Protocol 2, as torch's; writes stand-ins by the names of what they stand for."""

    dispatch = dict(pickle._Pickler.dispatch)

    def _save_type(self, cls: type) -> None:
        name = _FOREIGN_NAMES.get(cls) or global_of(cls)
        if name is None:
            self.save_type(cls)
            return
        module, _, attribute = name.rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())
        self.memoize(cls)

    dispatch[type] = _save_type


_PICKLE_MODULE = types.SimpleNamespace(Pickler=_Pickler, __name__="pickle")


def save(value: Any, path: str | Path) -> None:
    """torch.save, with stand-ins under DeepSpeed's names. Raises NotEnoughSpaceError."""
    with disk_errors(path):
        torch.save(value, path, pickle_module=_PICKLE_MODULE, pickle_protocol=2)


@dataclass(frozen=True, eq=False)
class StreamedTensor:
    """A tensor in a content that is to be saved, whose values are made while they are written. One that stands in two
    places is one tensor in the file too."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stretches: Callable[[], Iterable[torch.Tensor]]
    """Gives the flattened values in order, in contiguous CPU tensors of any length; each is written before the next is
    asked for."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def save_streamed(content: Any, path: str | Path) -> FileInfo:
    """torch.save of a content in which tensors may be StreamedTensors. What safe_load put in the place of objects of
    unknown classes is written as those objects, so that a program that knows their classes has them again.

    Returns size and checksum of the file. Raises NotEnoughSpaceError, CorruptFileError for a value that cannot be
    written (nested too deep, a tensor larger than what it lies in), and ValueError where stretches are not as long as
    their tensor."""
    path = Path(path)
    buffer = io.BytesIO()
    pickler = _StreamPickler(buffer)
    try:
        pickler.dump(content)
    except (AttributeError, RecursionError, TypeError, ValueError, pickle.PicklingError) as error:
        raise CorruptFileError(
            "it holds a value that cannot be written again",
            found=f"{type(error).__name__}: {error}"[:200],
            where=path.name,
            do="use another checkpoint",
        ) from error
    with disk_errors(path), open(path, "wb") as file:
        archive = _Archive(file, path.stem)
        try:
            archive.add("data.pkl", buffer.getvalue())
            archive.add("byteorder", b"little")
            for number, tensor in enumerate(pickler.tensors):
                archive.add_tensor(f"data/{number}", tensor)
            archive.add("version", b"3\n")
            archive.add(".data/serialization_id", b"0" * 40)
            archive.close()
        except BaseException:
            archive.abandon()
            raise
    return archive.checksum(path)


class _Storage:
    def __init__(self, tensor: StreamedTensor, number: int):
        name = torch.storage._dtype_to_storage_type_map().get(tensor.dtype)
        if name is None:
            raise TypeError(f"tensors of {tensor.dtype} have no storage class in the format of .pt files")
        self.identity = "storage", getattr(torch, name), str(number), "cpu", math.prod(tensor.shape)


class _StreamPickler(_Pickler):
    """Tensors become records of the archive, and inert stand-ins what they stand for."""

    def __init__(self, file: BinaryIO):
        super().__init__(file, protocol=2)
        self.tensors: list[StreamedTensor] = []

    def persistent_id(self, value: Any) -> Any:
        return value.identity if isinstance(value, _Storage) else None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Stranger):  # inert here, and written as what the file had asked for
            made = (
                (type(value), value.values) if value.is_called else (copyreg.__newobj__, (type(value), *value.values))
            )
            return made if value.state is None else (*made, value.state)
        tensor = _streamed(value) if isinstance(value, torch.Tensor) else value
        if not isinstance(tensor, StreamedTensor):
            return NotImplemented
        strides, numel = [], 1
        for extent in reversed(tensor.shape):
            strides.append(numel)
            numel *= extent
        storage = _Storage(tensor, len(self.tensors))
        self.tensors.append(tensor)
        arguments: tuple[Any, ...] = storage, 0, tensor.shape, tuple(reversed(strides)), False, OrderedDict()
        return torch._utils._rebuild_tensor_v2, arguments


def _streamed(values: torch.Tensor) -> StreamedTensor:
    if values.layout != torch.strided or values.is_quantized:
        raise TypeError(f"a {values.layout} tensor cannot be written as its elements")
    if values.device.type == "meta" or values.numel() * values.element_size() > values.untyped_storage().nbytes():
        raise ValueError(f"a tensor of {tuple(values.shape)} claims more than it lies in")
    whole = values.detach()
    return StreamedTensor(tuple(whole.shape), whole.dtype, lambda: [whole.cpu().contiguous().view(-1)])


class _Archive:
    """The zip: records one after the other, those of tensors at multiples of 64 bytes, as torch's own."""

    def __init__(self, file: BinaryIO, stem: str):
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._stem = stem
        self._record: Any = None
        self._joined: list[tuple[int, int, int]] = []
        """(start, bytes, CRC-32) of large records."""

    def add(self, name: str, content: bytes) -> None:
        self._zip.writestr(zipfile.ZipInfo(f"{self._stem}/{name}", (1980, 1, 1, 0, 0, 0)), content)

    def add_tensor(self, name: str, tensor: StreamedTensor) -> None:
        info = zipfile.ZipInfo(f"{self._stem}/{name}", (1980, 1, 1, 0, 0, 0))
        num_bytes = tensor.num_bytes
        is_large = num_bytes >= zipfile.ZIP64_LIMIT
        # Padding goes into an extra field of the header.
        start = self._zip.start_dir + _HEADER + len(info.filename) + (_ZIP64_EXTRA if is_large else 0) + 4
        padding = -start % _ALIGNMENT
        info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        info.file_size = num_bytes
        with self._zip.open(info, "w", force_zip64=is_large) as self._record:
            for values in tensor.stretches():
                if values.dtype != tensor.dtype:
                    raise ValueError(f"{name}: values of {values.dtype} for a tensor of {tensor.dtype}")
                self._record.write(memoryview(values.view(torch.uint8).numpy()))
        if info.file_size != num_bytes:
            raise ValueError(f"{name}: {info.file_size} bytes written of {num_bytes}")
        if num_bytes > _READ_AGAIN:
            self._joined.append((start + padding, num_bytes, info.CRC))

    def close(self) -> None:
        self._zip.close()

    def abandon(self) -> None:
        """Closed, whatever that says: each would try again to write what the disk did not take, and Python would print
        that when it is collected."""
        for part in (self._record, self._zip):
            with contextlib.suppress(OSError, ValueError):
                if part is not None:
                    part.close()

    def checksum(self, path: Path) -> FileInfo:
        """The file's CRC from those of large records, which the zip needed anyway, and the bytes around them."""
        crc, position, size = 0, 0, path.stat().st_size
        with open(path, "rb") as file:
            for start, num_bytes, record in (*self._joined, (size, 0, 0)):
                file.seek(position)
                for begin in range(position, start, _BLOCK):
                    crc = zlib.crc32(file.read(min(_BLOCK, start - begin)), crc)
                crc = crc32_join(crc, record, num_bytes) if num_bytes else crc
                position = start + num_bytes
        return FileInfo(size, f"{crc:08x}")


def crc32_join(first: int, second: int, second_length: int) -> int:
    """CRC-32 of two stretches from the CRC of each (zlib's crc32_combine, which Python does not offer)."""
    # Appending n zero bytes multiplies by x^(8n) modulo the polynomial, bit-reflected: x^0 is the highest bit.
    power, factor, count = 1 << 31, 1 << 23, second_length
    while count:
        if count & 1:
            power = _multiply(power, factor)
        factor = _multiply(factor, factor)
        count >>= 1
    return _multiply(power, first) ^ second


def _multiply(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = (b >> 1) ^ 0xEDB88320 if b & 1 else b >> 1
    return product
