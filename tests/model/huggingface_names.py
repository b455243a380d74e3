"""Where a parameter of a transformers model lies in ours: its canonical name, which part of it, and in what form.

    place = canonical("llama", "model.layers.0.self_attn.k_proj.weight")
    place.name, place.part, place.form      # "layers.0.attention.query_key_value.weight", "k", "same"
    theirs = taken(atom, place, model)      # their tensor, out of our atomic one (real values, or a meta tensor)

Families are transformers' model_type. Experts are fused there as here since transformers 5: [E, gate | up, h].
"""

import re
from dataclasses import dataclass

PARTS = (("all",), ("k", "q", "v"), ("gate", "up"))
"""Sorted, what one of our parameters is together."""


@dataclass(frozen=True)
class Place:
    name: str
    """Ours."""
    part: str = "all"
    """Rows of ours: "q", "k" or "v" of a fused q | k | v, "gate" or "up" of a fused gate | up."""
    form: str = "same"
    """"transposed": theirs is [in, out] (GPT-2's Conv1D). "by head": their fused rows are q, k, v of the first head,
    then of the second, and so on."""


_ROTARY_TOP = {
    "model.embed_tokens": "embedding.word_embeddings", "model.norm": "final_norm", "lm_head": "lm_head",
}  # fmt: skip
_ROTARY_BLOCK = {
    "input_layernorm": "input_norm", "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_proj": ("attention.query_key_value", "q"), "self_attn.k_proj": ("attention.query_key_value", "k"),
    "self_attn.v_proj": ("attention.query_key_value", "v"), "self_attn.o_proj": "attention.dense",
}  # fmt: skip
_GATED_MLP = {
    "mlp.gate_proj": ("mlp.dense_h_to_4h", "gate"), "mlp.up_proj": ("mlp.dense_h_to_4h", "up"),
    "mlp.down_proj": "mlp.dense_4h_to_h",
}  # fmt: skip
_EXPERTS = {
    "mlp.experts.gate_up_proj": "mlp.experts.dense_h_to_4h", "mlp.experts.down_proj": "mlp.experts.dense_4h_to_h",
}  # fmt: skip
_FUSED_MLP = {name: name for name in ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")}
_NORMS = {"input_layernorm": "input_norm", "post_attention_layernorm": "post_attention_norm"}

TABLES = {
    "gpt2": (
        {"transformer.wte": "embedding.word_embeddings", "transformer.wpe": "embedding.position_embeddings",
         "transformer.ln_f": "final_norm", "lm_head": "lm_head"},
        {"ln_1": "input_norm", "ln_2": "post_attention_norm",
         "attn.c_attn": ("attention.query_key_value", "all", "transposed"),
         "attn.c_proj": ("attention.dense", "all", "transposed"),
         "mlp.c_fc": ("mlp.dense_h_to_4h", "all", "transposed"),
         "mlp.c_proj": ("mlp.dense_4h_to_h", "all", "transposed")},
    ),
    "llama": (_ROTARY_TOP, {**_ROTARY_BLOCK, **_GATED_MLP}),
    "qwen3": (
        _ROTARY_TOP,
        {**_ROTARY_BLOCK, **_GATED_MLP, "self_attn.q_norm": "attention.query_norm",
         "self_attn.k_norm": "attention.key_norm"},
    ),
    "mixtral": (_ROTARY_TOP, {**_ROTARY_BLOCK, **_EXPERTS, "mlp.gate": "mlp.router"}),
    "phimoe": (_ROTARY_TOP, {**_ROTARY_BLOCK, **_EXPERTS, "mlp.router": "mlp.router"}),
    "bloom": (
        {"transformer.word_embeddings": "embedding.word_embeddings",
         "transformer.word_embeddings_layernorm": "embedding.norm", "transformer.ln_f": "final_norm",
         "lm_head": "lm_head"},
        {**_NORMS, **_FUSED_MLP, "self_attention.dense": "attention.dense",
         "self_attention.query_key_value": ("attention.query_key_value", "all", "by head")},
    ),
    "gpt_neox": (
        {"gpt_neox.embed_in": "embedding.word_embeddings", "gpt_neox.final_layer_norm": "final_norm",
         "lm_head": "lm_head"},
        {**_NORMS, **_FUSED_MLP, "attention.dense": "attention.dense",
         "attention.query_key_value": ("attention.query_key_value", "all", "by head")},
    ),
}  # fmt: skip
"""Family -> (modules outside of blocks, modules of a block): theirs -> ours, or (ours, part, form)."""

_BLOCK_NAME = re.compile(r"(?:model|transformer|gpt_neox)\.(?:layers|h)\.(\d+)\.(.+)")


def canonical(family, name):
    """Raises KeyError with `name` if the table does not have it."""
    top, block = TABLES[family]
    match = _BLOCK_NAME.fullmatch(name)
    prefix, path = (f"layers.{match[1]}.", match[2]) if match else ("", name)
    module, dot, kind = path.rpartition(".")
    if kind not in ("weight", "bias"):
        module, dot, kind = path, "", ""
    table = block if match else top
    if module not in table:
        raise KeyError(name)
    found = table[module]
    ours, *rest = (found,) if isinstance(found, str) else found
    return Place(f"{prefix}{ours}{dot}{kind}", *rest)


def taken(atom, place, model):
    """Their tensor; a view of `atom` where that can be."""
    q_size, kv_size = (
        heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads)
    )  # fmt: skip
    start, size = {
        "all": (0, atom.shape[0]), "q": (0, q_size), "k": (q_size, kv_size), "v": (q_size + kv_size, kv_size),
        "gate": (0, model.ffn_hidden_size), "up": (model.ffn_hidden_size, model.ffn_hidden_size),
    }[place.part]  # fmt: skip
    rows = atom[start : start + size]
    if place.form == "transposed":
        return rows.T if rows.dim() == 2 else rows
    if place.form == "by head":
        # [q | k | v] of all heads -> [heads, q | k | v]
        return rows.unflatten(0, (3, -1, model.head_dim)).transpose(0, 1).flatten(0, 2)
    return rows
