"""Layer normalisation with its parameters, replicated on every tp rank.

y_bsh = LayerNorm(hidden_size, context, epsilon=1e-5)(x_bsh)
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron.kernels.kernels import TORCH, Kernels
from megatron.layers.parameter import ONES, ZEROS, declare
from megatron.parallel.collectives import replicated
from megatron.parallel.context import ParallelContext
from megatron.ucp.layout import Layout


class LayerNorm(nn.Module):
    def __init__(self, hidden_size: int, context: ParallelContext, epsilon: float, kernels: Kernels = TORCH) -> None:
        super().__init__()
        self.epsilon, self.context, self.kernels = epsilon, context, kernels
        layout = Layout.replicate((hidden_size,))
        self.weight = declare(layout, context, ONES, is_decayed=False)
        self.bias = declare(layout, context, ZEROS, is_decayed=False)

    def forward(self, x_bsh: Tensor) -> Tensor:
        weight, bias = replicated((self.weight, self.bias), self.context)
        return self.kernels.layer_norm(x_bsh, weight, bias, self.epsilon)
