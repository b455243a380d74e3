"""The plain decoder: GPT, LLaMA, BLOOM, GPT-NeoX, mixtures of experts, as ModelConfig says.

Its parameter names are the canonical ones, under every parallelism:

    embedding.word_embeddings.weight   embedding.position_embeddings.weight   embedding.norm.*
    layers.{i}.input_norm.*            layers.{i}.attention.{query_key_value,dense,query_norm,key_norm}.*
    layers.{i}.post_attention_norm.*   layers.{i}.mlp.{dense_h_to_4h,dense_4h_to_h}.*
    layers.{i}.mlp.router.weight       layers.{i}.mlp.experts.{dense,bias}_{h_to_4h,4h_to_h}
    layers.{i}.mlp.shared_expert.*     final_norm.*     lm_head.* (untied only)

    loss = GPT(model, context, streams)(tokens_bs, labels_bs, loss_mask_bs)
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.kernels.kernels import TORCH, Kernels
from megatron.layers.block import Block
from megatron.layers.cross_entropy import cross_entropy, mean_loss
from megatron.layers.embedding import EmbeddingTail
from megatron.layers.norm import build_norm
from megatron.layers.parameter import normal
from megatron.layers.router_ledger import RouterLedger
from megatron.layers.vocabulary import OutputLayer, Vocabulary, WordEmbedding
from megatron.model.recompute import Recompute
from megatron.parallel.context import ParallelContext
from megatron.parallel.rng import RandomStreams


class GPT(nn.Module):
    """Collective over tp. Parameters are not initialised here (see `build_model`)."""

    def __init__(
        self,
        model: ModelConfig,
        context: ParallelContext,
        streams: RandomStreams,
        kernels: Kernels = TORCH,
        ledger: RouterLedger | None = None,
    ) -> None:
        super().__init__()
        self.vocabulary = vocabulary_of(model, context)
        self.streams, self.kernels = streams, kernels
        self.recompute = Recompute.of(model)
        initial = normal(model.init_method_std)
        self.embedding = EmbeddingTail(model, context, streams, kernels)
        self.embedding.word_embeddings = WordEmbedding(self.vocabulary, model.hidden_size, initial)
        self.layers = nn.ModuleList(
            Block(model, context, streams, layer, kernels, ledger) for layer in range(model.num_layers)
        )
        self.final_norm = build_norm(model, context, kernels)
        if model.untie_embeddings_and_output_weights:
            self.lm_head = OutputLayer(self.vocabulary, model.hidden_size, initial, model.add_output_layer_bias)

    def forward(self, tokens_bs: Tensor, labels_bs: Tensor, loss_mask_bs: Tensor | None = None) -> Tensor:
        """The scalar loss, equal on all tp ranks (see `mean_loss`). Token ids are int64; the mask is 0 or 1. Under
        sequence parallelism over sp, all three are this rank's chunk of the sequences."""
        nll_bs = cross_entropy(self._logits_here(tokens_bs), labels_bs, self.vocabulary, self.kernels)
        return mean_loss(nll_bs, loss_mask_bs, self.vocabulary.context)

    def logits(self, tokens_bs: Tensor) -> Tensor:
        """[b, s, true vocabulary], on all tp ranks: for looking at, not for training."""
        return self.vocabulary.gathered(self._logits_here(tokens_bs))

    def _logits_here(self, tokens_bs: Tensor) -> Tensor:
        x_bsh = self.embedding(self.embedding.word_embeddings(tokens_bs))
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
        return self.lm_head if hasattr(self, "lm_head") else self.embedding.word_embeddings


def vocabulary_of(model: ModelConfig, context: ParallelContext) -> Vocabulary:
    return Vocabulary(model.vocab_size, model.padded_vocab_size(context.tp_size), context)
