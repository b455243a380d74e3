"""Which experts a shard or a file holds, for messages: an expert that is missing or wrong is named.

The one idea: a parameter cut over the axis "ep" has its experts along that dimension, so a range of it is a range of
experts.

    experts_of_shard(layout, rank)                   # " (experts 2 to 3)", or nothing
    experts_in_files(manifest, ["zero_pp_rank_1_mp_rank_00_optim_states.pt"])
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron.ucp.layout import Layout, ShardRank
from megatron.ucp.manifest import Manifest

_ZERO_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_(?:optim|model)_states\.pt$")
_EP_RANK = re.compile(r"expp_rank_(\d+)_mp_rank_\d+_expert_states\.pt$")


def experts_of_shard(layout: Layout, rank: ShardRank) -> str:
    dim = next((cut.dim for cut in layout.cuts if cut.axis == "ep"), None)
    if dim is None or rank.ep_size == 1:
        return ""
    ranges = [box.atomic[dim] for box in layout.boxes(rank)]
    first, last = min(start for start, _ in ranges), max(stop for _, stop in ranges) - 1
    return f" (expert {first})" if first == last else f" (experts {first} to {last})"


def experts_in_files(manifest: Manifest, files: Iterable[str]) -> list[str]:
    """What expert-parallel ranks' files hold that other ranks' do not: "layers.1.mlp.experts.dense_h_to_4h (experts 2
    to 3)", sorted. Empty for a save without expert parallelism."""
    ep_size = manifest.topology.ep_size
    if ep_size == 1:
        return []
    ranks = {int(match[1]) % ep_size for name in files if (match := _ZERO_RANK.search(name) or _EP_RANK.search(name))}
    dealt = [(name, info.layout) for name, info in manifest.parameters.items() if info.layout.is_cut_over("ep")]
    return [
        name + experts_of_shard(layout, ShardRank(0, manifest.topology.tp_size, ep_rank, ep_size))
        for ep_rank in sorted(ranks)
        for name, layout in sorted(dealt)
    ]
