"""The plain GPT: pre-norm blocks, learned positions, tied or untied output layer.

Its parameter names are the canonical ones, under every parallelism:

    embedding.word_embeddings.weight   embedding.position_embeddings.weight
    layers.{i}.input_norm.*            layers.{i}.attention.{query_key_value,dense}.*
    layers.{i}.post_attention_norm.*   layers.{i}.mlp.{dense_h_to_4h,dense_4h_to_h}.*
    final_norm.*                       lm_head.weight (untied only)

    loss = GPT(model, context, streams)(tokens_bs, labels_bs, loss_mask_bs)
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.layers.block import Block
from megatron.layers.cross_entropy import cross_entropy, mean_loss
from megatron.layers.norm import LayerNorm
from megatron.layers.parameter import normal
from megatron.layers.position import PositionEmbedding
from megatron.layers.vocabulary import OutputLayer, Vocabulary, WordEmbedding
from megatron.model.recompute import Recompute
from megatron.parallel.context import ParallelContext
from megatron.parallel.rng import RandomStreams


class GPT(nn.Module):
    """Collective over tp. Parameters are not initialised here (see `build_model`)."""

    def __init__(self, model: ModelConfig, context: ParallelContext, streams: RandomStreams) -> None:
        super().__init__()
        self.vocabulary = vocabulary_of(model, context)
        self.streams = streams
        self.embedding_dropout = model.hidden_dropout
        self.recompute = Recompute.of(model)
        hidden_size, initial = model.hidden_size, normal(model.init_method_std)
        self.embedding = nn.ModuleDict(
            {
                "word_embeddings": WordEmbedding(self.vocabulary, hidden_size, initial),
                "position_embeddings": PositionEmbedding(model.max_position_embeddings, hidden_size, context, initial),
            }
        )
        self.layers = nn.ModuleList(Block(model, context, streams) for _ in range(model.num_layers))
        self.final_norm = LayerNorm(model.hidden_size, context, model.layernorm_epsilon)
        if model.untie_embeddings_and_output_weights:
            self.lm_head = OutputLayer(self.vocabulary, hidden_size, initial)

    def forward(self, tokens_bs: Tensor, labels_bs: Tensor, loss_mask_bs: Tensor | None = None) -> Tensor:
        """The scalar loss, equal on all tp ranks (see `mean_loss`). Token ids are int64; the mask is 0 or 1. Under
        sequence parallelism over sp, all three are this rank's chunk of the sequences."""
        nll_bs = cross_entropy(self._logits_here(tokens_bs), labels_bs, self.vocabulary)
        return mean_loss(nll_bs, loss_mask_bs, self.vocabulary.context)

    def logits(self, tokens_bs: Tensor) -> Tensor:
        """[b, s, true vocabulary], on all tp ranks: for looking at, not for training."""
        return self.vocabulary.gathered(self._logits_here(tokens_bs))

    def _logits_here(self, tokens_bs: Tensor) -> Tensor:
        x_bsh = self.embedding["position_embeddings"](self.embedding["word_embeddings"](tokens_bs))
        x_bsh = self.streams.residual_dropout(x_bsh, self.embedding_dropout if self.training else 0.0)
        for start, stop, is_recomputed in self.recompute.groups(len(self.layers)):
            if is_recomputed and self.training:
                x_bsh = self.streams.checkpointed(self._run_layers, start, stop, x_bsh)
            else:
                x_bsh = self._run_layers(start, stop, x_bsh)
        return self._output_layer().logits(self.final_norm(x_bsh))

    def _run_layers(self, start: int, stop: int, x_bsh: Tensor) -> Tensor:
        for layer in self.layers[start:stop]:
            x_bsh = layer(x_bsh)
        return x_bsh

    def _output_layer(self) -> nn.Module:
        return self.lm_head if hasattr(self, "lm_head") else self.embedding["word_embeddings"]


def vocabulary_of(model: ModelConfig, context: ParallelContext) -> Vocabulary:
    return Vocabulary(model.vocab_size, model.padded_vocab_size(context.tp_size), context)
