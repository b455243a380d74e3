"""Are the weights in the experts' own files those that the optimizer holds under the same numbers?

DeepSpeed saves every expert twice, as weights in a file that carries its number and as masters in the
optimizer's files, where only the rank tells the number. Both have to agree; where they do not, the expert is named, and
the one whose weights they are, if there is one. Only the beginning of large tensors is compared.

    faults = weight_faults(cache, layer, masters, files)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.ucp.sources.foreign.expert_files import MoeLayer
from megatron.ucp.sources.foreign.expert_source import ExpertFragment
from megatron.ucp.sources.source import FileCache
from megatron.ucp.stored import is_rounded

_NUM_COMPARED = 4096
"""Elements of each part of each parameter."""

Weights = Mapping[tuple[str, int], tuple[Path, str]]
"""(name inside the expert, tp shard) -> file and key."""


def weight_faults(
    cache: FileCache,
    layer: MoeLayer,
    masters: Mapping[int, Mapping[str, Sequence[ExpertFragment]]],
    weights: Mapping[int, Weights],
) -> list[str]:
    """One line for each expert of the layer whose weights are not its masters. Both by number of the expert."""
    faults = []
    for expert, held in weights.items():
        files = _disagreeing(cache, masters.get(expert, {}), held)
        if not files:
            continue
        others = [other for other in masters if other != expert and not _disagreeing(cache, masters[other], held)]
        whose = f"; they are those of expert {others[0]}" if others else ""
        faults.append(f"{layer.title(expert)}: the weights in {' and the masters in '.join(files)} differ{whose}")
    return faults


def _disagreeing(cache: FileCache, masters: Mapping[str, Sequence[ExpertFragment]], held: Weights) -> list[str]:
    """The two files that disagree; empty where none do."""
    for rest, fragments in masters.items():
        for fragment in fragments:
            file, key = held[rest, fragment.tp]
            stop = min(fragment.stop, fragment.start + _NUM_COMPARED)
            master_file, path = fragment.locations["fp32"]
            weight = cache.tensor(file, (key,)).part(fragment.start, stop)
            end = fragment.offset + stop - fragment.start
            if not is_rounded(cache.tensor(master_file, path).part(fragment.offset, end), weight):
                return [file.name, master_file.name]
    return []
