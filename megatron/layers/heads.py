"""Which query, key and value heads a tp rank computes, and the matrix that makes them.

Every element of the fused q | k | v weight is kept by one rank, whatever the numbers of heads.

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
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron.config.model import ModelConfig
from megatron.layers.linear import ColumnLinear
from megatron.layers.lora import Lora
from megatron.layers.parameter import normal
from megatron.parallel.collectives import enter_tp, even_sizes, gather_rows, gathered_rows
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
            lora=Lora.of(model, "attention.query_key_value"),
        )

    def forward(self, x_bsh: Tensor) -> Tensor:
        """Collective over tp."""
        if not self.heads.has_shared_keys:
            return super().forward(x_bsh)
        x_bsh = enter_tp(x_bsh, self.context)
        y_bsp = _SharedKeysLinear.apply(x_bsh, self.weight, self.bias, self)
        return y_bsp if self.lora is None else y_bsp + self.adapted(x_bsh)

    def adapted(self, x_bsh: Tensor) -> Tensor:
        """What the adapter adds; of shared keys B's rows are put together as the matrix's are."""
        if not self.heads.has_shared_keys:
            return super().adapted(x_bsh)
        is_key = [part > 0 for part, is_chosen in enumerate(self.lora.chosen) if is_chosen]
        rows = [
            gather_rows(b, self.context, self.sizes_kept)[self.rows_needed] if shared else b
            for b, shared in zip(self.rows_of_b(), is_key, strict=True)
        ]
        return self.lora.column(x_bsh, self.lora_a, rows, self.heads.sizes_here, self.context)

    def put_together(self, rows: Tensor) -> Tensor:
        """From what is kept here, this rank's q and all of the key/value heads it needs. Collective over tp."""
        own = self.sizes_kept[self.context.tp_rank]
        q, k, v = rows.split([rows.shape[0] - 2 * own, own, own])
        # Both at once: side by side, as k and v have as many rows.
        whole = gathered_rows(torch.stack([k, v], dim=1), self.context, self.sizes_kept)
        return torch.cat([q, whole[self.rows_needed, 0], whole[self.rows_needed, 1]])

    def taken_apart(self, grad: Tensor) -> Tensor:
        """The reverse, for gradients: what all ranks found of a key/value head is summed. Collective over tp."""
        num_needed = self.rows_needed.stop - self.rows_needed.start
        q, k, v = grad.split([grad.shape[0] - 2 * num_needed, num_needed, num_needed])
        whole = grad.new_zeros(self.kv_size, 2, *grad.shape[1:])
        whole[self.rows_needed] = torch.stack([k, v], dim=1)
        dist.all_reduce(whole, group=self.context.tp_group)
        kept = whole.split(self.sizes_kept)[self.context.tp_rank]
        return torch.cat([q, kept[:, 0], kept[:, 1]])

    @property
    def sizes_kept(self) -> list[int]:
        """Rows of k, and of v, on each tp rank."""
        return even_sizes(self.kv_size, self.context.tp_size)

    @property
    def rows_needed(self) -> slice:
        """Of the whole k, and of the whole v."""
        return slice(*(head * self.heads.head_dim for head in self.heads.keys_here))


class _SharedKeysLinear(torch.autograd.Function):
    """The matrix is put together again for backward: kept, every layer's would live from forward to backward."""

    @staticmethod
    def forward(ctx: Any, x_bsh: Tensor, weight: Tensor, bias: Tensor | None, layer: QueryKeyValueLinear) -> Tensor:
        ctx.save_for_backward(x_bsh, weight)
        ctx.layer = layer
        return F.linear(x_bsh, layer.put_together(weight), None if bias is None else layer.put_together(bias))

    @staticmethod
    def backward(ctx: Any, grad_bsp: Tensor) -> tuple:
        x_bsh, weight = ctx.saved_tensors
        layer, grad_bias = ctx.layer, None
        grad_np = grad_bsp.flatten(0, 1)
        grad_weight = layer.taken_apart(grad_np.T @ x_bsh.flatten(0, 1))
        if layer.bias is not None:
            grad_bias = layer.taken_apart(grad_np.sum(0))
        return grad_bsp @ layer.put_together(weight), grad_weight, grad_bias, None
