"""What would each rank of another topology read? Bytes and files, without reading any data.

A Target rank owns intervals of shards, a Source has pieces of the same parameter, and their intersection
is counted instead of copied.

    for rank in plan(source, Topology(dp_size=4), zero_stage=1): rank.num_bytes, rank.files
    predicted_seconds(source, reads, num_nodes=48, rates=Rates.alike(5e9))

ZeRO partitions are modelled as DeepSpeed makes them: the shards of all parameters in order, padded to the number of
ranks; pipeline stages as equal stretches of the parameter list. The vocabulary's padding of the Target is not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from megatron.ucp.disk_rates import Rates
from megatron.ucp.layout import Layout, ShardRank
from megatron.ucp.runs import Runs, intersect, numel, shard_runs, whole_runs
from megatron.ucp.sources import Source
from megatron.ucp.topology import Topology


@dataclass
class RankReads:
    rank: int
    num_bytes: int = 0
    num_runs: int = 0
    files: dict[str, int] = field(default_factory=dict)
    """Bytes by file name."""


@dataclass(frozen=True)
class _Share:
    """Elements [start, stop) of a parameter's shard, which one rank of the Target reads."""

    rank: int
    shard: ShardRank
    start: int
    stop: int


def plan(source: Source, target: Topology, zero_stage: int = 1) -> list[RankReads]:
    """By rank of `target`. Raises LayoutError where the model cannot be cut that way."""
    reads = [RankReads(rank) for rank in range(target.world_size)]
    shares = _shares(source, target, zero_stage)
    overlaps = _Overlaps()
    sizes: dict[tuple[str, bool], int] = {}
    names: dict[Path, str] = {}
    manifest = source.manifest
    for name, info in manifest.parameters.items():
        layout = info.layout.without_padding()
        # Of partitioned states those that are cut as the masters are lie in the same files, at the same places.
        together = manifest.kind == "native" and manifest.is_partitioned and info.is_trainable
        alike = [state for state in info.states if together and state not in info.shapes]
        for states in [*([alike] if alike else []), *([state] for state in info.states if state not in alike)]:
            pieces = [piece for piece in source.pieces(name, states[0]) if piece.copy == 0]
            for state in states if pieces else ():
                if (state, info.is_trainable) not in sizes:
                    first = next(piece for piece in source.pieces(name, state) if piece.copy == 0)
                    sizes[state, info.is_trainable] = source.tensor(first).element_size()
            num_bytes = sum(sizes.get((state, info.is_trainable), 0) for state in states)
            for share in shares.get(name, ()):
                if states[0] in info.shapes:
                    wanted = whole_runs(info.layout_of(states[0]).numel)
                else:
                    wanted = overlaps.runs(layout, share)
                rank = reads[share.rank]
                for piece in pieces:
                    count, num_runs = overlaps.of(wanted, piece.runs)
                    if count:
                        rank.num_bytes += count * num_bytes
                        rank.num_runs += num_runs * len(states)
                        key = names.setdefault(piece.file, piece.file.relative_to(source.folder).as_posix())
                        rank.files[key] = rank.files.get(key, 0) + count * num_bytes
    return reads


@dataclass(frozen=True)
class Seconds:
    save: float
    convert: float
    load: float


def predicted_seconds(source: Source, reads: list[RankReads], num_nodes: int, rates: Rates) -> Seconds:
    """Of a save of the Source, a conversion of it that all nodes share, and a resume by the ranks of `reads`, dealt to
    the nodes in order, where each node has those rates. Starting programs and building models comes to it; rates that
    are a disk's alone say nothing of processors that are slower."""
    manifest = source.manifest
    states = sum(4 * info.layout_of(state).numel for info in manifest.parameters.values() for state in info.states)
    saved = sum(info.bytes for info in manifest.files.values()) or states
    per_node = -(-len(reads) // num_nodes)
    nodes = [sum(rank.num_bytes for rank in reads[i : i + per_node]) for i in range(0, len(reads), per_node)]
    return Seconds(
        save=saved / (num_nodes * rates.save),
        convert=(saved + states) / (num_nodes * rates.convert),
        load=max(nodes, default=0) / rates.load,
    )


class _Overlaps:
    """Layers are alike, so that most questions have been asked before."""

    def __init__(self) -> None:
        self._runs: dict[tuple[Layout, ShardRank, int, int], Runs] = {}
        self._counts: dict[tuple[int, int], tuple[Runs, Runs, int, int]] = {}
        """By the arrays themselves, which are kept so that no other takes their place."""

    def runs(self, layout: Layout, share: _Share) -> Runs:
        key = layout, share.shard, share.start, share.stop
        if key not in self._runs:
            self._runs[key] = shard_runs(layout, share.shard, share.start, share.stop)
        return self._runs[key]

    def of(self, wanted: Runs, held: Runs) -> tuple[int, int]:
        """(elements, runs) of both."""
        if not len(wanted) or not len(held) or wanted[0, 0] >= held[-1, 0] + held[-1, 2]:
            return 0, 0
        if held[0, 0] >= wanted[-1, 0] + wanted[-1, 2]:
            return 0, 0
        key = id(wanted), id(held)
        if key not in self._counts:
            copies = intersect(wanted, held)
            self._counts[key] = wanted, held, numel(copies), len(copies)
        return self._counts[key][2:]


def _shares(source: Source, target: Topology, zero_stage: int) -> dict[str, list[_Share]]:
    """By parameter: which ranks read what of it. Those that have it in their optimizer, and of a frozen one all."""
    parameters = source.manifest.parameters
    stages = _stages(list(parameters), target.pp_size)
    shares: dict[str, list[_Share]] = {}
    cut: dict[tuple[int, ShardRank], list[_Interval]] = {}
    for rank in range(target.world_size):
        coords = target.coords(rank)
        shard = ShardRank(coords.tp, target.tp_size, target.ep_rank(coords), target.ep_size)
        if (coords.pp, shard) not in cut:
            cut[coords.pp, shard] = _intervals(source, stages[coords.pp], shard, target.zero_size, zero_stage)
        for interval in cut[coords.pp, shard]:
            index = target.zero_rank(coords)
            if interval.is_dealt and zero_stage:
                index //= shard.ep_size
            if interval.index in (None, index):
                share = _Share(rank, shard, interval.start, interval.stop)
                shares.setdefault(interval.name, []).append(share)
    return shares


@dataclass(frozen=True)
class _Interval:
    """Of a parameter's shard, and which of the ranks that share it out has it; None: each."""

    name: str
    index: int | None
    is_dealt: bool
    """The ranks that share it out are those of one ep rank."""
    start: int
    stop: int


def _stages(names: list[str], pp_size: int) -> list[list[str]]:
    edges = [round(i * len(names) / pp_size) for i in range(pp_size + 1)]
    return [names[a:b] for a, b in zip(edges, edges[1:])]


def _intervals(source: Source, names: list[str], shard: ShardRank, zero_size: int, zero_stage: int) -> list[_Interval]:
    """Of all parameters of a stage."""
    intervals = []
    groups: dict[tuple[str, bool], list[str]] = {}
    sizes: dict[str, int] = {}
    for name in names:
        info = source.manifest.parameters[name]
        sizes[name] = math.prod(info.layout.without_padding().shard_shape(shard))
        if info.is_trainable:
            groups.setdefault((info.group, info.layout.is_cut_over("ep")), []).append(name)
        else:  # no optimizer has it, so nobody shares it out
            intervals.append(_Interval(name, None, False, 0, sizes[name]))
    for (_, is_dealt), members in groups.items():
        count = zero_size if zero_stage else 1
        if is_dealt and zero_stage:
            count //= shard.ep_size
        size = max(1, -(-sum(sizes[name] for name in members) // count))
        offset = 0
        for name in members:
            for index in range(offset // size, -(-(offset + sizes[name]) // size)):
                start, stop = max(index * size - offset, 0), min((index + 1) * size - offset, sizes[name])
                intervals.append(_Interval(name, index if zero_stage else None, is_dealt, start, stop))
            offset += sizes[name]
    return intervals
