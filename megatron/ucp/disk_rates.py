"""How fast does this machine save, convert and load? Measured with files of its own: `ucp plan --bandwidth measured`.

    rates = measured_rates("/data/run", num_workers=8, num_bytes=1 << 30)      # twice that of room, once of memory
    rates.save, rates.convert, rates.load                        # bytes a second, of all workers together

The same calls that a save, a conversion and a resume spend their time in: digests, checksums and the flush to the disk
are in the rates, starting programs and agreeing between ranks is not. What is read is first dropped from the page
cache, as on a machine that comes new to a checkpoint.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.ucp.commit import flush, remove_left_over, stage
from megatron.ucp.digest import digest_runs, seeds
from megatron.ucp.disk import disk_errors, require_space
from megatron.ucp.execute import CHUNK, copy_runs
from megatron.ucp.ordinary_file import read_ordinary
from megatron.ucp.runs import whole_runs
from megatron.ucp.stored import FLOAT32, StoredTensor
from megatron.ucp.torch_file import Record, StreamedTensor, save_streamed

_TENSOR = 1 << 22
"""Elements of each tensor: 16 MiB, of which a layer has a few."""
_NAME, _STATE = "measured", "fp32"


@dataclass(frozen=True)
class Rates:
    """Bytes a second that one node moves, its processes together."""

    save: float
    convert: float
    """Of what is read and what is written, added."""
    load: float

    @classmethod
    def alike(cls, bandwidth: float) -> Rates:
        """Of a disk that reads as fast as it writes, beside which processors cost nothing."""
        return cls(bandwidth, bandwidth, bandwidth)


def measured_rates(folder: str | Path, num_workers: int, num_bytes: int) -> Rates:
    """With `num_workers` that work at once, on the disk of `folder`. Leaves nothing there. Raises NotEnoughSpaceError
    before anything is written, OSError where the folder cannot be written to."""
    num_tensors = max(1, num_bytes // (num_workers * _TENSOR * FLOAT32.itemsize))
    folder = Path(folder)
    require_space(folder, 2 * num_workers * num_tensors * _TENSOR * FLOAT32.itemsize)
    # As a save's folder before it has its name: if this process is killed, whoever cleans up knows what it is.
    scratch = stage(folder / f"measured-{secrets.token_hex(4)}")
    try:
        with disk_errors(scratch), ThreadPoolExecutor(num_workers) as pool:
            workers = [_Worker(scratch / str(number), num_tensors) for number in range(num_workers)]
            moved = sum(worker.num_bytes for worker in workers)
            save = _seconds(pool, workers, _Worker.save)
            convert = _seconds(pool, workers, _Worker.convert)
            for worker in workers:
                worker.forget()
            load = _seconds(pool, workers, _Worker.load)
    finally:
        remove_left_over(scratch)
    return Rates(moved / save, 2 * moved / convert, moved / load)


class _Worker:
    """What one rank, or one thread of a conversion, does."""

    def __init__(self, folder: Path, num_tensors: int):
        folder.mkdir()
        self._folder, self._file = folder, folder / "saved.pt"
        generator = np.random.default_rng(0)
        self._values = [generator.random(_TENSOR, dtype=np.float32) for _ in range(num_tensors)]
        self._converted = [folder / f"{number}.pt" for number in range(num_tensors)]
        self.num_bytes = sum(values.nbytes for values in self._values)

    def save(self) -> None:
        for values in self._values:
            _digest(values)
        tensors = [StreamedTensor((_TENSOR,), FLOAT32, _writer(values)) for values in self._values]
        save_streamed(tensors, self._file)
        flush(self._file)

    def convert(self) -> None:
        for tensor, path in zip(read_ordinary(self._file), self._converted, strict=True):
            save_streamed({"param": StreamedTensor((_TENSOR,), FLOAT32, _gatherer(tensor))}, path)
            flush(path)

    def forget(self) -> None:
        """The page cache lets go of what was converted."""
        for path in self._converted:
            handle = os.open(path, os.O_RDONLY)
            try:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)

    def load(self) -> None:
        """Into memory that was just made and zeroed, as an optimizer's; what nobody has read since it was written: of
        other files a disk, or the machine that it is part of, may still have the bytes."""
        self._values = [np.empty(_TENSOR, dtype=np.float32) for _ in self._values]
        for values in self._values:
            values.fill(0)
        for values, path in zip(self._values, self._converted, strict=True):
            copy_runs(values, read_ordinary(path)["param"], whole_runs(_TENSOR))
            _digest(values)


def _writer(values: np.ndarray) -> Callable[[Record], None]:
    return lambda record: record.write(values)


def _gatherer(tensor: StoredTensor) -> Callable[[Record], None]:
    """As execute.pour does it: one pass of the kernel where it was built."""

    def write(record: Record) -> None:
        if not record.gathers or tensor.position is None:
            for start in range(0, _TENSOR, CHUNK):
                values = tensor.array()[start : start + CHUNK]
                _digest(values)
                record.write(values)
            return
        path, position = tensor.position
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            rows = np.array([[0, position, _TENSOR * FLOAT32.itemsize]], dtype=np.int64)
            record.gather([handle], rows, 0, seeds(_NAME, _STATE, (_TENSOR,)))
        finally:
            os.close(handle)

    return write


def _digest(values: np.ndarray) -> None:
    digest_runs(values, whole_runs(len(values)), name=_NAME, state=_STATE, shape=(_TENSOR,))


def _seconds(pool: ThreadPoolExecutor, workers: list[_Worker], step: Callable[[_Worker], None]) -> float:
    started = time.perf_counter()
    list(pool.map(step, workers))
    return time.perf_counter() - started
