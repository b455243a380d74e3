"""The word embedding and the output layer, cut over tp by words.

The atomic matrix has the true vocabulary. Shards are padded to equal sizes; padding rows are zero,
are never looked up, and `cross_entropy` keeps their columns out of the loss, so that they stay zero in training.

    vocabulary = Vocabulary(50257, padded_size=50304, context)
    embedding = WordEmbedding(vocabulary, hidden_size, normal(0.02))
    logits_bsv = embedding.logits(x_bsh)       # the tied output layer: this rank's columns, padding included
    head = OutputLayer(vocabulary, hidden_size, normal(0.02))     # the untied one
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.layers.parameter import ZEROS, Initial, declare
from megatron.parallel.collectives import enter_tp, even_sizes, gather_from_tp, leave_tp
from megatron.parallel.context import ParallelContext
from megatron.ucp.layout import Layout


class Vocabulary:
    """Which words this rank has: [start, start + size), of which the first `num_true` are words, not padding."""

    def __init__(self, true_size: int, padded_size: int, context: ParallelContext) -> None:
        self.true_size, self.padded_size, self.context = true_size, padded_size, context
        self.sizes = even_sizes(padded_size, context.tp_size)
        self.start = sum(self.sizes[: context.tp_rank])
        self.size = self.sizes[context.tp_rank]
        self.num_true = min(max(true_size - self.start, 0), self.size)

    def layout(self, hidden_size: int) -> Layout:
        return Layout.shard_v((self.true_size, hidden_size), padded=self.padded_size)

    def gathered(self, logits_bsv: Tensor) -> Tensor:
        """All words' logits without padding, [b, s, true vocabulary]. Collective over tp."""
        return gather_from_tp(logits_bsv, self.context, self.sizes)[..., : self.true_size]


class _VocabularyMatrix(nn.Module):
    bias: Tensor | None

    def __init__(self, vocabulary: Vocabulary, hidden_size: int, initial: Initial) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        layout = vocabulary.layout(hidden_size)
        self.weight = declare(layout, vocabulary.context, initial, is_decayed=True, kind="vocabulary")

    def logits(self, x_bsh: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, this rank's columns]. Collective over tp."""
        return F.linear(enter_tp(x_bsh, self.vocabulary.context), self.weight)


class WordEmbedding(_VocabularyMatrix):
    def forward(self, tokens_bs: Tensor) -> Tensor:
        """[b, s] -> [b, s, h], equal on all tp ranks; under sequence parallelism this rank's part of the sequence.
        Collective over tp."""
        vocabulary = self.vocabulary
        if vocabulary.context.tp_size == 1:
            return F.embedding(tokens_bs, self.weight)
        local_bs = tokens_bs - vocabulary.start
        is_elsewhere_bs = (local_bs < 0) | (local_bs >= vocabulary.size)
        x_bsh = F.embedding(local_bs.masked_fill(is_elsewhere_bs, 0), self.weight)
        return leave_tp(x_bsh.masked_fill(is_elsewhere_bs.unsqueeze(-1), 0.0), vocabulary.context)


class OutputLayer(_VocabularyMatrix):
    """The untied one, which may have a bias."""

    def __init__(self, vocabulary: Vocabulary, hidden_size: int, initial: Initial, has_bias: bool = False) -> None:
        super().__init__(vocabulary, hidden_size, initial)
        bias = None
        if has_bias:
            layout = Layout.shard_v((vocabulary.true_size,), padded=vocabulary.padded_size)
            bias = declare(layout, vocabulary.context, ZEROS, is_decayed=False, kind="vocabulary")
        self.register_parameter("bias", bias)

    def forward(self, x_bsh: Tensor) -> Tensor:
        return F.linear(enter_tp(x_bsh, self.vocabulary.context), self.weight, self.bias)

    logits = forward
