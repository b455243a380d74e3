"""How large a model is and how much arithmetic it costs, from its configuration alone.

num_parameters(model)     # atomic: true vocabulary, tied weights once
flops_per_token(model)    # forward + backward, no recomputation
"""

from __future__ import annotations

from megatron.config.model import ModelConfig


def num_parameters(model: ModelConfig) -> int:
    """Elements of all atomic parameters."""
    h, ffn = model.hidden_size, model.ffn_hidden_size
    biases = (_qkv_width(model) + h + ffn + h) if model.add_bias_linear else 0
    block = _block_matrices(model) + biases + 4 * h
    words = model.vocab_size * h * (2 if model.untie_embeddings_and_output_weights else 1)
    return words + model.max_position_embeddings * h + model.num_layers * block + 2 * h


def flops_per_token(model: ModelConfig) -> float:
    """Multiply-adds count as two; backward costs twice forward. Attention counts all seq_length x seq_length
    products, masked ones too, as Megatron does (Narayanan et al. 2021, appendix)."""
    matrices = model.num_layers * _block_matrices(model) + model.vocab_size * model.hidden_size
    products = 2 * model.num_layers * model.seq_length * model.num_attention_heads * model.head_dim
    return 3 * 2.0 * (matrices + products)


def _qkv_width(model: ModelConfig) -> int:
    return (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim


def _block_matrices(model: ModelConfig) -> int:
    h = model.hidden_size
    attention = h * _qkv_width(model) + model.num_attention_heads * model.head_dim * h
    return attention + 2 * h * model.ffn_hidden_size
