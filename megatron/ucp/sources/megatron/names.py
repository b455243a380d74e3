"""What other Megatrons call the parameters of a GPT or LLaMA. Both directions, see ucp/naming.

Sources: megatron-core 0.16.1 (models/gpt/gpt_model.py, transformer/transformer_layer.py, transformer/mlp.py,
transformer/moe/experts.py; the local and the Transformer Engine modules save the same names but for the norms, which
NORMS makes the same); Megatron-DeepSpeed's megatron/model (language_model.py, transformer.py, gpt_model.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from megatron.ucp.naming.names import BY_GROUP, Names, theirs

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
