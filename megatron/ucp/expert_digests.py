"""Which experts of a parameter are not those that were saved?

Experts stand one after the other in their parameter, and a digest adds up over any partition; so a save
can keep one digest for each expert, whose sum is the parameter's, and a wrong sum be taken apart.

    changed_experts(source, "layers.1.mlp.experts.dense_h_to_4h", "exp_avg")          # [2, 3]
"""

from __future__ import annotations

from megatron.ucp.digest import Digest, digest_runs
from megatron.ucp.execute import chunks
from megatron.ucp.layout import Layout
from megatron.ucp.sources.source import Source


def num_experts(layout: Layout) -> int:
    """0 where the parameter is not experts, one after the other."""
    return layout.shape[0] if any(cut.axis == "ep" and cut.dim == 0 for cut in layout.cuts) else 0


def expert_elements(layout: Layout, expert: int) -> tuple[int, int]:
    """First element of the flattened parameter that is the expert's, and one past the last."""
    size = layout.numel // layout.shape[0]
    return expert * size, (expert + 1) * size


def changed_experts(source: Source, name: str, state: str) -> list[int]:
    """Empty where the save kept no digests of experts. Reads the whole parameter; raises as `gather`."""
    saved = source.manifest.expert_digests.get(name, {}).get(state, [])
    if not saved:
        return []
    layout = source.manifest.parameters[name].layout_of(state)
    changed = []
    for expert, digest in enumerate(saved):
        found = Digest()
        for runs, values in chunks(source, name, state, *expert_elements(layout, expert)):
            found += digest_runs(values, runs, name=name, state=state, shape=layout.shape)
        if found.hex() != digest:
            changed.append(expert)
    return changed
