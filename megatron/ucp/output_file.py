"""Files that are written front to back, of which a few bytes are known only later.

    file = open_output(path)                # the kernel's Writer where it was built, else PlainOutput
    file.write(b"header ????"); file.patch(7, b"1234")
    size = file.close()

The kernel's (kernel.cpp) writes past the page cache where the file system lets it, and takes values from other files in
one pass that also digests them. Both leave the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from megatron.ucp import native
from megatron.ucp.crc32 import crc32
from megatron.ucp.manifest import FileInfo

_STRETCH = 1 << 18
"""Bytes that are summed right after they were copied, while they are in the cache."""


class OutputFile(Protocol):
    position: int
    """Bytes written so far."""

    def write(self, content: Any) -> None:
        """Contiguous bytes of any kind. Raises OSError."""

    def patch(self, position: int, content: bytes) -> None:
        """Overwrites bytes that were written before."""

    def close(self) -> int:
        """Everything goes to the system. Returns the file's size."""

    def abandon(self) -> None:
        """Closed, whatever is in it."""


class PlainOutput:
    def __init__(self, path: Path):
        # Unbuffered: what the disk did not take is not tried again when the object goes.
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by close or abandon)
        self.position = 0

    def write(self, content: Any) -> None:
        view = memoryview(content).cast("B")
        self.position += len(view)
        while len(view):
            view = view[self._file.write(view) :]

    def patch(self, position: int, content: bytes) -> None:
        self._file.seek(position)
        self._file.write(content)
        self._file.seek(self.position)

    def close(self) -> int:
        self._file.close()
        return self.position

    def abandon(self) -> None:
        self._file.close()


def open_output(path: Path) -> OutputFile:
    """Raises OSError."""
    return PlainOutput(path) if native.kernel is None else native.kernel.Writer(str(path))


class SummedFile:
    """What torch.save and others take for an open file: whatever is written goes to `path`, and is summed meanwhile.

    with SummedFile(path) as file: torch.save(content, file)
    file.info
    """

    def __init__(self, path: Path):
        self._output = open_output(path)
        self._crc = 0
        self.info = FileInfo(0, "")
        """Size and checksum, when the block has ended."""

    def __enter__(self) -> SummedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is None:
            self.info = FileInfo(self._output.close(), f"{self._crc:08x}")
        else:
            self._output.abandon()

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        for start in range(0, len(view), _STRETCH):
            part = view[start : start + _STRETCH]
            self._output.write(part)
            self._crc = crc32(part, self._crc)
        return len(view)

    def flush(self) -> None:
        """Nothing: what is written goes out by itself, and at the end."""
