"""What would each rank of another topology read? Bytes and files, without reading any data.

A Target rank owns intervals of shards, a Source has pieces of the same parameter, and their intersection
is counted instead of copied.

    for rank in plan(source, Topology(dp_size=4), zero_stage=1): rank.num_bytes, rank.files

ZeRO partitions are modelled as DeepSpeed makes them: the shards of all parameters in order, padded to the number of
ranks; pipeline stages as equal stretches of the parameter list. The vocabulary's padding of the Target is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron.ucp.layout import Layout, ShardRank
from megatron.ucp.runs import intersect, numel, shard_runs, whole_runs
from megatron.ucp.sources import Source
from megatron.ucp.topology import Topology


@dataclass
class RankReads:
    rank: int
    num_bytes: int = 0
    num_runs: int = 0
    files: dict[str, int] = field(default_factory=dict)
    """Bytes by file name."""


def plan(source: Source, target: Topology, zero_stage: int = 1) -> list[RankReads]:
    """By rank of `target`. Raises LayoutError where the model cannot be cut that way."""
    reads = [RankReads(rank) for rank in range(target.world_size)]
    parameters = source.manifest.parameters
    stages = _stages(list(parameters), target.pp_size)
    pieces = {
        (name, state): [p for p in source.pieces(name, state) if p.copy == 0]
        for name, info in parameters.items()
        for state in info.states
    }
    for rank in reads:
        coords = target.coords(rank.rank)
        shard_rank = ShardRank(coords.tp, target.tp_size, target.ep_rank(coords), target.ep_size)
        zero = target.zero_rank(coords), target.zero_size
        for name, layout, start, stop in _owned(source, stages[coords.pp], shard_rank, zero, zero_stage):
            runs = shard_runs(layout, shard_rank, start, stop)
            for state in parameters[name].states:
                of_state = parameters[name].layout_of(state)
                wanted = whole_runs(of_state.numel) if state in parameters[name].shapes else runs
                for piece in pieces[name, state]:
                    copies = intersect(wanted, piece.runs)
                    if len(copies):
                        count = numel(copies) * source.tensor(piece).element_size()
                        rank.num_bytes += count
                        rank.num_runs += len(copies)
                        key = piece.file.relative_to(source.folder).as_posix()
                        rank.files[key] = rank.files.get(key, 0) + count
    return reads


def _stages(names: list[str], pp_size: int) -> list[list[str]]:
    edges = [round(i * len(names) / pp_size) for i in range(pp_size + 1)]
    return [names[a:b] for a, b in zip(edges, edges[1:])]


def _owned(
    source: Source, names: list[str], rank: ShardRank, zero: tuple[int, int], zero_stage: int
) -> Iterator[tuple[str, Layout, int, int]]:
    """Intervals of each parameter's shard that the rank reads: those in its optimizer, and all that is frozen."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        info = source.manifest.parameters[name]
        if info.is_trainable:
            groups.setdefault((info.group, info.layout.is_cut_over("ep")), []).append(name)
        else:  # no optimizer has it, so nobody shares it out
            layout = info.layout.without_padding()
            yield name, layout, 0, math.prod(layout.shard_shape(rank))
    for (_, is_dealt), members in groups.items():
        layouts = {name: source.manifest.parameters[name].layout.without_padding() for name in members}
        sizes = {name: math.prod(layout.shard_shape(rank)) for name, layout in layouts.items()}
        index, count = zero if zero_stage else (0, 1)
        if is_dealt and zero_stage:
            index, count = index // rank.ep_size, count // rank.ep_size
        size = -(-sum(sizes.values()) // count)
        first, last, offset = index * size, (index + 1) * size, 0
        for name in members:
            start, stop = max(first - offset, 0), min(last - offset, sizes[name])
            if stop > start:
                yield name, layouts[name], start, stop
            offset += sizes[name]
