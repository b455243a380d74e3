"""One transformer block: the same for the plain model and the pipelined one.

    x = x + dropout(attention(norm(x)));  x = x + dropout(mlp(norm(x)))
    x = x + dropout(attention(norm(x)) + mlp(norm'(x)))                     --use-parallel-residual (GPT-NeoX)

Between the matrices activations are [b, s, h], equal on all tp ranks, or each rank's part of the sequence under
sequence parallelism; norms, dropout and sums are the same code for both.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.kernels.kernels import TORCH, Kernels
from megatron.layers.attention import Attention
from megatron.layers.mlp import Mlp
from megatron.layers.moe import MoeMlp
from megatron.layers.norm import build_norm
from megatron.layers.router_ledger import RouterLedger
from megatron.parallel.context import ParallelContext
from megatron.parallel.rng import RandomStreams


class Block(nn.Module):
    def __init__(
        self,
        model: ModelConfig,
        context: ParallelContext,
        streams: RandomStreams,
        layer: int = 0,
        kernels: Kernels = TORCH,
        ledger: RouterLedger | None = None,
    ) -> None:
        """`layer` is its index in the whole model, which decides whether its MLP is experts."""
        super().__init__()
        self.dropout, self.streams = model.hidden_dropout, streams
        self.is_parallel = model.use_parallel_residual
        self.input_norm = build_norm(model, context, kernels)
        self.attention = Attention(model, context, streams, kernels)
        self.post_attention_norm = build_norm(model, context, kernels)
        if model.num_experts_of(layer) > 1:
            if ledger is None:
                raise TypeError(f"block {layer} has experts and no RouterLedger: their losses would be lost")
            self.mlp: nn.Module = MoeMlp(model, layer, context, ledger, kernels)
        else:
            self.mlp = Mlp(model, context, kernels)

    def forward(self, x_bsh: Tensor) -> Tensor:
        """Collective over tp and sp; over ep too with experts."""
        if self.is_parallel:
            y_bsh = self.attention(self.input_norm(x_bsh)) + self.mlp(self.post_attention_norm(x_bsh))
            return x_bsh + self._dropped(y_bsh)
        x_bsh = x_bsh + self._dropped(self.attention(self.input_norm(x_bsh)))
        return x_bsh + self._dropped(self.mlp(self.post_attention_norm(x_bsh)))

    def _dropped(self, x_bsh: Tensor) -> Tensor:
        return self.streams.residual_dropout(x_bsh, self.dropout if self.training else 0.0)
