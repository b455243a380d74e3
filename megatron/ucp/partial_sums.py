"""The CRC of a file from those of stretches that were summed when they were read for something else.

sums.add([path], rows, crcs)                    # what one pass of the kernel has read
sums.checksum_of(path, file)                    # reads what is between
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron.ucp import native
from megatron.ucp.commit import checksum_of
from megatron.ucp.manifest import FileInfo


class PartialSums:
    """Thread-safe."""

    def __init__(self) -> None:
        self._known: dict[Path, list[np.ndarray]] = {}
        self._lock = threading.Lock()

    def add(self, files: Sequence[Path], rows: np.ndarray, crcs: np.ndarray) -> None:
        """`rows`: int64 [n, 3], (number of the file, first byte, bytes); `crcs`: of each row, -1 where it is not
        known."""
        for number, path in enumerate(files):
            chosen = (rows[:, 0] == number) & (crcs >= 0)
            if chosen.any():
                known = np.column_stack([rows[chosen, 1], rows[chosen, 2], crcs[chosen]])
                with self._lock:
                    self._known.setdefault(path, []).append(known)

    def checksum_of(self, path: Path, file: BinaryIO) -> FileInfo:
        """Of the whole file, open at its beginning."""
        parts = self._known.get(path)
        if native.kernel is None or not parts:
            return checksum_of(file)
        known = np.concatenate(parts)
        known = known[np.argsort(known[:, 0], kind="stable")]
        # What was read twice is known twice: the first of those that overlap.
        ends = np.maximum.accumulate(known[:, 0] + known[:, 1])
        known = np.ascontiguousarray(known[np.concatenate(([True], known[1:, 0] >= ends[:-1]))])
        size, crc = native.kernel.checksum(file.fileno(), known.ctypes.data, len(known))
        return FileInfo(size, f"{crc:08x}")
