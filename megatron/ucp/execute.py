"""The one copy loop: put elements of a parameter's state where they are wanted, from wherever the Source has them.

Intersect the wanted runs with each piece's runs, copy, and count; what was not found or found twice is
an error that names the parameter and the interval. The digest of what was placed is returned.

    runs = shard_runs(layout, ShardRank(tp_rank, tp_size), start, stop)
    digest = read_into(source, "final_norm.weight", "exp_avg", runs, flat[hp_start : hp_start + stop - start])
    digest = pour(source, "final_norm.weight", "exp_avg", record)        # the whole, into a file that is being written
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron.ucp import native
from megatron.ucp.digest import Digest, digest_runs, seeds
from megatron.ucp.errors import CorruptFileError, ReplicaMismatchError, SourceError
from megatron.ucp.partial_sums import PartialSums
from megatron.ucp.runs import Runs, clip_atomic, intersect, numel, tiling_faults, whole_runs
from megatron.ucp.sources.source import Piece, Source
from megatron.ucp.stored import BFLOAT16, FLOAT32, DType, StoredTensor, float32_of
from megatron.ucp.torch_file import Record

if TYPE_CHECKING:
    import torch

    Flat = np.ndarray | torch.Tensor
    """fp32 of numpy's, or of torch's: fp32, bf16 or fp16, on any device."""

CHUNK = 1 << 20
"""Elements that are read at once: 4 MiB, so that the passes over them after the first find them in the cache."""
SEGMENT = 1 << 24
"""Elements that the kernel is asked for at once: 64 MiB, between which it can be stopped, and progress is told."""
_MAX_OPEN = 128
"""Files of one segment; each worker has as many open."""


def read_into(source: Source, name: str, state: str, runs: Runs, out: Flat) -> Digest:
    """Fills the flat `out` at the local side of `runs`. Local, no collective.

    Returns the digest of what was placed, in `out`'s precision. Raises SourceError for a gap or an overlap."""
    gather(source, name, state, source.pieces(name, state), runs, out)
    shape = source.manifest.parameters[name].layout_of(state).shape
    return digest_runs(out, runs, name=name, state=state, shape=shape)


def gather(source: Source, name: str, state: str, pieces: list[Piece], runs: Runs, out: Flat) -> None:
    """read_into without the digest, for callers that have the pieces already."""
    if _is_mean(source, name, state):
        _gather_mean(source, name, state, pieces, runs, out)
    else:
        _gather_copy(source, name, state, [p for p in pieces if p.copy == 0], runs, out)


def pour(
    source: Source,
    name: str,
    state: str,
    record: Record,
    start: int = 0,
    stop: int | None = None,
    *,
    dtype: DType = FLOAT32,
    compares_replicas: bool = False,
    told: Callable[[int], None] = lambda num_elements: None,
    sums: PartialSums | None = None,
) -> Digest:
    """Writes atomic elements [start, stop) to the record, in order, and returns their digest, as fp32. `dtype`: the
    record's. `told`: how many more were written; what it raises stops the writing. `sums` takes the CRCs of what was
    read. Raises what `gather` and, where asked for, `check_replicas` raise.

    In one pass of the kernel where the values are copied as they lie; where they are rounded, averaged or compared, in
    stretches."""
    layout = source.manifest.parameters[name].layout_of(state)
    stop = layout.numel if stop is None else stop
    pieces = source.pieces(name, state)
    is_copied = record.gathers and not _is_mean(source, name, state)
    own = [piece for piece in pieces if piece.copy == 0]
    if is_copied and (len(own) == len(pieces) or not compares_replicas):
        held = [(piece, source.tensor(piece)) for piece in own]
        is_copied = all(tensor.position is not None and tensor.dtype is FLOAT32 for _, tensor in held)
    else:
        is_copied = False
    digest = Digest()
    for first in range(start, stop, SEGMENT):
        last = min(first + SEGMENT, stop)
        rows = _rows(source, name, state, held, first, last) if is_copied else None
        if rows is not None:
            digest += _gather_from_files(*rows, record, first, seeds(name, state, layout.shape), sums)
            told(last - first)
            continue
        for runs, values in chunks(source, name, state, first, last, compares_replicas=compares_replicas):
            digest += digest_runs(values, runs, name=name, state=state, shape=layout.shape)
            record.write(rounded(values, dtype))
            told(len(values))
    return digest


def chunks(
    source: Source, name: str, state: str, start: int = 0, stop: int | None = None, *, compares_replicas: bool = False
) -> Iterator[tuple[Runs, np.ndarray]]:
    """(runs, values) of atomic elements [start, stop), in order, in stretches of at most CHUNK: what is read whole is
    never held whole. `values` is fp32, and overwritten by the next step. Raises what `gather` and, where asked for,
    `check_replicas` raise."""
    stop = source.manifest.parameters[name].layout_of(state).numel if stop is None else stop
    pieces = source.pieces(name, state)
    buffer = np.empty(min(CHUNK, max(1, stop - start)), dtype=np.float32)
    for first in range(start, stop, CHUNK):
        values = buffer[: min(CHUNK, stop - first)]
        runs = whole_runs(len(values), first)
        gather(source, name, state, pieces, runs, values)
        if compares_replicas:
            check_replicas(source, name, state, pieces, first, values)
        yield runs, values


def check_replicas(source: Source, name: str, state: str, pieces: list[Piece], start: int, values: np.ndarray) -> None:
    """Compares every replica's share of atomic [start, start + len(values)) with `values`, bit by bit."""
    if source.manifest.parameters[name].layout_of(state).is_averaged:
        return
    for piece in pieces:
        if piece.copy == 0:
            continue
        held = clip_atomic(piece.runs, start, start + len(values))
        if not len(held):
            continue
        theirs = values.copy()
        local = held.copy()
        local[:, 1] += piece.offset
        wanted = np.array([[start, 0, len(values)]], dtype=np.int64)
        copy_runs(theirs, source.tensor(piece), intersect(wanted, local), piece)
        differing = np.flatnonzero(theirs.view(np.uint32) != values.view(np.uint32))
        if len(differing):
            index = int(differing[0])
            others = sorted({p.file.name for p in pieces if p.copy == 0})
            raise ReplicaMismatchError(
                f"copies of {name} ({state}) that must be equal differ",
                found=f"element {start + index}: {theirs[index].item()!r} in {piece.file.name}",
                expected=f"{values[index].item()!r} as in {', '.join(others[:4])}",
                where=source.folder,
                do="the ranks diverged in training, or the parameter is not replicated as its layout says",
            )


def copy_runs(target: Flat, origin: StoredTensor, copies: np.ndarray, piece: Piece | None = None) -> None:
    """target[t : t + n] = origin[s : s + n] for each row (t, s, n), with a cast where the precisions differ."""
    if not len(copies):
        return
    _require_held(origin, copies, piece)
    if int((copies[:, 0] + copies[:, 2]).max()) > len(target):
        raise ValueError("the output tensor is shorter than the runs")
    values = origin.array()
    if isinstance(target, np.ndarray):
        is_same, address = target.dtype == np.float32 and origin.dtype is FLOAT32, target.ctypes.data
    else:
        is_same = str(target.dtype) == str(origin.dtype) and target.device.type == "cpu" and target.is_contiguous()
        address = target.data_ptr() if is_same else 0
    if is_same and native.kernel is not None:
        copies = np.ascontiguousarray(copies, dtype=np.int64)
        size = origin.element_size()
        native.kernel.copy_runs(
            address, len(target), values.ctypes.data, len(values), size, copies.ctypes.data, len(copies)
        )
    elif isinstance(target, np.ndarray):
        for t, s, n in copies.tolist():
            target[t : t + n] = float32_of(values[s : s + n], origin.dtype)
    else:
        tensor = origin.to_torch()
        for t, s, n in copies.tolist():
            target[t : t + n].copy_(tensor[s : s + n])
    origin.let_go(int(copies[:, 1].min()), int((copies[:, 1] + copies[:, 2]).max()))


def _require_held(origin: StoredTensor, copies: np.ndarray, piece: Piece | None) -> None:
    if (last := int((copies[:, 1] + copies[:, 2]).max())) > origin.numel():
        raise CorruptFileError(
            "a tensor in the file is shorter than the parameters it should hold",
            found=origin.numel(),
            expected=last,
            where=piece.file if piece else None,
        )


def _is_mean(source: Source, name: str, state: str) -> bool:
    return source.manifest.parameters[name].layout_of(state).is_averaged and source.manifest.kind == "native"


def _gather_copy(source: Source, name: str, state: str, pieces: list[Piece], runs: Runs, out: Flat) -> None:
    copied = 0
    for piece in pieces:
        copies = intersect(runs, piece.runs)
        if len(copies):
            copies[:, 1] += piece.offset
            copy_runs(out, source.tensor(piece), copies, piece)
            copied += numel(copies)
    # Runs of one target do not overlap, and the pieces of a Source tile its parameter (its own table is checked when it
    # is read), so equal counts mean that all was placed once; the digest is the proof.
    if copied != numel(runs):
        raise _not_tiled(source, name, state, pieces, runs)


def _not_tiled(source: Source, name: str, state: str, pieces: Sequence[Piece], runs: Runs) -> SourceError:
    missing, doubled = tiling_faults(runs, [p.runs for p in pieces])
    return SourceError(
        f"the files do not tile {name} ({state})",
        found=f"missing elements {missing[:5]}, doubled {doubled[:5]}",
        expected=f"{numel(runs)} elements once",
        where=source.folder,
    )


def _gather_mean(source: Source, name: str, state: str, pieces: list[Piece], runs: Runs, out: Flat) -> None:
    copies = sorted({piece.copy for piece in pieces})
    mean = np.zeros(len(out), dtype=np.float64)
    part = np.zeros(len(out), dtype=np.float32)
    for copy in copies:
        _gather_copy(source, name, state, [p for p in pieces if p.copy == copy], runs, part)
        mean += part
    mean /= len(copies)
    rows = np.stack([runs[:, 1], runs[:, 1], runs[:, 2]], axis=1)
    copy_runs(out, StoredTensor.of_array(mean), rows)


def _rows(
    source: Source, name: str, state: str, held: Sequence[tuple[Piece, StoredTensor]], start: int, stop: int
) -> tuple[list[Path], np.ndarray] | None:
    """(files, int64 [n, 3]: number of the file, first byte, bytes) of atomic elements [start, stop), in order; None
    where they lie in too many files."""
    wanted = whole_runs(stop - start, start)
    files: dict[Path, int] = {}
    parts = []
    for piece, tensor in held:
        copies = intersect(wanted, piece.runs)
        if not len(copies):
            continue
        copies[:, 1] += piece.offset
        _require_held(tensor, copies, piece)
        assert tensor.position is not None
        path, position = tensor.position
        number = np.full(len(copies), files.setdefault(path, len(files)), dtype=np.int64)
        size = tensor.element_size()
        parts.append(np.stack([copies[:, 0], number, position + copies[:, 1] * size, copies[:, 2] * size], axis=1))
    rows = np.concatenate(parts) if parts else np.empty((0, 4), dtype=np.int64)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    follows = np.cumsum(rows[:, 3]) - rows[:, 3] == rows[:, 0] * FLOAT32.itemsize
    if not bool(follows.all()) or int(rows[:, 3].sum()) != (stop - start) * FLOAT32.itemsize:
        raise _not_tiled(source, name, state, [piece for piece, _ in held], wanted)
    return None if len(files) > _MAX_OPEN else (list(files), rows[:, 1:])


def _gather_from_files(
    files: list[Path], rows: np.ndarray, record: Record, index: int, lanes: tuple[int, int], sums: PartialSums | None
) -> Digest:
    with ExitStack() as opened:
        handles = []
        for path in files:
            handles.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            opened.callback(os.close, handles[-1])
        try:
            digest, crcs = record.gather(handles, rows, index, lanes)
        except EOFError as error:
            raise CorruptFileError("the file became shorter while it was read", where=files[error.args[0]]) from error
    if sums is not None:
        sums.add(files, rows, crcs)
    return digest


def rounded(values: np.ndarray, dtype: DType) -> np.ndarray:
    """fp32 values in a half precision or in their own, to the nearest, of two as near ones to the even: as torch does.
    The bits of what numpy has no type for."""
    if dtype is FLOAT32:
        return values
    if dtype is not BFLOAT16:
        with np.errstate(over="ignore"):
            return values.astype(dtype.numpy)
    bits = values.view(np.uint32)
    halves = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    halves[np.isnan(values)] = 0x7FC0
    return halves
