"""Low-rank adapters beside the linear layers' matrices (LoRA): declared and computed.
megatron/ucp/naming/adapters.py says what they are.

    lora = Lora.of(model, "attention.dense")        # None where that matrix has none

Over tp one of the two parameters is cut as the matrix is and the other is on all ranks, each of which finds a part of
its gradient: backward sums it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.layers.parameter import ZEROS, declare, normal
from megatron.parallel.collectives import copy_to_tp
from megatron.parallel.context import ParallelContext
from megatron.ucp.layout import Layout, Part
from megatron.ucp.naming.adapters import chosen_parts, column_layouts, row_layouts


@dataclass(frozen=True)
class Lora:
    """Of one matrix."""

    rank: int
    scale: float
    chosen: tuple[bool, ...]
    """Which of its parts."""
    is_fused: bool

    @classmethod
    def of(cls, model: ModelConfig, module: str) -> Lora | None:
        """`module`: within a block."""
        chosen = chosen_parts(module, model.lora_projections, model.swiglu)
        if not any(chosen):
            return None
        return cls(model.lora_rank, model.lora_alpha / model.lora_rank, chosen, model.lora_fused)

    def declare_column(self, layer: nn.Module, in_size: int, parts: Sequence[Part], context: ParallelContext) -> None:
        a, b = column_layouts(self.rank, in_size, parts, self.chosen, self.is_fused)
        _declare(layer, a, b, in_size, context)

    def declare_row(self, layer: nn.Module, in_size: int, out_size: int, unit: int, context: ParallelContext) -> None:
        a, b = row_layouts(self.rank, in_size, out_size, unit)
        _declare(layer, a, b, in_size, context)

    def column(
        self, x_bsh: Tensor, a: Tensor, b_of_parts: Sequence[Tensor], sizes: Sequence[int], context: ParallelContext
    ) -> Tensor:
        """What the adapter adds to this rank's rows. `b_of_parts`: of the chosen parts, the rows that this rank
        computes; `sizes`: of all parts, their number."""
        z_bsr = F.linear(x_bsh, copy_to_tp(a, context))
        inputs = [z_bsr] * len(b_of_parts) if self.is_fused else z_bsr.split(self.rank, dim=-1)
        outputs = iter([F.linear(z, b) for z, b in zip(inputs, b_of_parts, strict=True)])
        parts = [
            next(outputs) if is_chosen else x_bsh.new_zeros(*x_bsh.shape[:-1], size)
            for is_chosen, size in zip(self.chosen, sizes, strict=True)
        ]
        return torch.cat(parts, dim=-1) * self.scale if len(parts) > 1 else parts[0] * self.scale

    def row(self, x_bsp: Tensor, a: Tensor, b: Tensor, context: ParallelContext) -> Tensor:
        """This rank's part of what the adapter adds: a sum over tp is due."""
        return F.linear(F.linear(x_bsp, a), copy_to_tp(b, context)) * self.scale


def _declare(layer: nn.Module, a: Layout, b: Layout, in_size: int, context: ParallelContext) -> None:
    """The variance of A is that of PEFT's (kaiming_uniform with a = sqrt 5: 1 / 3 in); B begins with zeros."""
    layer.lora_a = declare(a, context, normal(1 / math.sqrt(3 * in_size)), is_decayed=True)
    layer.lora_b = declare(b, context, ZEROS, is_decayed=True)


def rows_here(part: Part, context: ParallelContext) -> int:
    """Rows of a part that this tp rank keeps."""
    return Layout.shard_nc((part.size,), 0, (part,)).shard_shape(context.shard_rank)[0]
