"""Low-rank adapters (LoRA; Hu et al. 2021): which matrices have one, and the layouts of its two parameters.

A linear layer y = W x with an adapter is y = W x + alpha / rank * B A x, and W is not trained. `lora_a` is A,
[rank, in]; `lora_b` is B, [out, rank]. A matrix that holds several (q|k|v, gate|up) has an A for each, one under the
other, and B has their rows; or, fused, one A for all, as PEFT has it where the model's own matrix is fused (GPT-2,
BLOOM, GPT-NeoX).

    chosen_parts("attention.query_key_value", ("q_proj", "v_proj"))       # (True, False, True)
    a, b = column_layouts(8, in_size, parts, (True, False, True), is_fused=False)
    a, b = row_layouts(8, in_size, out_size, unit=head)
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.ucp.layout import Layout, Part

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""As LLaMA's modules are called; `gate_proj` of SwiGLU only."""
OF_ATTENTION = PROJECTIONS[:4]
PEFT = "base_model.model."
"""Before the names of a model that PEFT has put adapters into."""
KINDS = ("lora_a", "lora_b")
PARTS = {
    "attention.query_key_value": PROJECTIONS[:3],
    "attention.dense": ("o_proj",),
    "mlp.dense_h_to_4h": ("gate_proj", "up_proj"),
    "mlp.dense_4h_to_h": ("down_proj",),
}
"""Of the matrices that can have adapters, within a block."""


def is_adapter(name: str) -> bool:
    """Of a canonical name."""
    return name.rpartition(".")[2] in KINDS


def default_projections(is_gated: bool, has_experts: bool) -> tuple[str, ...]:
    """All that a model has. Experts' matrices have no adapters."""
    known = OF_ATTENTION if has_experts else PROJECTIONS
    return tuple(name for name in known if is_gated or name != "gate_proj")


def projection_faults(projections: Sequence[str], *, is_gated: bool, has_experts: bool, is_fused: bool) -> list[str]:
    """Why a model cannot have adapters of these; empty where it can."""
    possible = default_projections(is_gated, has_experts)
    found = [
        f"{name} is no matrix of this model that can have an adapter" for name in projections if name not in possible
    ]
    if is_fused:
        for together in PARTS.values():
            there = [name for name in together if name in possible]
            chosen = [name for name in there if name in projections]
            if chosen and chosen != there:
                found.append(f"fused, {' and '.join(there)} have one adapter: all of them or none")
    return found


def parts_of(module: str, is_gated: bool) -> tuple[str, ...]:
    """What a matrix (`module`: within a block) holds, from its first rows on; nothing if it can have no adapter."""
    return tuple(name for name in PARTS.get(module, ()) if is_gated or name != "gate_proj")


def chosen_parts(module: str, projections: Sequence[str], is_gated: bool = True) -> tuple[bool, ...]:
    """For each of these whether it has an adapter."""
    return tuple(name in projections for name in parts_of(module, is_gated))


def column_layouts(
    rank: int, in_size: int, parts: Sequence[Part], chosen: Sequence[bool], is_fused: bool
) -> tuple[Layout, Layout]:
    """Of a matrix whose rows are cut, `parts` one by one."""
    adapted = [part for part, is_chosen in zip(parts, chosen, strict=True) if is_chosen]
    count = 1 if is_fused else len(adapted)
    rows = sum(part.size for part in adapted)
    return Layout.replicate((count * rank, in_size)), Layout.shard_nc((rows, rank), 0, adapted)


def row_layouts(rank: int, in_size: int, out_size: int, unit: int = 1) -> tuple[Layout, Layout]:
    """Of a matrix whose columns are cut."""
    return Layout.shard_h((rank, in_size), unit), Layout.replicate((out_size, rank))
