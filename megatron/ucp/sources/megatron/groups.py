"""The optimizer's parameter groups of other Megatrons by the names that this program gives its own.

optimizer = optimizer_of([{"lr": 1e-3, "wd_mult": 0.0, ...}], model)
group_of("decoder.final_layernorm.weight", 1, model, optimizer.groups)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron.ucp.json_checks import number, passes
from megatron.ucp.manifest import OptimizerInfo
from megatron.ucp.naming.gpt_model import GptModel

_KEPT = {"lr": number(0), "eps": number(0), "weight_decay": number()}


def kept_values(group: Mapping[str, Any]) -> dict[str, Any]:
    """Of a group what a run takes over. A group that is not decayed keeps the decay of the others beside a factor."""
    values = {key: group[key] for key, check in _KEPT.items() if passes(check, group.get(key))}
    betas = group.get("betas")
    if isinstance(betas, (tuple, list)) and len(betas) == 2 and all(passes(number(0, 1), b) for b in betas):
        values["betas"] = list(betas)
    values["weight_decay"] = values.get("weight_decay", 0.0) if group.get("wd_mult", 1.0) else 0.0
    return values


def kind_of(groups: Iterable[Mapping[str, Any]]) -> str:
    """Name of the optimizer: torch's Adam adds the weight decay to the gradient, all others decouple it."""
    return "AdamW" if all(group.get("decoupled_weight_decay") is not False for group in groups) else "Adam"


def optimizer_of(groups: Sequence[Mapping[str, Any]], model: GptModel) -> OptimizerInfo:
    """The optimizer with its groups by our names. Without groups where several of theirs would have one name: then a
    run takes its flags'."""
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        is_decayed = bool(group.get("wd_mult", 1.0))
        name = _name(is_decayed, bool(group.get("is_decoupled_lr")), bool(group.get("is_expert_parallel")))
        values = kept_values(group)
        if found.setdefault(name, values) != values:
            return OptimizerInfo(kind_of(groups))
    if model.has_experts:  # without expert parallelism theirs are among the others, ours are not
        for name in {"decay", "no_decay"} & set(found):
            found.setdefault("experts" if name == "decay" else "experts_no_decay", found[name])
    return OptimizerInfo(kind_of(groups), groups=found)


def group_of(name: str, num_dims: int, model: GptModel, groups: Mapping[str, Any]) -> str:
    """Of a parameter of Megatron-Core's, which decays matrices, and neither biases nor norms. Empty where there is no
    such group."""
    is_decoupled = "decoupled" in groups and name.startswith(("embedding.word_embeddings.", "output_layer."))
    is_expert = model.has_experts and ".mlp.experts." in name
    is_decayed = num_dims - is_expert > 1 and not name.endswith(".bias")
    group = _name(is_decayed, is_decoupled, is_expert)
    return group if group in groups else ""


def _name(is_decayed: bool, is_decoupled: bool, is_expert: bool) -> str:
    """As model/build.py names this program's groups."""
    if is_expert:
        return "experts" if is_decayed else "experts_no_decay"
    if is_decoupled:
        return "decoupled" if is_decayed else "decoupled_no_decay"
    return "decay" if is_decayed else "no_decay"
