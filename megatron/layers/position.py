"""Learned absolute positions: a table, replicated on every tp rank.

x_bsh = PositionEmbedding(max_positions, hidden_size, context, normal(0.02))(x_bsh)
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron.layers.parameter import Initial, declare
from megatron.parallel.context import ParallelContext
from megatron.ucp.layout import Layout


class PositionEmbedding(nn.Module):
    def __init__(self, num_positions: int, hidden_size: int, context: ParallelContext, initial: Initial) -> None:
        super().__init__()
        layout = Layout.replicate((num_positions, hidden_size))
        self.weight = declare(layout, context, initial, is_decayed=True)

    def forward(self, x_bsh: Tensor) -> Tensor:
        """Add each position's row. Positions count from 0 in every sample."""
        return x_bsh + self.weight[: x_bsh.shape[1]]
