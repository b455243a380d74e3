"""Are the tensors that are there those of a model of this architecture? Names and shapes, all that is wrong at once.

matched = match(names, model, {"model.norm.weight": (64,), ...})
matched.faults                                  # one line each; empty where it fits
matched.by_parameter["final_norm.weight"]       # [(pair, the name there)]
matched.tied                                    # the name of an output layer that is the word embedding once more
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.ucp.errors import listed
from megatron.ucp.naming.adapters import is_adapter
from megatron.ucp.naming.gpt_model import GptModel
from megatron.ucp.naming.names import Names
from megatron.ucp.naming.tensors import Pair, pairs

_OF_ADAPTER = re.compile(r"base_model\.model\..*\.lora_[AB]\.weight")
"""PEFT's name of a tensor."""
_UP = "mlp.experts.dense_h_to_4h"


@dataclass(frozen=True)
class Matched:
    by_parameter: Mapping[str, list[tuple[Pair, str]]]
    tied: str | None
    faults: list[str]


def match(
    names: Names, model: GptModel, shapes: Mapping[str, tuple[int, ...]], *, only_adapters: bool = False
) -> Matched:
    """Experts may be one by one or in one tensor; older names without their prefix, and those that transformers has in
    memory, are known too. `only_adapters`: nothing else is to be there."""
    if model.num_layers > len(shapes):
        return Matched({}, None, [f"{model.num_layers} blocks, and {len(shapes)} tensors in all"])
    there = _canonical(names, shapes)
    has_whole_experts = any(name.endswith(f".{names.whole_experts.get(_UP)}") for name in there)
    found: dict[str, list[tuple[Pair, str]]] = {}
    faults, missing = list[str](), list[str]()
    for pair in pairs(names, model, has_whole_experts=has_whole_experts):
        if only_adapters and not is_adapter(pair.ours):
            continue
        name = there.pop(pair.name, None)
        if name is None:
            missing.append(pair.name)
        elif shapes[name] != pair.shape:
            faults.append(f"{name} is {shapes[name]}, {pair.shape} is expected")
        else:
            found.setdefault(pair.ours, []).append((pair, name))
    tied = there.pop(f"{names.lm_head}.weight", None)
    if missing:
        faults.append(f"{len(missing)} tensor(s) are missing: {listed(missing)}")
    if there:
        faults.append(f"{len(there)} tensor(s) have no place in a {names.title}: {listed(there)}")
    return Matched(found, tied, sorted(faults))


def _canonical(names: Names, there: Mapping[str, object]) -> dict[str, str]:
    """Names as transformers writes them -> as they are there, without what is no parameter."""
    kept = [name for name in there if not names.ignored.fullmatch(name) and not _OF_ADAPTER.fullmatch(name)]
    adapters = {name: name for name in there if _OF_ADAPTER.fullmatch(name)}
    in_memory = {"lm_head.weight": f"{names.lm_head}.weight"}
    if any(name.startswith(names.prefix) for name in kept):
        return adapters | {in_memory.get(name, name): name for name in kept}
    is_head = f"{names.lm_head}.", "lm_head."
    named = {in_memory.get(name, name) if name.startswith(is_head) else names.prefix + name: name for name in kept}
    return adapters | named
