"""Causal self-attention, its heads dealt to the tp ranks.

The one idea: multi-head attention is grouped-query attention in which every query head has a key/value head of its
own. The fused weight stacks q | k | v (as GPT-2's c_attn), each cut by itself, never inside a group of heads that
share a key.

    attention = Attention(model, context, streams)
    y_bsh = attention(x_bsh)
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.layers.linear import ColumnLinear, RowLinear
from megatron.layers.parameter import normal
from megatron.parallel.context import ParallelContext
from megatron.parallel.rng import RandomStreams
from megatron.ucp.layout import Part


class Attention(nn.Module):
    def __init__(self, model: ModelConfig, context: ParallelContext, streams: RandomStreams) -> None:
        super().__init__()
        self.streams = streams
        self.dropout = model.attention_dropout
        self.is_core_recomputed = model.recompute_granularity == "selective"
        self.head_dim = model.head_dim
        q_size = model.num_attention_heads * self.head_dim
        kv_size = model.num_key_value_heads * self.head_dim
        # The query heads of one key/value head stay on the rank that has it, however uneven the cut.
        group = model.num_attention_heads // model.num_key_value_heads * self.head_dim
        kv = Part(kv_size, unit=self.head_dim)
        self.query_key_value = ColumnLinear(
            model.hidden_size,
            q_size + 2 * kv_size,
            context,
            normal(model.init_method_std),
            has_bias=model.add_bias_linear,
            parts=(Part(q_size, unit=group), kv, kv),
        )
        self.dense = RowLinear(
            q_size,
            model.hidden_size,
            context,
            normal(output_std(model)),
            has_bias=model.add_bias_linear,
            unit=group,
        )
        width, num_shares = self.query_key_value.weight.shape[0], group // self.head_dim + 2
        kv_here = width // num_shares
        self.sizes_here = (width - 2 * kv_here, kv_here, kv_here)

    def forward(self, x_bsh: Tensor) -> Tensor:
        """Collective over tp."""
        b, s, _ = x_bsh.shape
        parts_bsp = self.query_key_value(x_bsh).split(self.sizes_here, dim=-1)
        q_bnsd, k_bnsd, v_bnsd = (part.view(b, s, -1, self.head_dim).transpose(1, 2) for part in parts_bsp)
        if self.is_core_recomputed and self.training:
            y_bnsd = self.streams.checkpointed(self._core, q_bnsd, k_bnsd, v_bnsd)
        else:
            y_bnsd = self._core(q_bnsd, k_bnsd, v_bnsd)
        return self.dense(y_bnsd.transpose(1, 2).reshape(b, s, -1))

    def _core(self, q_bnsd: Tensor, k_bnsd: Tensor, v_bnsd: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        is_grouped = q_bnsd.shape[1] != k_bnsd.shape[1]
        # Heads are cut over tp, so their dropout must differ between tp ranks.
        with self.streams.fork() if dropout else nullcontext():
            return F.scaled_dot_product_attention(
                q_bnsd, k_bnsd, v_bnsd, dropout_p=dropout, is_causal=True, enable_gqa=is_grouped
            )


def output_std(model: ModelConfig) -> float:
    """For the two matrices of a block that write to the residual stream (Megatron's scaled_init_method_normal):
    the stream's variance then does not grow with depth."""
    return model.init_method_std / math.sqrt(2 * model.num_layers)
