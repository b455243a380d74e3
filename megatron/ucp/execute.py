"""The one copy loop: put elements of a parameter's state where they are wanted, from wherever the Source has them.

Intersect the wanted runs with each piece's runs, copy, and count; what was not found or found twice is
an error that names the parameter and the interval. The digest of what was placed is returned.

    runs = shard_runs(layout, ShardRank(tp_rank, tp_size), start, stop)
    digest = read_into(source, "final_norm.weight", "exp_avg", runs, flat[hp_start : hp_start + stop - start])
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from megatron.ucp import native
from megatron.ucp.digest import Digest, digest_runs
from megatron.ucp.errors import CorruptFileError, ReplicaMismatchError, SourceError
from megatron.ucp.runs import Runs, clip_atomic, intersect, numel, tiling_faults, whole_runs
from megatron.ucp.sources.source import Piece, Source

CHUNK = 1 << 20
"""Elements that are read at once: 4 MiB, so that the passes over them after the first find them in the cache."""


def read_into(source: Source, name: str, state: str, runs: Runs, out: torch.Tensor) -> Digest:
    """Fills the flat `out` (fp32, bf16 or fp16; any device) at the local side of `runs`. Local, no collective.

    Returns the digest of what was placed, in `out`'s precision. Raises SourceError for a gap or an overlap."""
    gather(source, name, state, source.pieces(name, state), runs, out)
    shape = source.manifest.parameters[name].layout_of(state).shape
    return digest_runs(out, runs, name=name, state=state, shape=shape)


def gather(source: Source, name: str, state: str, pieces: list[Piece], runs: Runs, out: torch.Tensor) -> None:
    """read_into without the digest, for callers that have the pieces already."""
    if source.manifest.parameters[name].layout_of(state).is_averaged and source.manifest.kind == "native":
        _gather_mean(source, name, state, pieces, runs, out)
    else:
        _gather_copy(source, name, state, [p for p in pieces if p.copy == 0], runs, out)


def chunks(
    source: Source, name: str, state: str, start: int = 0, stop: int | None = None, *, compares_replicas: bool = False
) -> Iterator[tuple[Runs, torch.Tensor]]:
    """(runs, values) of atomic elements [start, stop), in order, in stretches of at most CHUNK: what is read whole is
    never held whole. `values` is fp32, on the CPU, and overwritten by the next step. Raises what `gather` and, where
    asked for, `check_replicas` raise."""
    stop = source.manifest.parameters[name].layout_of(state).numel if stop is None else stop
    pieces = source.pieces(name, state)
    buffer = torch.empty(min(CHUNK, max(1, stop - start)), dtype=torch.float32)
    for first in range(start, stop, CHUNK):
        values = buffer[: min(CHUNK, stop - first)]
        runs = whole_runs(len(values), first)
        gather(source, name, state, pieces, runs, values)
        if compares_replicas:
            check_replicas(source, name, state, pieces, first, values)
        yield runs, values


def check_replicas(
    source: Source, name: str, state: str, pieces: list[Piece], start: int, values: torch.Tensor
) -> None:
    """Compares every replica's share of atomic [start, start + len(values)) with `values`, bit by bit."""
    if source.manifest.parameters[name].layout_of(state).is_averaged:
        return
    for piece in pieces:
        if piece.copy == 0:
            continue
        held = clip_atomic(piece.runs, start, start + values.numel())
        if not len(held):
            continue
        theirs = values.clone()
        local = held.copy()
        local[:, 1] += piece.offset
        wanted = np.array([[start, 0, values.numel()]], dtype=np.int64)
        copy_runs(theirs, source.tensor(piece), intersect(wanted, local), piece)
        if not torch.equal(theirs.view(torch.uint8), values.view(torch.uint8)):
            index = int((theirs != values).nonzero()[0]) if bool((theirs != values).any()) else 0
            others = sorted({p.file.name for p in pieces if p.copy == 0})
            raise ReplicaMismatchError(
                f"copies of {name} ({state}) that must be equal differ",
                found=f"element {start + index}: {theirs[index].item()!r} in {piece.file.name}",
                expected=f"{values[index].item()!r} as in {', '.join(others[:4])}",
                where=source.folder,
                do="the ranks diverged in training, or the parameter is not replicated as its layout says",
            )


def copy_runs(target: torch.Tensor, origin: torch.Tensor, copies: np.ndarray, piece: Piece | None = None) -> None:
    """target[t : t + n] = origin[s : s + n] for each row (t, s, n), with a cast where the precisions differ."""
    if not len(copies):
        return
    if int((copies[:, 1] + copies[:, 2]).max()) > origin.numel():
        raise CorruptFileError(
            "a tensor in the file is shorter than the parameters it should hold",
            found=origin.numel(),
            expected=int((copies[:, 1] + copies[:, 2]).max()),
            where=piece.file if piece else None,
        )
    if int((copies[:, 0] + copies[:, 2]).max()) > target.numel():
        raise ValueError("the output tensor is shorter than the runs")
    if target.dtype != origin.dtype or target.device != origin.device or not target.is_contiguous():
        for t, s, n in copies.tolist():
            target[t : t + n].copy_(origin[s : s + n])
        return
    if native.kernel is None or target.device.type != "cpu":
        for t, s, n in copies.tolist():
            target[t : t + n] = origin[s : s + n]
        return
    copies = np.ascontiguousarray(copies, dtype=np.int64)
    native.kernel.copy_runs(
        target.data_ptr(),
        target.numel(),
        origin.data_ptr(),
        origin.numel(),
        target.element_size(),
        copies.ctypes.data,
        len(copies),
    )


def _gather_copy(source: Source, name: str, state: str, pieces: list[Piece], runs: Runs, out: torch.Tensor) -> None:
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
        missing, doubled = tiling_faults(runs, [p.runs for p in pieces])
        raise SourceError(
            f"the files do not tile {name} ({state})",
            found=f"missing elements {missing[:5]}, doubled {doubled[:5]}",
            expected=f"{numel(runs)} elements once",
            where=source.folder,
        )


def _gather_mean(source: Source, name: str, state: str, pieces: list[Piece], runs: Runs, out: torch.Tensor) -> None:
    copies = sorted({piece.copy for piece in pieces})
    mean = torch.zeros(out.numel(), dtype=torch.float64)
    part = torch.zeros(out.numel(), dtype=torch.float32)
    for copy in copies:
        _gather_copy(source, name, state, [p for p in pieces if p.copy == copy], runs, part)
        mean += part
    mean /= len(copies)
    rows = np.stack([runs[:, 1], runs[:, 1], runs[:, 2]], axis=1)
    copy_runs(out, mean, rows)
