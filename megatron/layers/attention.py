"""Causal self-attention, its heads dealt to the tp ranks.

The one idea: multi-head attention is grouped-query attention in which every query head has a key/value head of its
own. The fused weight stacks q | k | v (as GPT-2's c_attn), each cut by itself, never inside a group of heads that
share a key.

    attention = Attention(model, context, streams)
    y_bsh = attention(x_bsh)

Where sp ranks share the sequence (Ulysses; Jacobs et al. 2023), everything but the core sees a chunk of it, and
DeepSpeed's DistributedAttention exchanges: from all heads of a chunk to some heads of the whole sequence, and back.
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
        # Not weight.shape: deepspeed.zero.Init leaves the weight empty.
        width = self.query_key_value.weight.atomic_layout.shard_shape(context.shard_rank)[0]
        num_shares = group // self.head_dim + 2
        kv_here = width // num_shares
        self.sizes_here = (width - 2 * kv_here, kv_here, kv_here)
        self.exchange = None
        if context.sp_size > 1:
            # Late: without sequence parallelism nobody waits for this import.
            from deepspeed.sequence.layer import DistributedAttention

            self.exchange = DistributedAttention(self._attend, context.sp_group, scatter_idx=2, gather_idx=1)

    def forward(self, x_bsh: Tensor) -> Tensor:
        """Collective over tp and sp."""
        qkv_bsp = self.query_key_value(x_bsh)
        b, s, _ = qkv_bsp.shape
        q_bsnd, k_bsnd, v_bsnd = (part.view(b, s, -1, self.head_dim) for part in qkv_bsp.split(self.sizes_here, dim=-1))
        if self.exchange is None:
            y_bsnd = self._attend(q_bsnd, k_bsnd, v_bsnd)
        else:
            y_bsnd = self.exchange(q_bsnd, k_bsnd, v_bsnd, batch_dim_idx=0)
        return self.dense(y_bsnd.reshape(b, s, -1))

    def _attend(self, q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor) -> Tensor:
        """Whole sequences, some of the heads."""
        if self.is_core_recomputed and self.training:
            return self.streams.checkpointed(self._core, q_bsnd, k_bsnd, v_bsnd)
        return self._core(q_bsnd, k_bsnd, v_bsnd)

    def _core(self, q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        is_grouped = q_bsnd.shape[2] != k_bsnd.shape[2]
        # Heads are cut over tp, so their dropout must differ between tp ranks.
        with self.streams.fork() if dropout else nullcontext():
            y_bnsd = F.scaled_dot_product_attention(
                *(part.transpose(1, 2) for part in (q_bsnd, k_bsnd, v_bsnd)),
                dropout_p=dropout, is_causal=True, enable_gqa=is_grouped,
            )  # fmt: skip
        return y_bnsd.transpose(1, 2)


def output_std(model: ModelConfig) -> float:
    """For the two matrices of a block that write to the residual stream (Megatron's scaled_init_method_normal):
    the stream's variance then does not grow with depth."""
    return model.init_method_std / math.sqrt(2 * model.num_layers)
