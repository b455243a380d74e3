"""The disk reads what comes next while this is copied.

    for name, state, runs, out in read_ahead(source, wanted): gather(source, name, state, ..., runs, out)

A copy out of a mapped file asks for a page, waits for it, and asks for the next, and each file of a universal folder is
a new one: a rank that reads one from a disk has it 1.6 x as fast where the system is told ahead. Values come no
other way by it; what is small, or lies in no file, is read when it is wanted.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron.ucp.runs import Runs, intersect
from megatron.ucp.sources.source import Source

Place = TypeVar("Place")
Wanted = tuple[str, str, Runs, Place]
"""Parameter, state, which of its elements, and where they go."""

AHEAD = 1 << 28
"""Bytes that the system is told of before they are wanted."""
FILES_AHEAD = 32
"""Values whose files' ends the system is told of before the first of them is opened."""
_END = 1 << 14
_GAP = 1 << 17
"""Bytes between two runs that are read too: to leave them out would cost more."""


def read_ahead(source: Source, wanted: Iterable[Wanted[Place]]) -> Iterator[Wanted[Place]]:
    """All of `wanted`, in order. Raises what opening the Source's files raises. Local."""
    waiting: deque[tuple[Wanted[Place], int]] = deque()
    told = 0
    for one in _ends_told(source, wanted):
        waiting.append((one, _tell(source, *one[:3])))
        told += waiting[-1][1]
        while told > AHEAD:
            first, num_bytes = waiting.popleft()
            told -= num_bytes
            yield first
    while waiting:
        yield waiting.popleft()[0]


def _ends_told(source: Source, wanted: Iterable[Wanted[Place]]) -> Iterator[Wanted[Place]]:
    """Where a file's values lie stands at its end and its beginning, which are read before anything can be told of the
    values: the system is told of these ends first."""
    waiting: deque[Wanted[Place]] = deque()
    seen: set[Path] = set()
    for one in wanted:
        for piece in source.pieces(*one[:2]):
            if piece.file not in seen:
                seen.add(piece.file)
                _tell_ends(piece.file)
        waiting.append(one)
        if len(waiting) > FILES_AHEAD:
            yield waiting.popleft()
    yield from waiting


def _tell_ends(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:  # whoever reads it will say so
        return
    try:
        if hasattr(os, "posix_fadvise"):
            size = os.fstat(handle).st_size
            for start in (0, max(0, size - _END)):
                os.posix_fadvise(handle, start, _END, os.POSIX_FADV_WILLNEED)
    except OSError:  # a pipe
        pass
    finally:
        os.close(handle)


def spans(starts: np.ndarray, sizes: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of stretches that hold all of the runs, with small gaps closed. Runs do not overlap.

    >>> spans(np.array([0, 4096, 1 << 20]), np.array([10, 10, 10]))
    [(0, 4106), (1048576, 1048586)]
    """
    order = np.argsort(starts, kind="stable")
    starts, stops = starts[order], (starts + sizes)[order]
    breaks = np.flatnonzero(starts[1:] - stops[:-1] > _GAP) + 1
    firsts, lasts = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(starts)]]) - 1
    return list(zip(starts[firsts].tolist(), stops[lasts].tolist(), strict=True)) if len(starts) else []


def _tell(source: Source, name: str, state: str, runs: Runs) -> int:
    """Bytes that the system was told of."""
    told = 0
    for piece in source.pieces(name, state):
        copies = intersect(runs, piece.runs)
        if not len(copies):
            continue
        tensor: Any = source.tensor(piece)
        for start, stop in spans(copies[:, 1] + piece.offset, copies[:, 2]):
            told += tensor.will_need(start, stop)
    return told
