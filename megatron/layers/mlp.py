"""The block's feed-forward part: up, GELU, down.

GELU is the tanh approximation, as GPT-2's and Megatron's fused bias-gelu.

    y_bsh = Mlp(model, context)(x_bsh)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.layers.attention import output_std
from megatron.layers.linear import ColumnLinear, RowLinear
from megatron.layers.parameter import normal
from megatron.parallel.context import ParallelContext


class Mlp(nn.Module):
    def __init__(self, model: ModelConfig, context: ParallelContext) -> None:
        super().__init__()
        hidden, ffn, has_bias = model.hidden_size, model.ffn_hidden_size, model.add_bias_linear
        self.dense_h_to_4h = ColumnLinear(hidden, ffn, context, normal(model.init_method_std), has_bias)
        self.dense_4h_to_h = RowLinear(ffn, hidden, context, normal(output_std(model)), has_bias)

    def forward(self, x_bsh: Tensor) -> Tensor:
        """Collective over tp."""
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x_bsh), approximate="tanh"))
