"""Which ranks hold which experts: DeepSpeed's expert-parallel groups, from what the files of one stage say.

The ranks of a pipeline stage stand in a row; expert-parallel groups are neighbours in it ("E + D"), or,
under `use_data_before_expert_parallelism`, ranks at equal distances ("D + E"). The row is the data-parallel group where
tensor parallelism cuts the experts too, else all ranks of the stage, tp fastest.

    ranks = ExpertRanks(dp_size=4, tp_size=1, ep_size=2, is_cut=False, is_data_first=False)
    ranks.holders(1)          # [[(1, 0), (3, 0)]]: (dp rank, tp rank) in the order of the partitions, by tp shard
    ranks.ep_rank(3, 0)       # 1

Source: deepspeed/utils/groups.py (_create_expert_and_data_parallel, _get_expert_parallel_ranks). Ranks in another order
(an mpu with dp fastest) are found out by the weights, see expert_weights.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.ucp.errors import SourceError, UnsupportedCheckpointError, listed
from megatron.ucp.sources.foreign.expert_files import MoeLayer, split_name
from megatron.ucp.sources.optimizer_file import OptimizerFile
from megatron.ucp.topology import Topology

DATA_FIRST = "use_data_before_expert_parallelism"


@dataclass(frozen=True)
class ExpertRanks:
    dp_size: int
    tp_size: int
    ep_size: int
    is_cut: bool
    """Tensor parallelism cuts the experts (`enable_expert_tensor_parallelism`)."""
    is_data_first: bool

    @property
    def num_partitions(self) -> int:
        return self._row // self.ep_size

    @property
    def _row(self) -> int:
        return self.dp_size if self.is_cut else self.dp_size * self.tp_size

    def holders(self, ep_rank: int) -> list[list[tuple[int, int]]]:
        """For each tp shard of the experts of `ep_rank` the (dp rank, tp rank) of its ZeRO partitions, in order."""
        if self.is_data_first:
            positions = range(ep_rank * self.num_partitions, (ep_rank + 1) * self.num_partitions)
        else:
            positions = range(ep_rank, self._row, self.ep_size)
        if self.is_cut:
            return [[(position, tp) for position in positions] for tp in range(self.tp_size)]
        return [[divmod(position, self.tp_size) for position in positions]]

    def ep_rank(self, dp_rank: int, tp_rank: int) -> int:
        position = dp_rank if self.is_cut else dp_rank * self.tp_size + tp_rank
        return position // self.num_partitions if self.is_data_first else position % self.ep_size


def is_data_first(content: Mapping[str, Any], where: Path) -> bool:
    """By DeepSpeed's configuration in the model states. Raises UnsupportedCheckpointError where it is not there."""
    config = content.get("ds_config")
    if not isinstance(config, Mapping):
        raise UnsupportedCheckpointError(
            "without DeepSpeed's configuration the files do not say which ranks share experts",
            expected=f"ds_config in the model states, with or without {DATA_FIRST}",
            where=where,
        )
    return bool(config.get(DATA_FIRST, False))


def ranks_of_experts(
    content: Mapping[str, Any], optimizer: OptimizerFile, layers: Sequence[MoeLayer], topology: Topology, where: Path
) -> dict[int, ExpertRanks]:
    """By number of the layer; a layer of which nothing is trained has none. `content` are the model states of a stage,
    `optimizer` the states of any of its ranks. Raises SourceError or UnsupportedCheckpointError."""
    tables = content["param_shapes"]
    counts, groups = optimizer.partition_counts(), optimizer.param_groups()
    ranks: dict[int, ExpertRanks] = {}
    for layer in layers:
        local: set[int] = set()
        of_layer: set[int] = set()
        for group, table in enumerate(tables):
            numbers = {parts[1] for name in table if (parts := split_name(name)) and parts[0] == layer.name}
            local |= numbers
            of_layer |= {group} if numbers else set()
        if not local:
            continue
        ep_size, rest = divmod(layer.num_experts, len(local))
        if rest or local != set(range(len(local))):
            raise SourceError(
                f"layer {layer.number} ({layer.name}) has {layer.num_experts} experts, but a rank lists others",
                found=f"experts {listed(local)} of a rank",
                where=where,
            )
        found = {int(counts[group]) for group in of_layer} if isinstance(counts, (list, tuple)) else {int(counts)}
        rows = {topology.zero_size * topology.tp_size: False, topology.zero_size: topology.tp_size > 1}
        row = ep_size * next(iter(found))
        names = {groups[group].get("name") for group in of_layer} if groups else set()
        if len(found) > 1 or row not in rows or not names <= {f"ep_size_{ep_size}", None}:
            raise UnsupportedCheckpointError(
                f"the ZeRO partitions of the experts of layer {layer.number} ({layer.name}) fit no expert parallelism",
                found=f"{len(local)} of {layer.num_experts} experts on a rank, partition_count {listed(found)}, "
                f"groups {listed(names) or 'without names'}",
                expected=f"{ep_size} x partition_count = {listed(rows)}, group ep_size_{ep_size}",
                where=where,
                do="experts need parameter groups of their own (split_params_into_different_moe_groups_for_optimizer)",
            )
        ranks[layer.number] = ExpertRanks(
            dp_size=topology.zero_size,
            tp_size=topology.tp_size,
            ep_size=ep_size,
            is_cut=rows[row],
            is_data_first=ep_size > 1 and is_data_first(content, where),
        )
    return ranks
