"""Files that are written front to back, of which a few bytes are known only later.

    file = open_output(path)                # the kernel's Writer where it was built, else PlainOutput
    file.write(b"header ????"); file.patch(7, b"1234")
    size = file.close()

The kernel's (kernel.cpp) writes past the page cache where the file system lets it, and takes values from other files in
one pass that also digests them. Both leave the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from megatron.ucp import native


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
