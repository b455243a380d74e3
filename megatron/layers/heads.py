"""Which query, key and value heads a tp rank computes, and the matrix that makes them.

The one idea: every element of the fused q | k | v weight is kept by one rank, whatever the numbers of heads.

* At least as many key/value heads as tp ranks: a rank has whole groups, a key/value head with the query heads that
  share it, as evenly as they go (3 key/value heads on 2 ranks: 2 and 1).
* Fewer: query heads are cut one by one, and the key/value heads that several ranks need are kept in parts, a part of
  the rows on each rank. They are put together at use; backward sums what all ranks found and gives each its part. So
  gradients, their norm, optimizer states and checkpoints know of no copies.

    heads = Heads.of(model, context)
    qkv_bsp = QueryKeyValueLinear(model, context, heads)(x_bsh)
    q_bsp, k_bsp, v_bsp = qkv_bsp.split(heads.sizes_here, dim=-1)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.config.model import ModelConfig
from megatron.layers.linear import ColumnLinear
from megatron.layers.parameter import normal
from megatron.parallel.collectives import enter_tp, even_sizes, gather_rows
from megatron.parallel.context import ParallelContext
from megatron.ucp.layout import Part


@dataclass(frozen=True)
class Heads:
    num_queries: int
    """Of the whole model."""
    head_dim: int
    query_unit: int
    """Features of q that are never parted: a group's queries, or one head's."""
    first_query: int
    """This rank's first query head."""
    num_queries_here: int
    keys_here: tuple[int, int]
    """The key/value heads that this rank computes: first, and one past the last."""
    has_shared_keys: bool
    """Fewer key/value heads than ranks: their rows are kept in parts."""
    key_of_query: tuple[int, ...] | None
    """For each query head here its key/value head, counted from the first one here; None where they come in equal
    groups, in order."""

    @classmethod
    def of(cls, model: ModelConfig, context: ParallelContext) -> Heads:
        num_queries, num_keys = model.num_attention_heads, model.num_key_value_heads
        group, tp_size, tp_rank = num_queries // num_keys, context.tp_size, context.tp_rank
        is_shared = num_keys < tp_size
        counts = even_sizes(num_queries, tp_size) if is_shared else [group * n for n in even_sizes(num_keys, tp_size)]
        first, count = sum(counts[:tp_rank]), counts[tp_rank]
        keys = [query // group for query in range(first, first + count)]
        first_key, num_keys_here = keys[0], keys[-1] + 1 - keys[0]
        in_order = [index // (count // num_keys_here) for index in range(count)] if count % num_keys_here == 0 else []
        of_query = [key - first_key for key in keys]
        return cls(
            num_queries,
            model.head_dim,
            query_unit=(1 if is_shared else group) * model.head_dim,
            first_query=first,
            num_queries_here=count,
            keys_here=(first_key, first_key + num_keys_here),
            has_shared_keys=is_shared,
            key_of_query=None if of_query == in_order else tuple(of_query),
        )

    @property
    def sizes_here(self) -> tuple[int, int, int]:
        """Features of q, k and v that this rank computes."""
        keys = (self.keys_here[1] - self.keys_here[0]) * self.head_dim
        return self.num_queries_here * self.head_dim, keys, keys


class QueryKeyValueLinear(ColumnLinear):
    """[b, s, h] -> [b, s, q | k | v of this rank's heads]."""

    def __init__(self, model: ModelConfig, context: ParallelContext, heads: Heads) -> None:
        self.heads = heads
        self.kv_size = model.num_key_value_heads * model.head_dim
        q_size = model.num_attention_heads * model.head_dim
        kv = Part(self.kv_size, unit=1 if heads.has_shared_keys else model.head_dim)
        super().__init__(
            model.hidden_size,
            q_size + 2 * self.kv_size,
            context,
            normal(model.init_method_std),
            has_bias=model.has_qkv_bias,
            parts=(Part(q_size, unit=heads.query_unit), kv, kv),
        )

    def forward(self, x_bsh: Tensor) -> Tensor:
        """Collective over tp."""
        if not self.heads.has_shared_keys:
            return super().forward(x_bsh)
        bias = None if self.bias is None else self._put_together(self.bias)
        return F.linear(enter_tp(x_bsh, self.context), self._put_together(self.weight), bias)

    def _put_together(self, rows: Tensor) -> Tensor:
        """This rank's q, and all of the key/value heads it needs. Collective over tp."""
        kept = even_sizes(self.kv_size, self.context.tp_size)
        own = kept[self.context.tp_rank]
        q, k, v = rows.split([rows.shape[0] - 2 * own, own, own])
        wanted = slice(*(head * self.heads.head_dim for head in self.heads.keys_here))
        # Both at once: side by side, as k and v have as many rows.
        both = gather_rows(torch.stack([k, v], dim=1), self.context, kept)
        return torch.cat([q, both[wanted, 0], both[wanted, 1]])
