"""Writes .pt files: torch.save for small things, and a streaming form for one large tensor.

A .pt file is an uncompressed zip with a pickle that describes tensors and one record of bytes for each.
So a parameter's file can be written front to back from a small buffer, its zip CRC and the checksum of the whole file
coming out of the same pass; torch.load, with mmap too, reads it as any other.

    with TensorFile(path, {"cat_dim": 0}, shape) as file:
        file.write(chunk)                      # flat float32, in order
    file.info                                  # size and CRC-32 of the whole file

Classes of DeepSpeed's for which safe_load has stand-ins are written under DeepSpeed's names.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import types
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.ucp.disk import disk_errors
from megatron.ucp.manifest import FileInfo
from megatron.ucp.safe_load import STAND_INS

_ALIGNMENT = 64
_HEADER = 30
_ZIP64_EXTRA = 20
_FOREIGN_NAMES = {cls: name for cls, name in STAND_INS if isinstance(cls, type)}


class _Pickler(pickle._Pickler):
    """Protocol 2, as torch's; writes stand-ins by the names of what they stand for."""

    dispatch = dict(pickle._Pickler.dispatch)

    def _save_type(self, cls: type) -> None:
        name = _FOREIGN_NAMES.get(cls)
        if name is None:
            self.save_type(cls)
            return
        module, _, attribute = name.rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())
        self.memoize(cls)

    dispatch[type] = _save_type

    def persistent_id(self, value: Any) -> Any:
        return value.identity if isinstance(value, _Storage) else None


_PICKLE_MODULE = types.SimpleNamespace(Pickler=_Pickler, __name__="pickle")


class _Storage:
    """The one storage of a TensorFile, in the form torch's unpickler asks for."""

    def __init__(self, numel: int):
        self.identity = ("storage", torch.FloatStorage, "0", "cpu", numel)


class _Tensor:
    def __init__(self, shape: Sequence[int]):
        self.shape = tuple(int(n) for n in shape)

    def __reduce__(self):
        strides, numel = [], 1
        for extent in reversed(self.shape):
            strides.append(numel)
            numel *= extent
        arguments: tuple[Any, ...] = (_Storage(numel), 0, self.shape, tuple(reversed(strides)), False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


def save(value: Any, path: str | Path) -> None:
    """torch.save, with stand-ins under DeepSpeed's names. Raises NotEnoughSpaceError."""
    with disk_errors(path):
        torch.save(value, path, pickle_module=_PICKLE_MODULE, pickle_protocol=2)


class TensorFile:
    """{**metadata, "param": tensor} as a .pt file, the float32 tensor's elements coming in order through `write`."""

    def __init__(self, path: str | Path, metadata: dict[str, Any], shape: Sequence[int]):
        self.path = Path(path)
        self.info: FileInfo
        """Of the whole file, once it is closed."""
        buffer = io.BytesIO()
        _Pickler(buffer, protocol=2).dump({**metadata, "param": _Tensor(shape)})
        self._pickle = buffer.getvalue()
        self._numel = 1
        for extent in shape:
            self._numel *= extent

    def __enter__(self) -> TensorFile:
        self._file = open(self.path, "wb")
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True)
        try:
            self._begin()
        except BaseException:
            self._abandon()
            raise
        return self

    def _begin(self) -> None:
        self._stem = self.path.stem
        self._record("data.pkl", self._pickle)
        self._record("byteorder", b"little")
        info = zipfile.ZipInfo(f"{self._stem}/data/0", (1980, 1, 1, 0, 0, 0))
        num_bytes = 4 * self._numel
        is_large = num_bytes >= zipfile.ZIP64_LIMIT
        # The data has to start at a multiple of 64, as torch's own: padding goes into an extra field of the header.
        start = self._zip.start_dir + _HEADER + len(info.filename) + (_ZIP64_EXTRA if is_large else 0) + 4
        padding = -start % _ALIGNMENT
        info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        info.file_size = num_bytes
        self._data_info, self._data_start = info, start + padding
        self._data = self._zip.open(info, "w", force_zip64=is_large)

    def write(self, values: torch.Tensor) -> None:
        assert values.dtype == torch.float32 and values.is_contiguous()
        self._data.write(memoryview(values.numpy()).cast("B"))

    def __exit__(self, error_type, value, traceback) -> None:
        if error_type is not None:
            self._abandon()
            return
        try:
            self._data.close()
            self._record("version", b"3\n")
            self._record(".data/serialization_id", b"0" * 40)
            self._zip.close()
            self._file.close()
        except BaseException:
            self._abandon()
            raise
        if self._data_info.file_size != 4 * self._numel:
            raise ValueError(f"{self.path}: {self._data_info.file_size} bytes written of {4 * self._numel}")
        self.info = self._checksum()

    def _abandon(self) -> None:
        """Closed, whatever that says: each would try again to write what the disk did not take, and Python would print
        that when it is collected."""
        for part in (getattr(self, "_data", None), self._zip, self._file):
            with contextlib.suppress(OSError, ValueError):
                if part is not None:
                    part.close()

    def _record(self, name: str, content: bytes) -> None:
        self._zip.writestr(zipfile.ZipInfo(f"{self._stem}/{name}", (1980, 1, 1, 0, 0, 0)), content)

    def _checksum(self) -> FileInfo:
        """The file's CRC from that of the data, which the zip needed anyway, and the few bytes around it."""
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            head = zlib.crc32(file.read(self._data_start))
            file.seek(self._data_start + 4 * self._numel)
            tail = file.read()
        crc = crc32_join(head, self._data_info.CRC, 4 * self._numel)
        return FileInfo(size, f"{crc32_join(crc, zlib.crc32(tail), len(tail)):08x}")


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
