"""The contents of a PyTorch DCP folder's files: chunks of tensors, and other values.

files = DcpFiles(folder)
files.chunk("model.norm.weight", chunk, saved)       # a flat StoredTensor, where it lies
files.value(place)                                   # whatever torch.save wrote there, if it is plain

Where a chunk's values lie is found out when they are asked for.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron.ucp.box import Box
from megatron.ucp.errors import CorruptFileError, UcpError
from megatron.ucp.ordinary_file import NotOrdinary, read_ordinary_part
from megatron.ucp.runs import Runs, box_runs
from megatron.ucp.safe_paths import existing_file
from megatron.ucp.sources.dcp.metadata import METADATA, Chunk, Metadata, Place, SavedTensor
from megatron.ucp.stored import MappedFile, StoredTensor

_NOT_READ = ("bool", "complex64", "complex128", "int64", "int32", "int16", "int8", "uint8")


class DcpFiles:
    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, MappedFile] = {}
        self._found: dict[Place, StoredTensor] = {}
        self._lock = threading.Lock()

    def chunk(self, what: str, chunk: Chunk, whole: SavedTensor) -> StoredTensor:
        """Flat. `what`: for messages. Raises CorruptFileError where it is not what the metadata say."""
        with self._lock:
            if chunk.place not in self._found:
                self._found[chunk.place] = self._opened(what, chunk, whole)
            return self._found[chunk.place]

    def _opened(self, what: str, chunk: Chunk, whole: SavedTensor) -> StoredTensor:
        content = self.value(chunk.place)
        if not isinstance(content, StoredTensor) or content.shape != chunk.sizes or content.dtype is not whole.dtype:
            raise CorruptFileError(
                f"a chunk of {what} is not what {METADATA} says",
                found=repr(content)[:200],
                expected=f"{chunk.sizes}, {whole.dtype}",
                where=self.folder / chunk.place.file,
            )
        return content.flat()

    def value(self, place: Place) -> Any:
        """Raises CorruptFileError where it is no record of torch.save's, or holds more than plain values."""
        if place.file not in self._files:
            self._files[place.file] = MappedFile(existing_file(self.folder, place.file))
        try:
            return read_ordinary_part(self._files[place.file], place.start, place.num_bytes)
        except (NotOrdinary, OSError) as error:
            raise CorruptFileError(
                f"no record of torch.save's at byte {place.start} ({error})", where=self.folder / place.file
            ) from error

    def require_whole(self, metadata: Metadata, used: Iterable[tuple[str, str]]) -> None:
        """`used`: (what it is, its name there) of every tensor that will be read. Raises CorruptFileError with all
        that is missing or of a type that no state has."""
        faults, files = list[str](), set[str]()
        for what, key in used:
            tensor = metadata.tensors[key]
            held = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
            if held != math.prod(tensor.shape):
                faults.append(f"{what}: chunks of {held} elements, of {math.prod(tensor.shape)}")
            elif not _are_apart(tensor):
                faults.append(f"{what}: chunks that lie on each other")
            if tensor.dtype.name in _NOT_READ:
                faults.append(f"{what}: elements of {tensor.dtype}")
            files |= {chunk.place.file for chunk in tensor.chunks}
        for file in sorted(files):
            try:
                existing_file(self.folder, file)
            except UcpError as error:
                faults.append(f"{file}: {error.what}")
        if faults:
            raise CorruptFileError("the checkpoint is not whole", found=faults, where=self.folder)


def _are_apart(tensor: SavedTensor) -> bool:
    """Whether no element is in two of its chunks."""
    if len(tensor.chunks) < 2:
        return True
    starts = np.array([chunk.offsets for chunk in tensor.chunks], dtype=np.int64)
    stops = starts + np.array([chunk.sizes for chunk in tensor.chunks], dtype=np.int64)
    cells, are_cells = [], True
    for dim, extent in enumerate(tensor.shape):
        cuts, cell = np.unique(starts[:, dim], return_inverse=True)
        are_cells = are_cells and bool(np.array_equal(stops[:, dim], np.append(cuts[1:], extent)[cell]))
        cells.append(cell)
    if are_cells:  # of one grid, as parallel programs cut
        return len(np.unique(np.stack(cells), axis=1).T) == len(starts)
    return all(
        not np.logical_and(starts[i + 1 :] < stops[i], starts[i] < stops[i + 1 :]).all(axis=1).any()
        for i in range(len(starts) - 1)
    )


def runs_of(chunk: Chunk, shape: tuple[int, ...]) -> Runs:
    """Of a tensor of that shape."""
    atomic = tuple((offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes))
    return box_runs(Box(atomic, tuple((0, size) for size in chunk.sizes)), shape, chunk.sizes)
