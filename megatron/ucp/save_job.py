"""What one rank writes of a save, told apart from where its values lie: live, or copied aside for another process.

    written = write_files(files, staging, memory)                # {name: FileInfo}
    sums = [digest_row(row, memory) for row in rows]

`memory` gives the flat array of a numbered tensor. Neither torch nor DeepSpeed is needed, so a process that
only writes starts in a fraction of a second and is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron.ucp.digest import Digest, digest_runs
from megatron.ucp.disk import disk_errors
from megatron.ucp.manifest import FileInfo
from megatron.ucp.output_file import SummedFile
from megatron.ucp.runs import Runs
from megatron.ucp.stored import DTYPES, float32_of
from megatron.ucp.torch_file import Record, StreamedTensor, write_archive

_PIECE = 1 << 18
"""Elements that are written before it is asked whether to go on."""


@dataclass(frozen=True)
class Values:
    """A flat tensor: `numel` elements of `dtype` (a name of stored.DTYPES) from byte `start` of wherever it lies."""

    dtype: str
    numel: int
    start: int = 0

    @property
    def num_bytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize


class Memory(Protocol):
    def values(self, number: int) -> Values: ...

    def array(self, number: int) -> np.ndarray:
        """Flat, in the type of stored.DType.numpy."""


@dataclass(frozen=True)
class CopiedMemory:
    """Tensors that were copied into one stretch of bytes."""

    placed: Sequence[Values]
    """By number."""
    raw: np.ndarray

    def values(self, number: int) -> Values:
        return self.placed[number]

    def array(self, number: int) -> np.ndarray:
        at = self.placed[number]
        return self.raw[at.start : at.start + at.num_bytes].view(DTYPES[at.dtype].numpy)


@dataclass(frozen=True)
class FileToWrite:
    name: str
    """Relative to the checkpoint's folder."""
    content: bytes
    """Its pickle, or all of it (live_content.LiveContent)."""
    is_whole_file: bool = False
    tensors: tuple[int, ...] = ()
    """Their numbers, in the order of the pickle's."""

    def num_bytes(self, memory: Memory) -> int:
        """About: without what a zip has around its records."""
        return len(self.content) + sum(memory.values(number).num_bytes for number in self.tensors)


@dataclass(frozen=True)
class DigestRow:
    """What a rank holds of one state of a parameter."""

    name: str
    state: str
    shape: tuple[int, ...]
    """The atomic one."""
    tensor: int
    """The number of its values."""
    runs: Runs
    counted_runs: Runs | None
    """Of what this rank counts for all; None where that is all it holds."""
    is_whole: bool
    """Every data-parallel rank holds the same, so that it is not added over them."""
    experts: tuple[tuple[int, Runs], ...] = ()
    """(expert, the runs of its part that are counted here)."""


@dataclass(frozen=True)
class RowDigests:
    held: Digest
    counted: Digest
    experts: tuple[Digest, ...] = ()


def write_files(
    files: Iterable[FileToWrite], folder: Path, memory: Memory, go_on: Callable[[], None] = lambda: None
) -> dict[str, FileInfo]:
    """Returns size and checksum by name, which come out of the writing. `go_on` is called every megabyte or so, and may
    raise. Raises NotEnoughSpaceError, OSError."""
    return {file.name: _write(file, folder / file.name, memory, go_on) for file in files}


def _write(file: FileToWrite, path: Path, memory: Memory, go_on: Callable[[], None]) -> FileInfo:
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.is_whole_file:
        go_on()
        with disk_errors(path), SummedFile(path) as summed:
            summed.write(file.content)
        return summed.info
    return write_archive(path, file.content, [_streamed(number, memory, go_on) for number in file.tensors])


def _streamed(number: int, memory: Memory, go_on: Callable[[], None]) -> StreamedTensor:
    described = memory.values(number)

    def write(record: Record) -> None:
        whole = memory.array(number)
        for start in range(0, whole.size, _PIECE):
            go_on()
            record.write(whole[start : start + _PIECE])

    return StreamedTensor((described.numel,), DTYPES[described.dtype], write)


def digest_row(row: DigestRow, memory: Memory) -> RowDigests:
    bits = float32_of(memory.array(row.tensor), DTYPES[memory.values(row.tensor).dtype])

    def digest(runs: Runs) -> Digest:
        return digest_runs(bits, runs, name=row.name, state=row.state, shape=row.shape)

    everything = digest(row.runs)
    counted = everything if row.counted_runs is None else digest(row.counted_runs)
    return RowDigests(everything, counted, tuple(digest(runs) for _, runs in row.experts))
