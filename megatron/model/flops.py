"""How large a model is and how much arithmetic it costs, from its configuration alone.

num_parameters(model)     # atomic: true vocabulary, tied weights once, all experts
flops_per_token(model)    # forward + backward, no recomputation, the experts that a token is sent to
"""

from __future__ import annotations

from megatron.config.model import ModelConfig


def num_parameters(model: ModelConfig) -> int:
    """Elements of all atomic parameters."""
    h = model.hidden_size
    norm = h if model.normalization == "rmsnorm" else 2 * h
    attention = _attention_matrices(model)
    attention += _qkv_width(model) if model.has_qkv_bias else 0
    attention += h if model.has_attention_output_bias else 0
    attention += 2 * model.head_dim if model.qk_layernorm else 0
    total = model.vocab_size * h * (2 if model.untie_embeddings_and_output_weights else 1)
    total += model.vocab_size if model.add_output_layer_bias else 0
    total += model.max_position_embeddings * h if model.positions == "learned_absolute" else 0
    total += norm if model.embed_layernorm else 0
    total += model.num_layers * _adapters(model)
    total += sum(2 * norm + attention + _mlp(model, layer) for layer in range(model.num_layers))
    return total + norm


def flops_per_token(model: ModelConfig) -> float:
    """Multiply-adds count as two; backward costs twice forward, of matrices that are not trained (--lora-rank) as much.
    Adapters' own are left out. Attention counts all seq_length x seq_length
    products, masked ones too, as Megatron does (Narayanan et al. 2021, appendix)."""
    matrices = model.num_layers * _attention_matrices(model) + model.vocab_size * model.hidden_size
    for layer in range(model.num_layers):
        num_experts = model.num_experts_of(layer)
        if num_experts == 1:
            matrices += _mlp_matrices(model, model.ffn_hidden_size)
        else:
            matrices += num_experts * model.hidden_size  # the router
            matrices += model.topk * _mlp_matrices(model, model.moe_ffn_hidden_size)
            matrices += _mlp_matrices(model, model.moe_shared_expert_intermediate_size)
    products = 2 * model.num_layers * model.seq_length * model.num_attention_heads * model.head_dim
    return 2.0 * ((2 if model.lora_rank else 3) * matrices + 3 * products)


def _adapters(model: ModelConfig) -> int:
    """Of a block."""
    kv, ffn, h = model.num_key_value_heads * model.head_dim, model.ffn_hidden_size, model.hidden_size
    q = model.num_attention_heads * model.head_dim
    sizes = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h), "down_proj": (ffn, h)}
    sizes |= {"gate_proj": (h, ffn), "up_proj": (h, ffn)}
    chosen = model.lora_projections
    total = sum(sum(sizes[name]) for name in chosen)
    if model.lora_fused:  # one A of parts that read the same
        total -= 2 * h * ("q_proj" in chosen) + h * ("gate_proj" in chosen)
    return model.lora_rank * total


def _qkv_width(model: ModelConfig) -> int:
    return (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim


def _attention_matrices(model: ModelConfig) -> int:
    return model.hidden_size * (_qkv_width(model) + model.num_attention_heads * model.head_dim)


def _mlp_matrices(model: ModelConfig, width: int) -> int:
    return (3 if model.swiglu else 2) * model.hidden_size * width


def _mlp_of_width(model: ModelConfig, width: int) -> int:
    biases = (2 * width if model.swiglu else width) + model.hidden_size if model.add_bias_linear and width else 0
    return _mlp_matrices(model, width) + biases


def _mlp(model: ModelConfig, layer: int) -> int:
    num_experts = model.num_experts_of(layer)
    if num_experts == 1:
        return _mlp_of_width(model, model.ffn_hidden_size)
    experts = num_experts * _mlp_of_width(model, model.moe_ffn_hidden_size)
    return num_experts * model.hidden_size + experts + _mlp_of_width(model, model.moe_shared_expert_intermediate_size)
