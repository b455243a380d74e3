"""What happens to the word embedding before the first block: positions, normalisation, dropout; each if there is one.

In a pipeline the word embedding is an entry by itself, as its weight may be shared with the last one. So
the rest of the embedding is one module for the plain model and the pipelined one.

    x_bsh = EmbeddingTail(model, context, streams, kernels)(words_bsh)
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.kernels.kernels import TORCH, Kernels
from megatron.layers.norm import build_norm
from megatron.layers.parameter import normal
from megatron.layers.position import PositionEmbedding
from megatron.parallel.context import ParallelContext
from megatron.parallel.rng import RandomStreams


class EmbeddingTail(nn.Module):
    def __init__(
        self, model: ModelConfig, context: ParallelContext, streams: RandomStreams, kernels: Kernels = TORCH
    ) -> None:
        super().__init__()
        self.dropout, self.streams = model.hidden_dropout, streams
        self.position_embeddings = self.norm = None
        if model.positions == "learned_absolute":
            self.position_embeddings = PositionEmbedding(
                model.max_position_embeddings, model.hidden_size, context, normal(model.init_method_std)
            )
        if model.embed_layernorm:
            self.norm = build_norm(model, context, kernels)

    def forward(self, x_bsh: Tensor) -> Tensor:
        if self.position_embeddings is not None:
            x_bsh = self.position_embeddings(x_bsh)
        if self.norm is not None:
            x_bsh = self.norm(x_bsh)
        return self.streams.residual_dropout(x_bsh, self.dropout if self.training else 0.0)
