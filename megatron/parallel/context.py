"""This rank's place and its process groups, as one frozen value that is passed to whoever communicates.

No global groups. A layer that talks to others gets the context by parameter, so what it can talk to
is visible where it is built, and a single process is just `ParallelContext.single()`.

    context = build_context(topology)         # collective over the world
    context.tp_rank, context.tp_size          # 1, 2
    torch.distributed.all_reduce(x, group=context.tp_group)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.ucp.layout import ShardRank
from megatron.ucp.topology import RankCoords, Topology


class WorldSizeError(RuntimeError):
    """The process group that is running is not of the topology's size."""


@dataclass(frozen=True)
class ParallelContext:
    topology: Topology
    rank: int = 0
    tp_group: ProcessGroup | None = None
    """Ranks that share one block's matrices. A group of one rank is None, here and below."""
    sp_group: ProcessGroup | None = None
    """Ranks that see the same samples, each another chunk of every sequence (Ulysses)."""
    zero_group: ProcessGroup | None = None
    """Ranks that hold the same shard, over which gradients are averaged and ZeRO partitions: dp and sp together."""
    pp_group: ProcessGroup | None = None
    """Ranks that hold the stages of one model."""
    ep_group: ProcessGroup | None = None
    """Ranks of `zero_group` that together hold all experts, each some of them; they exchange tokens."""
    edp_group: ProcessGroup | None = None
    """Ranks of `zero_group` that hold the same experts, over which ZeRO partitions these."""
    ep_tp_group: ProcessGroup | None = None
    """The tp groups of all ranks of `ep_group`."""
    sequence_parallel: bool = False
    """Megatron's: between the matrices of a block, activations are cut over tp along the sequence."""
    marks_of_experts: Mapping[str, Any] = field(default_factory=dict)
    """Attributes that the engine wants on parameters of which ep ranks hold different values; set as they are made."""

    @classmethod
    def single(cls) -> ParallelContext:
        """One process, no groups; torch.distributed need not be initialised."""
        return cls(Topology())

    @cached_property
    def coords(self) -> RankCoords:
        return self.topology.coords(self.rank)

    @property
    def tp_rank(self) -> int:
        return self.coords.tp

    @property
    def tp_size(self) -> int:
        return self.topology.tp_size

    @property
    def dp_rank(self) -> int:
        return self.coords.dp

    @property
    def dp_size(self) -> int:
        return self.topology.dp_size

    @property
    def sp_rank(self) -> int:
        return self.coords.sp

    @property
    def sp_size(self) -> int:
        return self.topology.sp_size

    @property
    def zero_rank(self) -> int:
        """Index in `zero_group`, and the number in ZeRO's file names. Never a node-local rank."""
        return self.topology.zero_rank(self.coords)

    @property
    def zero_size(self) -> int:
        return self.topology.zero_size

    @property
    def ep_rank(self) -> int:
        return self.topology.ep_rank(self.coords)

    @property
    def ep_size(self) -> int:
        return self.topology.ep_size

    @property
    def edp_rank(self) -> int:
        return self.topology.edp_rank(self.coords)

    @property
    def edp_size(self) -> int:
        return self.topology.edp_size

    @property
    def is_sequence_parallel(self) -> bool:
        return self.sequence_parallel and self.tp_size > 1

    @property
    def pp_rank(self) -> int:
        return self.coords.pp

    @property
    def pp_size(self) -> int:
        return self.topology.pp_size

    @property
    def shard_rank(self) -> ShardRank:
        """What layouts ask for."""
        return ShardRank(self.tp_rank, self.tp_size, self.ep_rank, self.ep_size)


def build_context(topology: Topology, sequence_parallel: bool = False) -> ParallelContext:
    """Collective over the world, which must be initialised. Raises WorldSizeError."""
    if dist.get_world_size() != topology.world_size:
        raise WorldSizeError(
            f"the topology {topology} does not fit the processes that were started. Found: "
            f"{dist.get_world_size()} processes. Expected: {topology.world_size}. What to do: start that many, or "
            "change a parallel degree."
        )
    rank = dist.get_rank()
    groups: dict[str, ProcessGroup | None] = {}
    # new_group is collective over the world: every rank creates every group, in the same order.
    for axis in ("tp", "sp", "zero", "pp", "ep", "edp", "ep_tp"):
        groups[axis] = None
        if topology.ep_size == 1 and axis in ("ep", "edp", "ep_tp"):
            continue  # experts lie as everything else
        for ranks in topology.groups(axis):
            if len(ranks) == 1 and axis != "edp":  # which DeepSpeed wants in any case
                continue
            group = dist.new_group(ranks)
            if rank in ranks:
                groups[axis] = group
    by_name: dict[str, Any] = {f"{axis}_group": group for axis, group in groups.items()}
    return ParallelContext(topology, rank, **by_name, sequence_parallel=sequence_parallel)
