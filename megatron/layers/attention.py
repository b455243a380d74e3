"""Causal self-attention, its heads dealt to the tp ranks.

Multi-head attention is grouped-query attention in which every query head has a key/value head of its
own. The fused weight stacks q | k | v (as GPT-2's c_attn), each cut by itself, never inside a group of heads that
share a key (layers/heads.py).

    attention = Attention(model, context, streams, kernels)
    y_bsh = attention(x_bsh)

Where sp ranks share the sequence (Ulysses; Jacobs et al. 2023), everything but the core sees a chunk of it, and
DeepSpeed's DistributedAttention exchanges: from all heads of a chunk to some heads of the whole sequence, and back.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.kernels.kernels import TORCH, Kernels
from megatron.layers.alibi import alibi_slopes
from megatron.layers.heads import Heads, QueryKeyValueLinear
from megatron.layers.linear import RowLinear
from megatron.layers.lora import Lora
from megatron.layers.norm import HeadNorm
from megatron.layers.parameter import normal
from megatron.layers.rotary import Rotary, rotary_table
from megatron.parallel.context import ParallelContext
from megatron.parallel.rng import RandomStreams


class Attention(nn.Module):
    def __init__(
        self, model: ModelConfig, context: ParallelContext, streams: RandomStreams, kernels: Kernels = TORCH
    ) -> None:
        super().__init__()
        self.context, self.streams, self.kernels = context, streams, kernels
        self.dropout = model.attention_dropout
        self.is_core_recomputed = model.recompute_granularity == "selective"
        self.head_dim = model.head_dim
        self.heads = Heads.of(model, context)
        key_of_query = self.heads.key_of_query
        self.register_buffer(
            "key_of_query", None if key_of_query is None else torch.tensor(key_of_query), persistent=False
        )
        self.query_key_value = QueryKeyValueLinear(model, context, self.heads)
        self.dense = RowLinear(
            model.num_attention_heads * self.head_dim,
            model.hidden_size,
            context,
            normal(output_std(model)),
            has_bias=model.has_attention_output_bias,
            unit=self.heads.query_unit,
            lora=Lora.of(model, "attention.dense"),
        )
        self.query_norm = self.key_norm = None
        if model.qk_layernorm:
            self.query_norm = HeadNorm(self.head_dim, context, model.layernorm_epsilon, kernels)
            self.key_norm = HeadNorm(self.head_dim, context, model.layernorm_epsilon, kernels)
        self.rotary = Rotary.of(model) if model.positions == "rope" else None
        self.has_alibi = model.positions == "alibi"
        self.exchange = None
        if context.sp_size > 1:
            # Late: without sequence parallelism nobody waits for this import.
            from deepspeed.sequence.layer import DistributedAttention

            self.exchange = DistributedAttention(self._attend, context.sp_group, scatter_idx=2, gather_idx=1)

    def forward(self, x_bsh: Tensor) -> Tensor:
        """Collective over tp and sp."""
        qkv_bsp = self.query_key_value(x_bsh)
        b, s, _ = qkv_bsp.shape
        q_bsnd, k_bsnd, v_bsnd = (
            part.view(b, s, -1, self.head_dim) for part in qkv_bsp.split(self.heads.sizes_here, dim=-1)
        )
        if self.query_norm is not None:
            q_bsnd, k_bsnd = self.query_norm(q_bsnd), self.key_norm(k_bsnd)
        if self.rotary is not None:
            context = self.context
            table = rotary_table(self.rotary, context.sp_rank * s, s, s * context.sp_size, x_bsh.device)
            q_bsnd, k_bsnd = (self.kernels.rope(part, *table) for part in (q_bsnd, k_bsnd))
        if self.key_of_query is not None:
            k_bsnd, v_bsnd = (part.index_select(2, self.key_of_query) for part in (k_bsnd, v_bsnd))
        if self.exchange is None:
            y_bsnd = self._attend(q_bsnd, k_bsnd, v_bsnd)
        else:
            y_bsnd = self.exchange(q_bsnd, k_bsnd, v_bsnd, batch_dim_idx=0)
        return self.dense(y_bsnd.reshape(b, s, -1))

    def _attend(self, q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor) -> Tensor:
        """Whole sequences, some of the heads."""
        core = self._alibi_core if self.has_alibi else self._core
        if self.is_core_recomputed and self.training:
            return self.streams.checkpointed(core, q_bsnd, k_bsnd, v_bsnd)
        return core(q_bsnd, k_bsnd, v_bsnd)

    def _core(self, q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        is_grouped = q_bsnd.shape[2] != k_bsnd.shape[2]
        # Heads are cut over tp, so their dropout must differ between tp ranks.
        with self.streams.fork() if dropout else nullcontext():
            y_bnsd = F.scaled_dot_product_attention(
                *(part.transpose(1, 2) for part in (q_bsnd, k_bsnd, v_bsnd)),
                dropout_p=dropout,
                is_causal=True,
                enable_gqa=is_grouped,
            )
        return y_bnsd.transpose(1, 2)

    def _alibi_core(self, q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor) -> Tensor:
        """torch's fused attention takes such a bias only as a whole [s, s] mask of each head."""
        q_bnsd, k_bnsd, v_bnsd = (part.transpose(1, 2) for part in (q_bsnd, k_bsnd, v_bsnd))
        num_heads = q_bnsd.shape[1]
        group = num_heads // k_bnsd.shape[1]
        if group > 1:
            k_bnsd, v_bnsd = (part.repeat_interleave(group, dim=1) for part in (k_bnsd, v_bnsd))
        first = self.heads.first_query + self.context.sp_rank * num_heads
        slopes_n = alibi_slopes(self.heads.num_queries, q_bsnd.device)[first : first + num_heads]
        scores_bnqk = q_bnsd @ k_bnsd.transpose(2, 3)
        weights_bnqk = self.kernels.causal_softmax(scores_bnqk, 1 / math.sqrt(self.head_dim), slopes_n)
        if self.dropout and self.training:
            with self.streams.fork():
                weights_bnqk = F.dropout(weights_bnqk, self.dropout)
        return torch.matmul(weights_bnqk, v_bnsd).transpose(1, 2)


def output_std(model: ModelConfig) -> float:
    """For the two matrices of a block that write to the residual stream (Megatron's scaled_init_method_normal):
    the stream's variance then does not grow with depth."""
    return model.init_method_std / math.sqrt(2 * model.num_layers)
