"""Learned absolute positions: a table, replicated on every tp rank.

x_bsh = PositionEmbedding(max_positions, hidden_size, context, normal(0.02))(x_bsh)
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron.layers.parameter import Initial, declare
from megatron.parallel.collectives import split_sequence
from megatron.parallel.context import ParallelContext
from megatron.ucp.layout import Layout


class PositionEmbedding(nn.Module):
    def __init__(self, num_positions: int, hidden_size: int, context: ParallelContext, initial: Initial) -> None:
        super().__init__()
        self.context = context
        layout = Layout.replicate((num_positions, hidden_size))
        self.weight = declare(layout, context, initial, is_decayed=True)

    def forward(self, x_bsh: Tensor) -> Tensor:
        """Add each position's row. Positions count from 0 in every sample, of which `x_bsh` is this rank's part."""
        context = self.context
        length = x_bsh.shape[1] * (context.tp_size if context.is_sequence_parallel else 1)
        rows_1sh = self.weight[None, context.sp_rank * length : (context.sp_rank + 1) * length]
        return x_bsh + split_sequence(rows_1sh, context)
