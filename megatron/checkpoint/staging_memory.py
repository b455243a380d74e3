"""Host memory into which a save is copied, so that training can go on while another process writes it.

    memory = StagingMemory()
    memory.reserve(bytes_to_copy(tensors))          # once, touched beforehand: a first touch costs more than the copy
    placed, copy_rest = memory.begin_copy(tensors, {address})       # where each of them will lie
    copy_rest()                                     # before anybody changes what lies at the address; by a thread

Tensors that overlap are copied once: a weight that is a view of a flat buffer, a master that is the weight itself. The
memory belongs to no file (memfd), so nothing is left when the last process that has it ends.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron.ucp.save_job import Values

_ALIGNMENT = 64
_POPULATE_WRITE = 23
"""madvise's MADV_POPULATE_WRITE, since Linux 5.14; Python has no name for it."""
_LEFT_FOR_LATER = 1 << 20
"""Bytes of a stretch from which on it is worth while to have the thread copy it."""


def is_supported() -> bool:
    """Where the system has memory that two processes share and no file stands for."""
    return hasattr(os, "memfd_create")


@dataclass(frozen=True)
class _Stretch:
    """Bytes [start, stop) of a storage, some tensors' own."""

    storage: torch.UntypedStorage
    start: int
    stop: int


class StagingMemory:
    def __init__(self) -> None:
        self.handle = os.memfd_create("megatron-save", os.MFD_CLOEXEC)
        self.num_bytes = 0
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def reserve(self, num_bytes: int) -> None:
        """At least so much, all of it touched. Raises OSError."""
        if num_bytes <= self.num_bytes:
            return
        os.ftruncate(self.handle, num_bytes)
        mapped = mmap.mmap(self.handle, num_bytes)
        self._bytes, self.num_bytes = torch.frombuffer(mapped, dtype=torch.uint8), num_bytes
        system = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(self._bytes.data_ptr())
        if system.madvise(address, ctypes.c_size_t(num_bytes), _POPULATE_WRITE):
            if (code := ctypes.get_errno()) != errno.EINVAL:
                raise OSError(code, f"no memory for a copy of {num_bytes} bytes: {os.strerror(code)}")
            self._bytes[:: mmap.PAGESIZE] = 0  # an older Linux

    def begin_copy(
        self, tensors: Sequence[torch.Tensor], unchanging: Container[int]
    ) -> tuple[tuple[Values, ...], Callable[[], None] | None]:
        """Flat and contiguous ones; all that a save needs, in place of what was there. Raises OSError where it had to
        grow and could not. On return all values are here, those of a device too, but for large ones in host memory in
        the storages at the addresses `unchanging`: the function copies them; None where there are none."""
        stretches, index = _stretches(tensors)
        starts, size = _laid_out(stretches)
        self.reserve(size)
        left: list[tuple[np.ndarray, np.ndarray]] = []
        for stretch, start in zip(stretches, starts, strict=True):
            whole = torch.empty(0, dtype=torch.uint8, device=stretch.storage.device).set_(stretch.storage)
            source = whole[stretch.start : stretch.stop]
            target = self._bytes[start : start + source.numel()]
            is_left = stretch.storage.data_ptr() in unchanging and source.numel() >= _LEFT_FOR_LATER
            if is_left and source.device.type == "cpu":
                left.append((target.numpy(), source.numpy()))
            else:
                target.copy_(source)
        placed = tuple(
            Values(
                str(tensor.dtype).removeprefix("torch."),
                tensor.numel(),
                starts[number] + _first_byte(tensor) - stretches[number].start if tensor.numel() else 0,
            )
            for tensor, number in zip(tensors, index, strict=True)
        )
        return placed, (lambda: _copy_all(left)) if left else None

    def close(self) -> None:
        os.close(self.handle)


def _copy_all(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    for target, source in pairs:
        np.copyto(target, source)  # without Python's lock


def bytes_to_copy(tensors: Sequence[torch.Tensor]) -> int:
    return _laid_out(_stretches(tensors)[0])[1]


def available_bytes() -> int:
    """Host memory that is free or can be freed, by the system's account and the container's limit. Very large where
    neither says."""
    found = [1 << 62]
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    limit, used = (next(iter(_lines(f"/sys/fs/cgroup/memory.{name}")), "") for name in ("max", "current"))
    if limit.isdecimal() and used.isdecimal():
        found.append(max(0, int(limit) - int(used)))
    return min(found)


def _lines(path: str) -> Iterable[str]:
    try:
        return Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _first_byte(tensor: torch.Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def _stretches(tensors: Sequence[torch.Tensor]) -> tuple[list[_Stretch], list[int]]:
    """What is to be copied, and for each tensor the number of the stretch it is in (-1 of an empty one)."""
    by_storage: dict[tuple[torch.device, int], list[int]] = {}
    for number, tensor in enumerate(tensors):
        if tensor.numel():
            by_storage.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), []).append(number)
    stretches: list[_Stretch] = []
    index = [-1] * len(tensors)
    for numbers in by_storage.values():
        is_first = True
        for number in sorted(numbers, key=lambda number: _first_byte(tensors[number])):
            tensor = tensors[number]
            start = _first_byte(tensor)
            stop = start + tensor.numel() * tensor.element_size()
            if is_first or start > stretches[-1].stop:
                stretches.append(_Stretch(tensor.untyped_storage(), start, stop))
            elif stop > stretches[-1].stop:
                stretches[-1] = _Stretch(stretches[-1].storage, stretches[-1].start, stop)
            is_first = False
            index[number] = len(stretches) - 1
    return stretches, index


def _laid_out(stretches: Sequence[_Stretch]) -> tuple[list[int], int]:
    """(where each begins, bytes in all). What is aligned in its storage is aligned here."""
    starts, size = [], 0
    for stretch in stretches:
        start = -(-size // _ALIGNMENT) * _ALIGNMENT + stretch.start % _ALIGNMENT
        starts.append(start)
        size = start + stretch.stop - stretch.start
    return starts, size
