"""One transformer block: the same for the plain model and the pipelined one.

    x = x + dropout(attention(norm(x)));  x = x + dropout(mlp(norm(x)))

Between the matrices activations are [b, s, h], equal on all tp ranks, or each rank's part of the sequence under
sequence parallelism; norms, dropout and sums are the same code for both.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.layers.attention import Attention
from megatron.layers.mlp import Mlp
from megatron.layers.norm import LayerNorm
from megatron.parallel.context import ParallelContext
from megatron.parallel.rng import RandomStreams


class Block(nn.Module):
    def __init__(self, model: ModelConfig, context: ParallelContext, streams: RandomStreams) -> None:
        super().__init__()
        self.dropout, self.streams = model.hidden_dropout, streams
        self.input_norm = LayerNorm(model.hidden_size, context, model.layernorm_epsilon)
        self.attention = Attention(model, context, streams)
        self.post_attention_norm = LayerNorm(model.hidden_size, context, model.layernorm_epsilon)
        self.mlp = Mlp(model, context)

    def forward(self, x_bsh: Tensor) -> Tensor:
        """Collective over tp."""
        x_bsh = x_bsh + self._dropped(self.attention(self.input_norm(x_bsh)))
        return x_bsh + self._dropped(self.mlp(self.post_attention_norm(x_bsh)))

    def _dropped(self, x_bsh: Tensor) -> Tensor:
        return self.streams.residual_dropout(x_bsh, self.dropout if self.training else 0.0)
