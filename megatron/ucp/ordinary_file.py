"""Reads .pt files as training programs write them, without torch: a zip of stored records, and a pickle of plain
values and dense tensors. Tensors come as StoredTensors: where they lie, none of their bytes.

Whatever is not ordinary (another format, compressed records, classes that are not listed here, opcodes that torch does
not write, anything that does not fit together) is not judged here: NotOrdinary, and safe_load, which has the last word,
reads the file. So this reader may refuse what it likes, and must only never do what the file says beyond making values.

    content = read_ordinary(path)
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NoReturn

from megatron.ucp.inert import INERT
from megatron.ucp.stored import DTYPES, DType, MappedFile, Size, Storage, StoredTensor

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_MAX_PICKLE = 1 << 30
_STORAGES = {f"torch.{dtype.storage}": dtype for dtype in DTYPES.values()}


class NotOrdinary(Exception):
    """For safe_load to look at."""


def read_ordinary(path: Path) -> Any:
    """The file's content. Raises NotOrdinary, or OSError where it cannot be opened."""
    if not path.is_file():  # a pipe would be waited for
        _refuse("no regular file")
    return read_ordinary_part(MappedFile(path), 0, path.stat().st_size)


def read_ordinary_part(mapped: MappedFile, start: int, num_bytes: int) -> Any:
    """The content of a .pt file that lies in another file (PyTorch DCP puts many into one). Raises as read_ordinary."""
    with open(mapped.path, "rb") as raw:
        try:
            with zipfile.ZipFile(_Part(raw, start, num_bytes)) as file:
                return _Reader(mapped, file, start, num_bytes).load()
        except NotOrdinary:
            raise
        except Exception as error:  # whatever the zip reader and the unpickler stumble over is what is in the file
            raise NotOrdinary(f"{type(error).__name__}: {error}") from error


def read_content(path: Path) -> Any:
    """Tensors as StoredTensors; what is not ordinary is read with torch, and they are torch's."""
    try:
        return read_ordinary(path)
    except (NotOrdinary, OSError):
        from megatron.ucp.safe_load import load  # imports torch

        return load(path)


def _refuse(what: object) -> NoReturn:
    raise NotOrdinary(str(what))


class _Part(io.RawIOBase):
    """Some bytes of an open file as a file."""

    def __init__(self, file: BinaryIO, start: int, num_bytes: int):
        self._file, self._start = file, start
        # What is cut off ends where the file ends.
        self._size = max(0, min(num_bytes, os.fstat(file.fileno()).st_size - start))
        self._position = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(f"before the beginning: {base + offset}")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._position)
        self._file.seek(self._start + self._position)
        content = self._file.read(left if size is None or size < 0 else min(size, left))
        self._position += len(content)
        return content


class _Records:
    """Of the zip: name -> (start, bytes)."""

    def __init__(self, file: zipfile.ZipFile, size: int):
        self._file = file
        self._raw = file.fp
        self._size = size
        self._infos = {info.filename: info for info in file.infolist()}
        if len(self._infos) != len(file.infolist()):
            _refuse("two records of one name")
        pickles = [name for name in self._infos if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            _refuse("no data.pkl")
        self.stem = pickles[0].removesuffix("data.pkl")
        if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in self._infos.values()):
            _refuse("compressed or encrypted records")

    def read(self, name: str, most: int) -> bytes:
        info = self._infos.get(self.stem + name)
        if info is None:
            _refuse(f"no {name}")
        if info.file_size > most or info.compress_size != info.file_size:
            _refuse(f"{name} of {info.file_size} bytes")
        return self._file.read(info)  # which compares its CRC

    def has(self, name: str) -> bool:
        return self.stem + name in self._infos

    def place(self, name: str) -> tuple[int, int]:
        """(start, bytes) of the record's content. The directory says where its header is, the header how long it is."""
        info = self._infos.get(self.stem + name)
        if info is None or self._raw is None:
            _refuse(f"no {name}")
        self._raw.seek(info.header_offset)
        header = _LOCAL_HEADER.unpack(self._raw.read(_LOCAL_HEADER.size))
        if header[0] != b"PK\3\4":
            _refuse(f"no header of {name}")
        start = info.header_offset + _LOCAL_HEADER.size + header[-2] + header[-1]
        if info.compress_size != info.file_size or start + info.file_size > self._size:
            _refuse(f"{name} leaves the file")
        return start, info.file_size


class _StorageType:
    """What stands for torch.FloatStorage in the pickle."""

    def __init__(self, dtype: DType):
        self.dtype = dtype


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any = False, hooks: Any = None, *more: Any
) -> StoredTensor:
    if not isinstance(storage, tuple) or len(storage) != 2 or hooks or any(more):
        _refuse("a tensor of an unusual kind")
    dtype, held = storage
    return StoredTensor(dtype, tuple(shape), tuple(strides), offset, held)


def _rebuild_parameter(data: Any, requires_grad: Any = False, hooks: Any = None) -> StoredTensor:
    if not isinstance(data, StoredTensor) or hooks:
        _refuse("a parameter of an unusual kind")
    return data


_CALLED = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.Size": Size,
    **{name: made for made, name in INERT if not isinstance(made, type)},
}
"""What a file may call. Classes of INERT are made without a call, and given their attributes."""
_MADE = {name: made for made, name in INERT if isinstance(made, type)}
_DTYPES = {str(dtype): dtype for dtype in DTYPES.values()}


class _Reader(pickle._Unpickler):
    """Python's unpickler, in its form in Python, with the opcodes that torch.save writes and no others."""

    stack: list[Any]
    append: Callable[[Any], None]

    def __init__(self, mapped: MappedFile, file: zipfile.ZipFile, start: int, num_bytes: int):
        self._records = _Records(file, num_bytes)
        self._mapped, self._start = mapped, start
        self._storages: dict[str, tuple[DType, Storage]] = {}
        super().__init__(io.BytesIO(self._records.read("data.pkl", _MAX_PICKLE)), encoding="utf-8")
        if self._records.has("byteorder") and self._records.read("byteorder", 16) != b"little":
            _refuse("another byte order")

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        for known in (_CALLED, _MADE, _DTYPES):
            if full in known:
                return known[full]
        if full in _STORAGES:
            return _StorageType(_STORAGES[full])
        _refuse(f"it names {full}")

    def persistent_load(self, pid: Any) -> tuple[DType, Storage]:
        kind, type_, key, _, numel = pid
        if kind != "storage" or not isinstance(type_, _StorageType) or type(numel) is not int or numel < 0:
            _refuse("an unusual storage")
        if key not in self._storages:
            start, num_bytes = self._records.place(f"data/{key}")
            if num_bytes < numel * type_.dtype.itemsize:
                _refuse(f"data/{key} is too short")
            self._storages[key] = type_.dtype, Storage(self._mapped, self._start + start, num_bytes)
        dtype, storage = self._storages[key]
        if dtype is not type_.dtype:
            _refuse(f"data/{key} under two types")
        return dtype, storage

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(arguments, tuple) or not any(function is known for known in _CALLED.values()):
            _refuse("a call of something else")
        self.stack[-1] = function(*arguments)

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        cls = self.stack.pop()
        if arguments != () or not any(cls is known for known in _MADE.values()):
            _refuse("an object of something else")
        self.append(cls.__new__(cls))

    def load_build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if type(made) not in (OrderedDict, *_MADE.values()) or type(state) is not dict:
            _refuse("a state of something else")
        # torch's state dicts carry versions in an attribute; any other could take the place of a method.
        if any(type(key) is not str for key in state) or (type(made) is OrderedDict and set(state) - {"_metadata"}):
            _refuse("unusual attributes")
        vars(made).update(state)

    def load_persid(self) -> None:
        _refuse("a persistent id in text")

    dispatch: ClassVar[dict[int, Any]] = {
        **{
            code[0]: pickle._Unpickler.dispatch[code[0]]
            for code in (
                pickle.PROTO, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT,
                pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.EMPTY_TUPLE,
                pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND,
                pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS, pickle.BINPUT, pickle.LONG_BINPUT,
                pickle.BINGET, pickle.LONG_BINGET, pickle.GLOBAL, pickle.BINPERSID, pickle.SHORT_BINSTRING,
            )
        },
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
    }  # fmt: skip
