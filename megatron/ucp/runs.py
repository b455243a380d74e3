"""Flat intervals: what ZeRO makes of boxes, and the arithmetic of who overlaps whom.

A *run* (atomic_start, local_start, length) says that `length` consecutive elements of the flattened
atomic parameter lie consecutively in somebody's flat tensor. Sources and Targets of every kind become arrays of runs
(int64 [n, 3], sorted by atomic_start, not overlapping), and one vectorised intersection is the whole planner.

    have = shard_runs(layout, ShardRank(tp_rank=1, tp_size=2), start=100, stop=300)    # a ZeRO fragment of a TP shard
    want = whole_runs(layout.numel)
    copies = intersect(want, have)            # [m, 3]: (target_local, source_local, length)
"""

from __future__ import annotations

import math

import numpy as np

from megatron.ucp.box import Box
from megatron.ucp.layout import Layout, ShardRank

Runs = np.ndarray

EMPTY: Runs = np.empty((0, 3), dtype=np.int64)


def whole_runs(numel: int, start: int = 0) -> Runs:
    """The atomic elements [start, start + numel) held one after the other."""
    return np.array([[start, 0, numel]], dtype=np.int64) if numel else EMPTY


def shard_runs(
    layout: Layout, rank: ShardRank, start: int = 0, stop: int | None = None, owned: bool | None = None
) -> Runs:
    """Runs of elements [start, stop) of the rank's flattened shard; local_start counts from `start`.

    Padding has no runs. With `owned=True`, copies that a lower tp rank holds too are left out; with False only
    those are given (see Layout.boxes).
    """
    shard_shape = layout.shard_shape(rank)
    pieces = [box_runs(box, layout.shape, shard_shape) for box in layout.boxes(rank, owned)]
    runs = np.concatenate(pieces) if pieces else EMPTY
    runs = clip_local(runs, start, math.prod(shard_shape) if stop is None else stop)
    return coalesce(runs[np.argsort(runs[:, 0], kind="stable")])


def clip_local(runs: Runs, start: int, stop: int) -> Runs:
    """The part that lies in [start, stop) of the holder, counted from `start`."""
    begin = np.maximum(runs[:, 1], start)
    end = np.minimum(runs[:, 1] + runs[:, 2], stop)
    keep = end > begin
    begin, end, kept = begin[keep], end[keep], runs[keep]
    return np.stack([kept[:, 0] + begin - kept[:, 1], begin - start, end - begin], axis=1)


def clip_atomic(runs: Runs, start: int, stop: int) -> Runs:
    """The part that lies in [start, stop) of the atomic parameter; both starts stay as they are counted."""
    low = np.searchsorted(runs[:, 0] + runs[:, 2], start, side="right")
    high = np.searchsorted(runs[:, 0], stop, side="left")
    kept = runs[low:high]
    begin = np.maximum(kept[:, 0], start)
    end = np.minimum(kept[:, 0] + kept[:, 2], stop)
    return np.stack([begin, kept[:, 1] + begin - kept[:, 0], end - begin], axis=1)


def coalesce(runs: Runs) -> Runs:
    """Joins runs that follow each other on both sides."""
    if len(runs) < 2:
        return np.ascontiguousarray(runs, dtype=np.int64)
    joins = (runs[1:, 0] == runs[:-1, 0] + runs[:-1, 2]) & (runs[1:, 1] == runs[:-1, 1] + runs[:-1, 2])
    first = np.flatnonzero(np.concatenate(([True], ~joins)))
    lengths = np.add.reduceat(runs[:, 2], first)
    return np.stack([runs[first, 0], runs[first, 1], lengths], axis=1)


def intersect(target: Runs, source: Runs) -> np.ndarray:
    """[m, 3] int64: (target_local, source_local, length) for every overlap, in atomic order."""
    if not len(target) or not len(source):
        return EMPTY
    target_stop, source_stop = target[:, 0] + target[:, 2], source[:, 0] + source[:, 2]
    low = np.searchsorted(source_stop, target[:, 0], side="right")
    high = np.searchsorted(source[:, 0], target_stop, side="left")
    count = np.maximum(high - low, 0)
    t = np.repeat(np.arange(len(target)), count)
    s = np.arange(len(t)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low, count)
    begin = np.maximum(target[t, 0], source[s, 0])
    end = np.minimum(target_stop[t], source_stop[s])
    out = np.stack([target[t, 1] + begin - target[t, 0], source[s, 1] + begin - source[s, 0], end - begin], axis=1)
    return np.ascontiguousarray(out)


def tiling_faults(target: Runs, sources: list[Runs]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(missing, doubled): atomic intervals of `target` that no source holds, and those that more than one does."""
    edges: list[np.ndarray] = []
    for runs, weight in ((target, 1 << 32), *((s, 1) for s in sources)):
        edges.append(np.stack([runs[:, 0], np.full(len(runs), weight)], axis=1))
        edges.append(np.stack([runs[:, 0] + runs[:, 2], np.full(len(runs), -weight)], axis=1))
    events = np.concatenate(edges)
    events = events[np.argsort(events[:, 0], kind="stable")]
    position, first = np.unique(events[:, 0], return_index=True)
    if not len(position):
        return [], []
    level = np.cumsum(np.add.reduceat(events[:, 1], first))
    wanted, holders = level >> 32 > 0, level & 0xFFFFFFFF

    def intervals(mask: np.ndarray) -> list[tuple[int, int]]:
        joined: list[tuple[int, int]] = []
        for i in np.flatnonzero(mask[:-1]):
            start, stop = int(position[i]), int(position[i + 1])
            if joined and joined[-1][1] == start:
                start = joined.pop()[0]
            joined.append((start, stop))
        return joined

    return intervals(wanted & (holders == 0)), intervals(wanted & (holders > 1))


def numel(runs: Runs) -> int:
    return int(runs[:, 2].sum())


def box_runs(box: Box, atomic_shape: tuple[int, ...], shard_shape: tuple[int, ...]) -> Runs:
    """One run per stretch that is contiguous on both sides, in atomic order."""
    extents = [stop - start for start, stop in box.atomic]
    # Dimensions from `inner` on are whole on both sides, so a run spans them and the range of the one before.
    inner = len(extents)
    while inner > 0 and extents[inner - 1] == atomic_shape[inner - 1] == shard_shape[inner - 1]:
        inner -= 1
    if inner == 0:
        return np.array([[0, 0, math.prod(extents)]], dtype=np.int64)
    atomic_stride = [math.prod(atomic_shape[i + 1 :]) for i in range(len(extents))]
    shard_stride = [math.prod(shard_shape[i + 1 :]) for i in range(len(extents))]
    length = extents[inner - 1] * atomic_stride[inner - 1]
    atomic = np.array([sum(r[0] * s for r, s in zip(box.atomic[:inner], atomic_stride))], dtype=np.int64)
    shard = np.array([sum(r[0] * s for r, s in zip(box.shard[:inner], shard_stride))], dtype=np.int64)
    for dim in range(inner - 1):
        steps = np.arange(extents[dim], dtype=np.int64)
        atomic = (atomic[:, None] + steps * atomic_stride[dim]).reshape(-1)
        shard = (shard[:, None] + steps * shard_stride[dim]).reshape(-1)
    return np.stack([atomic, shard, np.full(len(atomic), length, dtype=np.int64)], axis=1)
