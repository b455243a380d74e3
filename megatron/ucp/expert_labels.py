"""Which experts a shard or a file holds, for messages: an expert that is missing or wrong is named.

A parameter cut over the axis "ep" has its experts along that dimension, so a range of it is a range of
experts.

    experts_of_shard(layout, rank)         # " (experts 2 to 3)", or nothing
    experts_in_files(manifest, ["zero_pp_rank_1_mp_rank_00_optim_states.pt"])
    experts_clause(manifest, files)        # "; with them layers.1.mlp.experts.dense_4h_to_h (experts 2 to 3)"
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from megatron.ucp.errors import listed
from megatron.ucp.file_names import DEALT_FILE, STAGE3_MODEL_FILE, ZERO_FILE
from megatron.ucp.layout import Layout, ShardRank
from megatron.ucp.manifest import Manifest

_FILES_OF_A_RANK = (ZERO_FILE, STAGE3_MODEL_FILE, DEALT_FILE)
"""Of a ZeRO rank or, what ZeRO does not partition, of an ep rank."""


def experts_of_shard(layout: Layout, rank: ShardRank) -> str:
    dim = next((cut.dim for cut in layout.cuts if cut.axis == "ep"), None)
    if dim is None or rank.ep_size == 1:
        return ""
    ranges = [box.atomic[dim] for box in layout.boxes(rank)]
    return label_of(range(min(start for start, _ in ranges), max(stop for _, stop in ranges)))


def label_of(experts: Iterable[int]) -> str:
    """ " (experts 2 to 3)", " (experts 0, 3)", " (expert 1)", or nothing."""
    numbers = sorted(experts)
    if len(numbers) < 2:
        return f" (expert {numbers[0]})" if numbers else ""
    is_range = numbers[-1] - numbers[0] + 1 == len(numbers)
    return f" (experts {numbers[0]} to {numbers[-1]})" if is_range else f" (experts {', '.join(map(str, numbers))})"


def experts_in_files(manifest: Manifest, files: Iterable[str]) -> list[str]:
    """What expert-parallel ranks' files hold that other ranks' do not: "layers.1.mlp.experts.dense_h_to_4h (experts 2
    to 3)", sorted. Empty for a save without expert parallelism."""
    topology = manifest.topology
    if topology.ep_size == 1:
        return []
    dealt = [(name, info) for name, info in manifest.parameters.items() if info.layout.is_cut_over("ep")]
    held = set()
    names = [PurePosixPath(file).name for file in files]
    for match in filter(None, (pattern.match(name) for name in names for pattern in _FILES_OF_A_RANK)):
        ep_rank, stage = int(match[1]) % topology.ep_size, int(match[2]) // topology.tp_size
        # Of what ZeRO partitions, weights are only where its states are.
        has_only_frozen = match.re is STAGE3_MODEL_FILE or (match.re is DEALT_FILE and manifest.is_partitioned)
        held |= {
            name + experts_of_shard(info.layout, ShardRank(0, topology.tp_size, ep_rank, topology.ep_size))
            for name, info in dealt
            if stage in info.pp_stages and not (has_only_frozen and info.is_trainable)
        }
    return sorted(held)


def experts_clause(manifest: Manifest, files: Iterable[str]) -> str:
    """The same as a clause, or nothing."""
    experts = experts_in_files(manifest, files)
    return f"; with them {listed(experts)}" if experts else ""
