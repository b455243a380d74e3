"""The GPT as DeepSpeed pipeline stages: the plain model's layers in a row, one entry of the pipeline each.

`entry_paths` says where each entry stands in the plain model. DeepSpeed numbers entries ("4.mlp...");
through this one table `named_parameters` gives canonical names instead, and DeepSpeed's engine takes them into its
checkpoints. In its layer_XX files names are relative to the entry: prefix them with `entry_paths[XX]`.

    0          word embedding (tied: its weight is also the last entry's, possibly on another stage)
    1          what follows it: positions, normalisation, dropout
    2 .. L+1   blocks
    L+2        final norm
    L+3        output layer -> logits; loss_fn(logits, (labels, loss_mask))

    engine = PipelineEngine(model=GPTPipe(model, context, streams), ...)
    loss = engine.train_batch(iter([(tokens_bs, (labels_bs, loss_mask_bs)), ...]))
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import Any

from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.kernels.kernels import TORCH, Kernels
from megatron.layers.block import Block
from megatron.layers.cross_entropy import cross_entropy, mean_loss
from megatron.layers.embedding import EmbeddingTail
from megatron.layers.norm import norm_class
from megatron.layers.parameter import normal
from megatron.layers.router_ledger import RouterLedger
from megatron.layers.vocabulary import OutputLayer, Vocabulary, WordEmbedding
from megatron.model.gpt import vocabulary_of
from megatron.model.recompute import Recompute
from megatron.parallel.context import ParallelContext
from megatron.parallel.rng import RandomStreams

log = logging.getLogger(__name__)

_WORDS = "embedding.word_embeddings"


class PipelineRecomputeError(ValueError):
    """A way of recomputing that pipeline entries cannot do."""


class PipelinePartitionError(ValueError):
    """A way of dealing the entries to stages that leaves a stage empty."""


class GPTPipe(PipelineModule):
    """Construction is collective over the world. Parameters are not initialised here (see `build_model`)."""

    def __init__(
        self,
        model: ModelConfig,
        context: ParallelContext,
        streams: RandomStreams,
        partition_method: str = "type:transformer",
        kernels: Kernels = TORCH,
        ledger: RouterLedger | None = None,
    ) -> None:
        """`partition_method` is DeepSpeed's: with "type:REGEX" every stage gets as many entries whose class matches;
        "uniform" as many entries; "parameters" as many parameters, for which DeepSpeed builds the whole model on every
        rank. Raises PipelinePartitionError."""
        topology, vocabulary = context.topology, vocabulary_of(model, context)
        said = io.StringIO()
        self.entry_paths = entry_paths(model)  # first: PipelineModule's constructor asks for parameters
        entries = _entries(model, context, streams, vocabulary, kernels, ledger)
        # DeepSpeed prints how it partitions; that belongs in a log.
        with contextlib.redirect_stdout(said):
            super().__init__(
                entries,
                topology=PipeModelDataParallelTopology(
                    num_pp=topology.pp_size, num_mp=topology.tp_size, num_dp=topology.zero_size
                ),
                loss_fn=_Loss(vocabulary, kernels),
                partition_method=partition_method,
            )
        log.debug("%s", said.getvalue())
        stages = [(int(start), int(stop)) for start, stop in zip(self.parts, self.parts[1:])]
        if any(start == stop for start, stop in stages):
            names = ", ".join(dict.fromkeys(spec.typename.__name__ for spec in entries))
            raise PipelinePartitionError(
                f"--pp-partition-method {partition_method} leaves a pipeline stage empty. Found: entries {stages} of "
                f"{len(self.entry_paths)} on the {topology.pp_size} stages. Expected: at least one on each; the "
                f"entries' classes are {names}. What to do: drop the flag, or use uniform."
            )

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Canonical names."""
        for name, param in super().named_parameters("", recurse, remove_duplicate):
            first, _, rest = name.partition(".")
            if first == "tied_modules":
                path, rest = _WORDS, rest.partition(".")[2]
            else:
                path = self.entry_paths[int(first)]
            yield ".".join(filter(None, (prefix, path, rest))), param


class PipeTransformerBlock(Block):
    """A block that recomputes itself."""

    def __init__(self, model: ModelConfig, *rest: Any, is_recomputed: bool) -> None:
        super().__init__(model, *rest)
        self.is_recomputed = is_recomputed

    def forward(self, x_bsh: Tensor) -> Tensor:
        if self.is_recomputed and self.training:
            return self.streams.checkpointed(super().forward, x_bsh)
        return super().forward(x_bsh)


class _Loss:
    def __init__(self, vocabulary: Vocabulary, kernels: Kernels) -> None:
        self.vocabulary, self.kernels = vocabulary, kernels

    def __call__(self, logits_bsv: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Consumes the logits."""
        labels_bs, loss_mask_bs = batch
        nll_bs = cross_entropy(logits_bsv, labels_bs, self.vocabulary, self.kernels)
        return mean_loss(nll_bs, loss_mask_bs, self.vocabulary.context)


def entry_paths(model: ModelConfig) -> list[str | None]:
    """For each pipeline entry of the whole model, its path in the plain one; None where it has no parameters of its
    own (the tied output layer)."""
    blocks = [f"layers.{index}" for index in range(model.num_layers)]
    head = "lm_head" if model.untie_embeddings_and_output_weights else None
    return [_WORDS, "embedding", *blocks, "final_norm", head]


def _entries(
    model: ModelConfig,
    context: ParallelContext,
    streams: RandomStreams,
    vocabulary: Vocabulary,
    kernels: Kernels,
    ledger: RouterLedger | None,
) -> list[LayerSpec]:
    """In the order of `entry_paths`."""
    matrix = (vocabulary, model.hidden_size, normal(model.init_method_std))
    middle = [
        LayerSpec(EmbeddingTail, model, context, streams, kernels),
        *(
            LayerSpec(PipeTransformerBlock, model, context, streams, layer, kernels, ledger, is_recomputed=is_on)
            for layer, is_on in enumerate(_recomputed(model))
        ),
        LayerSpec(norm_class(model), model.hidden_size, context, model.layernorm_epsilon, kernels),
    ]
    if model.untie_embeddings_and_output_weights:
        head = LayerSpec(OutputLayer, *matrix, model.add_output_layer_bias)
        return [LayerSpec(WordEmbedding, *matrix), *middle, head]
    # Only the weight may be tied: DeepSpeed sums the gradients of `tied_weight_attr` over the stages, nothing else's.
    first = TiedLayerSpec("words", WordEmbedding, *matrix)
    last = TiedLayerSpec("words", WordEmbedding, *matrix, forward_fn=WordEmbedding.logits)
    return [first, *middle, last]


def _recomputed(model: ModelConfig) -> list[bool]:
    recompute = Recompute.of(model)
    if recompute.method == "uniform" and recompute.num_layers > 1:
        raise PipelineRecomputeError(
            "a pipeline's entries are single blocks, so they cannot be recomputed in groups. Found: "
            f"--recompute-num-layers {recompute.num_layers} with --recompute-method uniform. Expected: 1. What to do: "
            "drop the flag, or use --no-pipeline-parallel (at one stage), or --recompute-method block."
        )
    return [is_on for start, stop, is_on in recompute.groups(model.num_layers) for _ in range(start, stop)]
