"""One table for an architecture of Hugging Face's: its parameters' names and forms, and the keys of its config.json.

    family = FAMILIES["llama"]
    family.block["attention.query_key_value"].modules        # ("self_attn.q_proj", "self_attn.k_proj", ...)

Names are those of the files on the hub, which transformers writes too. Sources: transformers 5.23,
models/*/modeling_*.py and configuration_*.py (defaults of keys that a config.json may leave out), conversion_mapping.py
(experts).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.ucp.naming.names import BY_GROUP, TRANSPOSED, Names
from megatron.ucp.naming.names import theirs as _is


@dataclass(frozen=True, kw_only=True)
class Family(Names):
    """`title` is config.json's model_type."""

    architecture: str
    keys: Mapping[str, str]
    """GptModel's field -> key of config.json."""
    defaults: Mapping[str, Any]
    """Of keys that a config.json may leave out."""
    fixed: Mapping[str, Any]
    """GptModel's fields of every model of this family."""
    biases: str = "none"
    """Of linear layers: "none", "all", "qkv", or "flags": as `bias_flags` say."""
    bias_flags: tuple[str, ...] = ()
    """Keys of config.json: of attention's biases and, where there is a second one, of the MLP's."""
    gelu: str = ""
    """Key of config.json that says which GELU it is, where the family has both."""
    expected: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys of config.json, and the values with which the model computes what ours computes. The first is written."""
    has_mscales: bool = False
    """Rotary positions that are stretched say two factors of cos and sin: up to the original length, and beyond it."""
    differs: str = ""
    """What the published model has and this one has not."""

    @property
    def model_type(self) -> str:
        return self.title

    @property
    def has_experts(self) -> bool:
        return "mlp.router" in self.block

    @property
    def cuts_heads(self) -> bool:
        """Whether a head may be of another size than hidden / heads."""
        return "kv_channels" in self.keys


_ROTARY_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "layernorm_epsilon": "rms_norm_eps",
}
_ROTARY_TOP = {"embedding.word_embeddings": "embed_tokens", "final_norm": "norm"}
_ATTENTION = {
    "input_norm": _is("input_layernorm"),
    "post_attention_norm": _is("post_attention_layernorm"),
    "attention.query_key_value": _is("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": _is("self_attn.o_proj"),
}
_HEAD_NORMS = {"attention.query_norm": _is("self_attn.q_norm"), "attention.key_norm": _is("self_attn.k_norm")}
_GATED_MLP = {"mlp.dense_h_to_4h": _is("mlp.gate_proj", "mlp.up_proj"), "mlp.dense_4h_to_h": _is("mlp.down_proj")}
_SPARSE_MOE = {
    "mlp.router": _is("block_sparse_moe.gate"),
    "mlp.experts.dense_h_to_4h": _is("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
    "mlp.experts.dense_4h_to_h": _is("block_sparse_moe.experts.{}.w2"),
}
_WHOLE_EXPERTS = {
    "mlp.router": "mlp.gate",
    "mlp.experts.dense_h_to_4h": "mlp.experts.gate_up_proj",
    "mlp.experts.dense_4h_to_h": "mlp.experts.down_proj",
}
_LLAMA_FIXED = {
    "normalization": "rmsnorm",
    "swiglu": True,
    "positions": "rope",
    "embed_layernorm": False,
    "qk_layernorm": False,
    "use_parallel_residual": False,
    "add_output_layer_bias": False,
}
_LLAMA_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
}
_SILU = {"hidden_act": ("silu", "swish")}


def _llama_like(model_type: str, architecture: str, without: tuple[str, ...] = (), **changes: Any) -> Family:
    """The dicts among `changes` are added to LLaMA's, of which `without` names what is left out."""
    values: dict[str, Any] = {
        "prefix": "model.",
        "layers": "layers.{}.",
        "top": _ROTARY_TOP,
        "block": {**_ATTENTION, **_GATED_MLP},
        "keys": _ROTARY_KEYS,
        "defaults": _LLAMA_DEFAULTS,
        "fixed": _LLAMA_FIXED,
        "expected": _SILU,
    }
    for key in ("keys", "fixed"):
        values[key] = {field: value for field, value in values[key].items() if field not in without}
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return Family(title=model_type, architecture=architecture, **values)


_QWEN_WINDOW = {"use_sliding_window": (False,)}
_LAYER_NORMS = {"input_norm": _is("input_layernorm"), "post_attention_norm": _is("post_attention_layernorm")}
_FUSED_MLP = {name: _is(name) for name in ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")}
_GPT_FIXED = {
    "normalization": "layernorm",
    "swiglu": False,
    "embed_layernorm": False,
    "qk_layernorm": False,
    "use_parallel_residual": False,
    "add_output_layer_bias": False,
}
_MASKS = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|attention\.bias|attention\.masked_bias)")

_ALL = (
    Family(
        title="gpt2",
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        layers="h.{}.",
        top={"embedding.word_embeddings": "wte", "embedding.position_embeddings": "wpe", "final_norm": "ln_f"},
        block={
            "input_norm": _is("ln_1"),
            "post_attention_norm": _is("ln_2"),
            "attention.query_key_value": _is("attn.c_attn", form=TRANSPOSED),
            "attention.dense": _is("attn.c_proj", form=TRANSPOSED),
            "mlp.dense_h_to_4h": _is("mlp.c_fc", form=TRANSPOSED),
            "mlp.dense_4h_to_h": _is("mlp.c_proj", form=TRANSPOSED),
        },
        keys={
            "num_layers": "n_layer",
            "hidden_size": "n_embd",
            "num_attention_heads": "n_head",
            "ffn_hidden_size": "n_inner",
            "vocab_size": "vocab_size",
            "max_position_embeddings": "n_positions",
            "layernorm_epsilon": "layer_norm_epsilon",
        },
        defaults={
            "n_inner": None,
            "n_positions": 1024,
            "resid_pdrop": 0.1,
            "attn_pdrop": 0.1,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        fixed={**_GPT_FIXED, "positions": "learned_absolute"},
        biases="all",
        gelu="activation_function",
        expected={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        ignored=_MASKS,
    ),
    Family(
        title="bloom",
        architecture="BloomForCausalLM",
        prefix="transformer.",
        layers="h.{}.",
        top={
            "embedding.word_embeddings": "word_embeddings",
            "embedding.norm": "word_embeddings_layernorm",
            "final_norm": "ln_f",
        },
        block={
            **_LAYER_NORMS,
            **_FUSED_MLP,
            "attention.query_key_value": _is("self_attention.query_key_value", form=BY_GROUP),
            "attention.dense": _is("self_attention.dense"),
        },
        keys={
            "num_layers": "n_layer",
            "hidden_size": "hidden_size",
            "num_attention_heads": "n_head",
            "vocab_size": "vocab_size",
            "layernorm_epsilon": "layer_norm_epsilon",
        },
        defaults={
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "apply_residual_connection_post_layernorm": False,
        },
        fixed={**_GPT_FIXED, "embed_layernorm": True, "positions": "alibi"},
        biases="all",
        expected={"apply_residual_connection_post_layernorm": (False,)},
        ignored=_MASKS,
    ),
    Family(
        title="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        prefix="gpt_neox.",
        layers="layers.{}.",
        top={"embedding.word_embeddings": "embed_in", "final_norm": "final_layer_norm"},
        lm_head="embed_out",
        block={
            **_LAYER_NORMS,
            **_FUSED_MLP,
            "attention.query_key_value": _is("attention.query_key_value", form=BY_GROUP),
            "attention.dense": _is("attention.dense"),
        },
        keys={
            "num_layers": "num_hidden_layers",
            "hidden_size": "hidden_size",
            "num_attention_heads": "num_attention_heads",
            "ffn_hidden_size": "intermediate_size",
            "vocab_size": "vocab_size",
            "layernorm_epsilon": "layer_norm_eps",
            "use_parallel_residual": "use_parallel_residual",
        },
        defaults={
            "layer_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "hidden_act": "gelu",
            "use_parallel_residual": True,
            "attention_bias": True,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "max_position_embeddings": 2048,
        },
        fixed={**{k: v for k, v in _GPT_FIXED.items() if k != "use_parallel_residual"}, "positions": "rope"},
        biases="all",
        gelu="hidden_act",
        expected={"attention_bias": (True,)},
        ignored=_MASKS,
    ),
    _llama_like("llama", "LlamaForCausalLM", biases="flags", bias_flags=("attention_bias", "mlp_bias")),
    _llama_like(
        "mistral",
        "MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    _llama_like(
        "qwen2",
        "Qwen2ForCausalLM",
        biases="qkv",
        defaults={"use_sliding_window": False, "num_key_value_heads": 32, "max_position_embeddings": 32768},
        expected=_QWEN_WINDOW,
    ),
    _llama_like(
        "qwen3",
        "Qwen3ForCausalLM",
        biases="flags",
        bias_flags=("attention_bias",),
        block=_HEAD_NORMS,
        defaults={
            "head_dim": 128,
            "use_sliding_window": False,
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
        },
        fixed={"qk_layernorm": True},
        expected=_QWEN_WINDOW,
    ),
    _llama_like(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        biases="flags",
        bias_flags=("attention_bias",),
        block={
            **_HEAD_NORMS,
            "mlp.router": _is("mlp.gate"),
            "mlp.experts.dense_h_to_4h": _is("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
            "mlp.experts.dense_4h_to_h": _is("mlp.experts.{}.down_proj"),
        },
        keys={
            "topk": "num_experts_per_tok",
            "moe_ffn_hidden_size": "moe_intermediate_size",
            "moe_normalize_topk": "norm_topk_prob",
        },
        defaults={
            "num_key_value_heads": 4,
            "use_sliding_window": False,
            "max_position_embeddings": 32768,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "num_experts": 128,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        fixed={"qk_layernorm": True, "moe_router_score_function": "softmax", "moe_shared_expert_intermediate_size": 0},
        expected=_QWEN_WINDOW,
        whole_experts=_WHOLE_EXPERTS,
    ),
    _llama_like(
        "mixtral",
        "MixtralForCausalLM",
        block=_SPARSE_MOE,
        keys={"topk": "num_experts_per_tok"},
        defaults={
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "sliding_window": None,
        },
        fixed={
            "moe_router_score_function": "softmax",
            "moe_normalize_topk": True,
            "moe_shared_expert_intermediate_size": 0,
        },
        whole_experts=_WHOLE_EXPERTS,
    ),
    _llama_like(
        "phimoe",
        "PhimoeForCausalLM",
        biases="flags",
        bias_flags=("attention_bias",),
        block=_SPARSE_MOE,
        keys={"add_output_layer_bias": "lm_head_bias", "moe_sparsemixer_eps": "router_jitter_noise"},
        without=("kv_channels", "add_output_layer_bias"),
        defaults={
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
            "num_experts_per_tok": 2,
            "num_local_experts": 16,
            "lm_head_bias": False,
            "router_jitter_noise": 0.01,
            "sliding_window": None,
        },
        expected={**_SILU, "num_experts_per_tok": (2,)},
        fixed={
            "normalization": "layernorm",
            "topk": 2,
            "moe_router_score_function": "sparsemixer",
            "moe_normalize_topk": True,
            "moe_shared_expert_intermediate_size": 0,
        },
        whole_experts={**_WHOLE_EXPERTS, "mlp.router": "mlp.router"},
        has_mscales=True,
    ),
)
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ALL}
"""By config.json's model_type."""
