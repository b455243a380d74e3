"""What other Megatrons call the parameters of a GPT or LLaMA. Both directions, see ucp/naming.

Sources: megatron-core 0.16.1 (models/gpt/gpt_model.py, transformer/transformer_layer.py, transformer/mlp.py,
transformer/moe/experts.py; the local and the Transformer Engine modules save the same names but for the norms, which
NORMS makes the same); Megatron-DeepSpeed's megatron/model (language_model.py, transformer.py, gpt_model.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from megatron.ucp.naming.names import BY_GROUP, BY_RANK, Names, theirs

_MLP = {"dense_h_to_4h": "linear_fc1", "dense_4h_to_h": "linear_fc2"}
CORE = Names(
    title="Megatron-Core's GPT",
    layers="decoder.layers.{}.",
    top={
        "embedding.word_embeddings": "embedding.word_embeddings",
        "embedding.position_embeddings": "embedding.position_embeddings",
        "final_norm": "decoder.final_layernorm",
    },
    block={
        "input_norm": theirs("input_layernorm"),
        "post_attention_norm": theirs("pre_mlp_layernorm"),
        "attention.query_key_value": theirs("self_attention.linear_qkv", form=BY_GROUP),
        "attention.dense": theirs("self_attention.linear_proj"),
        "attention.query_norm": theirs("self_attention.q_layernorm"),
        "attention.key_norm": theirs("self_attention.k_layernorm"),
        **{f"mlp.{ours}": theirs(f"mlp.{name}") for ours, name in _MLP.items()},
        **{f"mlp.shared_expert.{ours}": theirs(f"mlp.shared_experts.{name}") for ours, name in _MLP.items()},
    },
    lm_head="output_layer",
    whole_experts={
        "mlp.router": "mlp.router",
        "mlp.experts.dense_h_to_4h": "mlp.experts.experts.linear_fc1.weight",
        "mlp.experts.dense_4h_to_h": "mlp.experts.experts.linear_fc2.weight",
        "mlp.experts.bias_h_to_4h": "mlp.experts.experts.linear_fc1.bias",
        "mlp.experts.bias_4h_to_h": "mlp.experts.experts.linear_fc2.bias",
    },
    ignored=re.compile(r".*\._extra_state.*"),
)
NORMS: Mapping[str, str] = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Of a block, where a norm and the linear layer after it are one module -> where they are two."""

DEEPSPEED = Names(
    title="Megatron-DeepSpeed's GPT",
    layers="layers.{}.",
    top={
        "embedding.word_embeddings": "word_embeddings",
        "embedding.position_embeddings": "position_embeddings",
        "embedding.norm": "word_embeddings.norm",
        "final_norm": "final_layernorm",
    },
    block={
        "input_norm": theirs("input_layernorm"),
        "post_attention_norm": theirs("post_attention_layernorm"),
        "attention.query_key_value": theirs("self_attention.query_key_value", form=BY_GROUP),
        "attention.dense": theirs("self_attention.dense"),
        "mlp.dense_h_to_4h": theirs("mlp.dense_h_to_4h"),
        "mlp.dense_4h_to_h": theirs("mlp.dense_4h_to_h"),
    },
)
"""As `deepspeed_names` has them, with and without a pipeline."""
DEEPSPEED_COLUMN_PARALLEL = (r".*(query_key_value|dense_h_to_4h)\.(weight|bias)$", r".*(lm_head|output_layer)\.weight$")
"""What it cuts along dimension 0, for which its `universal_checkpoint_info` has no patterns."""


def deepspeed_table(tp_size: int, is_by_rank: bool) -> Names:
    """`is_by_rank`: saved by Megatron-DeepSpeed since its commit 676a482c (December 2024), which lays the rows of q, k
    and v out otherwise and says so nowhere; `args` have `ds_sequence_parallel_fpdt` since then."""
    if not is_by_rank:
        return DEEPSPEED
    qkv = replace(DEEPSPEED.block["attention.query_key_value"], form=BY_RANK, ranks=tp_size)
    return replace(DEEPSPEED, block={**DEEPSPEED.block, "attention.query_key_value": qkv})


_WHOLE = re.compile(
    r"(?:language_model\.)?(?:"
    r"embedding\.(?P<embedding>(?:word|position)_embeddings\..+)"
    r"|(?:encoder|transformer)\.(?P<inside>layers\.\d+\..+|final_layernorm\..+)"
    r"|output_layer\.(?P<head>.+))"
)
_PIPELINED = re.compile(
    r"(?:tied_modules\.embed|\d+)\.(?P<embedding>(?:word|position)_embeddings\..+)"
    r"|\d+\.(?P<norm>weight|bias)"
    r"|\d+\.lm_head\.(?P<head>.+)"
    r"|(?P<index>\d{1,9})\.(?P<inside>(?:input_layernorm|post_attention_layernorm|self_attention|mlp)\..+)"
)


def deepspeed_names(there: Collection[str]) -> dict[str, str]:
    """Of each that is known, the name that DEEPSPEED has. A pipeline numbers its layers, blocks among others: they are
    counted from the first one."""
    pipelined = {name: match for name in there if (match := _PIPELINED.fullmatch(name))}
    blocks = sorted({int(match["index"]) for match in pipelined.values() if match["index"]})
    numbers = {index: number for number, index in enumerate(blocks)}
    found = {}
    for name, match in pipelined.items():
        if match["index"]:
            found[name] = f"layers.{numbers[int(match['index'])]}.{match['inside']}"
        else:
            head = match["head"] and f"lm_head.{match['head']}"
            found[name] = match["embedding"] or head or f"final_layernorm.{match['norm']}"
    for name in there:
        if (whole := _WHOLE.fullmatch(name)) and name not in found:
            found[name] = whole["embedding"] or whole["inside"] or f"lm_head.{whole['head']}"
    return found
