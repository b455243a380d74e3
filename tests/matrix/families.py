"""The matrix of the other architectures: tiny models, and which topologies of each are a Source for which.

MODELS["moe"]                       # flags
PAIRS[source, target]               # the family it is there for; names of cells begin with the model's
"""

from __future__ import annotations

from itertools import product

from matrix.cells import Cell, cell, cells

_LLAMA = {
    "num_layers": 4,
    "hidden_size": 24,
    "seq_length": 16,
    "global_batch_size": 8,
    "normalization": "rmsnorm",
    "swiglu": True,
    "ffn_hidden_size": 40,
    "use_rotary_position_embeddings": True,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
}
_BLOOM = {
    "num_layers": 4,
    "hidden_size": 24,
    "num_attention_heads": 12,
    "seq_length": 16,
    "global_batch_size": 8,
    "position_embedding_type": "alibi",
    "embed_layernorm": True,
}
_EXPERTS = {"num_experts": 4, "expert_interval": 2, "moe_loss_coeff": 0.05, "moe_z_loss_coeff": 0.01}

MODELS: dict[str, dict[str, object]] = {
    # 1, 2, 3 and 8 key/value heads divide 24; the 40 features of the MLP are uneven on 3 ranks.
    **{
        f"kv{kv}": {**_LLAMA, "num_attention_heads": 24, "kv_channels": 4, "num_key_value_heads": kv}
        for kv in (1, 2, 3, 8)
    },
    "llama": {**_LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen": {**_LLAMA, "num_attention_heads": 9, "kv_channels": 4, "num_key_value_heads": 3, "qk_layernorm": True},
    "bloom": _BLOOM,
    "neox": {
        **_BLOOM, "num_attention_heads": 6, "position_embedding_type": "rope", "rotary_percent": 0.5,
        "use_parallel_residual": True,
    },
    "moe": {
        **_LLAMA, **_EXPERTS, "num_attention_heads": 4, "num_key_value_heads": 2, "topk": 2,
        "moe_ffn_hidden_size": 20, "moe_shared_expert_intermediate_size": 12,
    },
    # As upstream's: biases, one expert a token, every other block; the first of two stages has none.
    "gptmoe": {
        "num_layers": 4, "hidden_size": 24, "num_attention_heads": 4, "seq_length": 16, "global_batch_size": 8,
        "num_experts": 4, "expert_interval": 4, "topk": 1, "moe_loss_coeff": 0.05,
    },
}  # fmt: skip

MOE = tuple(
    Cell(tp, pp, max(ep, 2 if tp == pp == 1 else 1) * (2 if ep == 2 and tp == pp == 1 else 1), zero, ep=ep, model="moe")
    for ep, tp, pp, zero in product((1, 2, 4), (1, 2), (1, 2), (0, 1, 2, 3))
    if pp == 1 or zero < 2
)
"""All of ep {1, 2, 4}, tp {1, 2}, pp {1, 2} and the ZeRO stages that a pipeline takes. On one stage and one tp rank dp
is 2, 4 and 4, so that experts have two, two and one data-parallel rank of their own."""
_STRIDES = (0, 1, 5, 13, 22, 29)

SQUARES = {
    **{
        f"{kv} key/value heads on 1 to 4 tp ranks": cells(
            f"kv{kv}-tp1pp1dp1-plain-z0 kv{kv}-tp2pp1dp1-z1 kv{kv}-tp3pp1dp1-z3 kv{kv}-tp4pp1dp1-z2"
        )
        for kv in (1, 2, 3, 8)
    },
    "9 query heads, 3 key/value heads": cells(
        "qwen-tp1pp1dp1-z0 qwen-tp2pp1dp1-cut-z1 qwen-tp2pp1dp1-z3 qwen-tp1pp2dp1-z1"
    ),
    "GPT-NeoX": cells("neox-tp1pp1dp1-z0 neox-tp2pp1dp1-cut-z3 neox-tp1pp2dp1-z1"),
    "BLOOM": cells("bloom-tp1pp1dp1-z0 bloom-tp2pp1dp1-cut-z3 bloom-tp1pp1dp1sp2-z2 bloom-tp3pp1dp1-z1"),
    "experts with biases, a stage without any": cells(
        "gptmoe-tp1pp1dp1-z0 gptmoe-tp2pp2dp1-z1 gptmoe-tp1pp2dp2ep2-z0 gptmoe-tp2pp1dp2ep2-z3 "
        "gptmoe-tp1pp1dp2sp2ep4-z2 gptmoe-tp2pp1dp2ep2-cut-z1"
    ),
}
"""Families of which every member is a Source for every other."""

FIG_9 = (
    (cell("llama-tp2pp2dp2-z1"), cell("llama-tp2pp1dp2-z1")),
    (cell("llama-tp2pp2dp2-z1"), cell("llama-tp2pp2dp1-z1")),
    (cell("bloom-tp2pp2dp2-z1"), cell("bloom-tp2pp2dp1-z1")),
    (cell("moe-tp1pp2dp4ep4-z1"), cell("moe-tp2pp2dp2ep2-z1")),
)
"""Of Lian et al. 2025, figure 9, pp 24 and dp 8 scaled down."""
FIG_8_EXPERTS = (cell("moe-tp1pp1dp4ep4-z1"), cell("moe-tp2pp1dp2ep2-z1"))
"""Figure 8's fourth pair, with figure 9's change of its degrees: the paper does not give its own."""

PAIRS: dict[tuple[Cell, Cell], str] = {
    **{(a, b): family for family, members in SQUARES.items() for a in members for b in members},
    **{(MOE[(i + step) % len(MOE)], target): "experts" for i, target in enumerate(MOE) for step in _STRIDES},
    **dict.fromkeys(FIG_9, "figure 9"),
    FIG_8_EXPERTS: "figure 8",
}
SOURCES = tuple(dict.fromkeys(source for source, _ in PAIRS))
TARGETS = tuple(dict.fromkeys(target for _, target in PAIRS))


def sources_of(target: Cell) -> tuple[Cell, ...]:
    return tuple(source for source, other in PAIRS if other == target)
