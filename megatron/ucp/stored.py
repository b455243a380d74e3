"""A tensor where it lies: in a file, at a known byte, or in memory. What the library reads tensors as, without torch.

    tensor = read_ordinary(path)["module"]["final_norm.weight"]        # ordinary_file.py
    tensor.shape, tensor.dtype, tensor.numel()                         # nothing is read
    tensor.array()                                                     # flat, memory-mapped
    tensor.to_torch()

Method names are torch's, so that code asks either the same questions. Names of element types and of their storage
classes: torch/storage.py.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron.ucp.errors import CorruptFileError

if TYPE_CHECKING:
    import torch

_LINE_BYTES, _BLOCK_ROWS = 64, 1024


@dataclass(frozen=True)
class DType:
    """Of elements. `numpy` is what has the same bits where numpy has no such type (bfloat16: uint16)."""

    name: str
    storage: str
    numpy: np.dtype
    is_floating_point: bool = False
    is_complex: bool = False

    @property
    def itemsize(self) -> int:
        return self.numpy.itemsize

    def __str__(self) -> str:
        return f"torch.{self.name}"

    __repr__ = __str__


def _dtype(name: str, storage: str, numpy: str, is_floating_point: bool = False, is_complex: bool = False) -> DType:
    return DType(name, storage, np.dtype(numpy), is_floating_point, is_complex)


DTYPES = {
    dtype.name: dtype
    for dtype in (
        _dtype("float64", "DoubleStorage", "<f8", is_floating_point=True),
        _dtype("float32", "FloatStorage", "<f4", is_floating_point=True),
        _dtype("float16", "HalfStorage", "<f2", is_floating_point=True),
        _dtype("bfloat16", "BFloat16Storage", "<u2", is_floating_point=True),
        _dtype("int64", "LongStorage", "<i8"),
        _dtype("int32", "IntStorage", "<i4"),
        _dtype("int16", "ShortStorage", "<i2"),
        _dtype("int8", "CharStorage", "i1"),
        _dtype("uint8", "ByteStorage", "u1"),
        _dtype("bool", "BoolStorage", "?"),
        _dtype("complex128", "ComplexDoubleStorage", "<c16", is_complex=True),
        _dtype("complex64", "ComplexFloatStorage", "<c8", is_complex=True),
    )
}
FLOAT32 = DTYPES["float32"]
BFLOAT16 = DTYPES["bfloat16"]


_LET_GO = 1 << 20
"""Bytes below which pages that were read are not worth a call."""
_READ = 1 << 16
"""Bytes that are read rather than mapped: a mapped page of a file that was cut short meanwhile ends the process."""


class Size(tuple):
    """torch.Size, in files."""

    def numel(self) -> int:
        return math.prod(self)


class MappedFile:
    """Maps the file when its bytes are first asked for."""

    def __init__(self, path: Path):
        self.path = path
        self._bytes: np.ndarray | None = None
        self._mapped: mmap.mmap | None = None
        self._lock = threading.Lock()

    def bytes(self) -> np.ndarray:
        with self._lock:
            if self._bytes is None:
                with open(self.path, "rb") as file:
                    # A private mapping: torch takes no memory that it may not write to, and the file stays as it is.
                    self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                self._bytes = np.frombuffer(self._mapped, dtype=np.uint8)
            return self._bytes

    def will_need(self, start: int, stop: int) -> None:
        """The system begins to read bytes [start, stop)."""
        self.bytes()
        assert self._mapped is not None
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        stop = min(stop, len(self._mapped))
        if stop > first:
            self._mapped.madvise(mmap.MADV_WILLNEED, first, stop - first)

    def let_go(self, start: int, stop: int) -> None:
        """Bytes [start, stop) have been read: their pages are the page cache's again, and not this process's too."""
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        if self._mapped is not None and stop - first >= _LET_GO:
            self._mapped.madvise(mmap.MADV_DONTNEED, first, stop - first)


@dataclass(frozen=True, eq=False)
class Storage:
    """`num_bytes` from `start` of a file, or of memory."""

    origin: MappedFile | np.ndarray
    start: int
    num_bytes: int

    def bytes(self) -> np.ndarray:
        """Raises CorruptFileError where the file has become shorter than it was when it was opened."""
        if not isinstance(self.origin, MappedFile):
            return self.origin[self.start : self.start + self.num_bytes]
        if self.num_bytes <= _READ:
            held = np.fromfile(self.origin.path, np.uint8, self.num_bytes, offset=self.start)
        else:
            held = self.origin.bytes()[self.start : self.start + self.num_bytes]
        if held.size != self.num_bytes:
            raise CorruptFileError("the file became shorter while it was read", where=self.origin.path)
        return held


def in_order(values: np.ndarray) -> np.ndarray:
    """np.ascontiguousarray(values). A transposed matrix is copied by blocks that are one line of the processor's cache
    high: numpy reads a line for every element (4096 x 16384 of fp32: 1.5 s against 0.15)."""
    if values.ndim != 2 or values.flags.c_contiguous or not values.flags.f_contiguous:
        return np.ascontiguousarray(values)
    made = np.empty(values.shape, dtype=values.dtype)
    height = max(1, _LINE_BYTES // values.itemsize)
    for column in range(0, values.shape[1], height):
        for row in range(0, values.shape[0], _BLOCK_ROWS):
            block = slice(row, row + _BLOCK_ROWS), slice(column, column + height)
            made[block] = values[block]
    return made


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """Strides and offset count elements, as torch's do. What is outside its storage is refused when it is made."""

    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage: Storage

    def __post_init__(self) -> None:
        numbers = (*self.shape, *self.strides, self.offset)
        if len(self.shape) != len(self.strides) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"no shape, strides and offset: {self.shape}, {self.strides}, {self.offset}")
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        if self.numel() and (last + 1) * self.dtype.itemsize > self.storage.num_bytes:
            raise ValueError(f"a tensor of {self.shape} claims more than the {self.storage.num_bytes} bytes it lies in")

    @classmethod
    def of_array(cls, values: np.ndarray, dtype: DType | None = None) -> StoredTensor:
        """In memory. `dtype`: where numpy has no such type."""
        values = in_order(values)
        dtype = dtype or DTYPES[values.dtype.name]
        raw = values.reshape(-1).view(np.uint8)
        return cls(dtype, values.shape, row_major(values.shape), 0, Storage(raw, 0, raw.size))

    @classmethod
    def of_torch(cls, values: torch.Tensor) -> StoredTensor:
        """Its elements, in memory or where torch has mapped them. Raises TypeError for what has none of its own
        (sparse, quantized, without memory), or of a type that .pt files have no storage class for."""
        import torch

        dtype = DTYPES.get(str(values.dtype).removeprefix("torch."))
        if dtype is None or values.is_quantized:
            raise TypeError(f"tensors of {values.dtype} have no storage class in the format of .pt files")
        if values.layout != torch.strided or values.device.type == "meta":
            raise TypeError(f"a {values.layout} tensor ({values.device}) cannot be written as its elements")
        if values.numel() * values.element_size() > values.untyped_storage().nbytes():
            raise ValueError(f"a tensor of {tuple(values.shape)} claims more than it lies in")
        whole = values.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)
        raw = whole.view(torch.uint8).numpy() if whole.numel() else np.empty(0, np.uint8)
        shape = tuple(values.shape)
        return cls(dtype, shape, row_major(shape), 0, Storage(raw, 0, raw.size))

    def numel(self) -> int:
        return math.prod(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def is_complex(self) -> bool:
        return self.dtype.is_complex

    def is_contiguous(self) -> bool:
        expected = row_major(self.shape)
        return not self.numel() or all(
            n == 1 or have == want for n, have, want in zip(self.shape, self.strides, expected, strict=True)
        )

    @property
    def position(self) -> tuple[Path, int] | None:
        """(file, byte) where its first element lies, of one that lies in one stretch of a file; else None."""
        if not isinstance(self.storage.origin, MappedFile) or not self.is_contiguous():
            return None
        return self.storage.origin.path, self.storage.start + self.offset * self.dtype.itemsize

    def flat(self) -> StoredTensor:
        """One-dimensional; copied into memory where it does not lie in one stretch."""
        if not self.is_contiguous():
            return StoredTensor.of_array(self.array(), self.dtype)
        return StoredTensor(self.dtype, (self.numel(),), (1,), self.offset, self.storage)

    def part(self, start: int, stop: int) -> StoredTensor:
        """Elements [start, stop) of the flattened tensor, or as many of them as it has."""
        whole = self.flat()
        start = min(start, self.numel())
        numel = max(0, min(stop, self.numel()) - start)
        return StoredTensor(self.dtype, (numel,), (1,), whole.offset + start, whole.storage)

    def array(self) -> np.ndarray:
        """Flattened values, mapped where they lie in one stretch, in the type of `dtype.numpy`."""
        raw = self.storage.bytes()
        size = self.dtype.itemsize
        whole = raw[: raw.size // size * size].view(self.dtype.numpy)
        if self.is_contiguous():
            return whole[self.offset : self.offset + self.numel()]
        strides = tuple(stride * size for stride in self.strides)
        spread = np.lib.stride_tricks.as_strided(whole[self.offset :], self.shape, strides)
        return in_order(spread).reshape(-1)

    def will_need(self, start: int, stop: int) -> int:
        """The system begins to read elements [start, stop) of a tensor in one stretch. How many bytes those are; 0
        where they are read when they are asked for."""
        if (place := self.position) is None or not isinstance(origin := self.storage.origin, MappedFile):
            return 0
        if self.storage.num_bytes <= _READ:
            return 0
        size = self.dtype.itemsize
        origin.will_need(place[1] + start * size, place[1] + stop * size)
        return (stop - start) * size

    def let_go(self, start: int, stop: int) -> None:
        """Elements [start, stop) of a tensor in one stretch have been read, and were not changed."""
        if (place := self.position) is not None and isinstance(self.storage.origin, MappedFile):
            size = self.dtype.itemsize
            self.storage.origin.let_go(place[1] + start * size, place[1] + stop * size)

    def item(self) -> Any:
        """Of a tensor of one element."""
        if self.numel() != 1:
            raise ValueError(f"a tensor of {self.shape} is no number")
        value = self.array()
        return (float32_of(value, self.dtype) if self.dtype is BFLOAT16 else value)[0].item()

    def __float__(self) -> float:
        return float(self.item())

    def __repr__(self) -> str:
        return f"tensor({self.item()})" if self.numel() == 1 else f"tensor of {self.shape}, {self.dtype}"

    def to_torch(self) -> torch.Tensor:
        """Sharing its memory."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype.name)
        if not self.numel():
            return torch.empty(self.shape, dtype=dtype)
        whole = self.array()
        return torch.from_numpy(whole.view(np.uint8)).view(dtype).view(self.shape)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides, numel = [], 1
    for extent in reversed(shape):
        strides.append(numel)
        numel *= extent
    return tuple(reversed(strides))


def is_tensor(value: Any) -> bool:
    """Ours, or torch's, in what a file held."""
    return isinstance(value, StoredTensor) or _is_torch(value)


def _is_torch(value: Any) -> bool:
    # Without importing it: where torch is not loaded, nothing is one of its tensors.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def as_stored(value: Any) -> StoredTensor:
    return value if isinstance(value, StoredTensor) else StoredTensor.of_torch(value)


def place_of(value: Any) -> tuple[Any, ...]:
    """Equal for two names of one tensor of a file."""
    if not isinstance(value, StoredTensor):
        return value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride()
    origin = value.storage.origin
    where = str(origin.path) if isinstance(origin, MappedFile) else origin.ctypes.data
    return where, value.storage.start, value.offset, value.shape, value.strides


def are_equal(one: Any, other: Any) -> bool:
    """Shapes and values, as torch.equal has it: nan is equal to nothing."""
    one, other = as_stored(one), as_stored(other)
    if one.shape != other.shape or one.dtype is not other.dtype:
        return False
    values = [tensor.array() for tensor in (one, other)]
    if one.dtype is BFLOAT16:
        values = [float32_of(array, BFLOAT16) for array in values]
    return bool(np.array_equal(*values))


def is_rounded(master: StoredTensor, weight: StoredTensor) -> bool:
    """Whether the weight is what the master was rounded to; a nan is as good as another."""
    if master.numel() != weight.numel():
        return False
    if weight.dtype is FLOAT32:
        return bool(np.array_equal(float32_of(master.array(), master.dtype), weight.array(), equal_nan=True))
    import torch

    rounded, held = master.to_torch().to(getattr(torch, weight.dtype.name)), weight.to_torch()
    return torch.equal(rounded.nan_to_num(), held.nan_to_num())


def float32_of(values: np.ndarray, dtype: DType) -> np.ndarray:
    """The values in fp32; those of half precisions are exact."""
    if dtype is BFLOAT16:
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)
