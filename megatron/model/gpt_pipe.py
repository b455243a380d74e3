"""The GPT as DeepSpeed pipeline stages: the plain model's layers in a row, one entry of the pipeline each.

The one idea: `entry_paths` says where each entry stands in the plain model. DeepSpeed numbers entries ("4.mlp...");
through this one table `named_parameters` gives canonical names instead, and DeepSpeed's engine takes them into its
checkpoints. In its layer_XX files names are relative to the entry: prefix them with `entry_paths[XX]`.

    0          word embedding (tied: its weight is also the last entry's, possibly on another stage)
    1          position embedding and dropout
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

from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.layers.block import Block
from megatron.layers.cross_entropy import cross_entropy, mean_loss
from megatron.layers.norm import LayerNorm
from megatron.layers.parameter import normal
from megatron.layers.position import PositionEmbedding
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
    ) -> None:
        """`partition_method` is DeepSpeed's: with "type:REGEX" every stage gets as many entries whose class matches;
        "uniform" as many entries; "parameters" as many parameters, for which DeepSpeed builds the whole model on every
        rank. Raises PipelinePartitionError."""
        topology, vocabulary = context.topology, vocabulary_of(model, context)
        said = io.StringIO()
        self.entry_paths = entry_paths(model)  # first: PipelineModule's constructor asks for parameters
        # DeepSpeed prints how it partitions; that belongs in a log.
        with contextlib.redirect_stdout(said):
            super().__init__(
                _entries(model, context, streams, vocabulary),
                topology=PipeModelDataParallelTopology(
                    num_pp=topology.pp_size, num_mp=topology.tp_size, num_dp=topology.zero_size
                ),
                loss_fn=_Loss(vocabulary),
                partition_method=partition_method,
            )
        log.debug("%s", said.getvalue())
        stages = [(int(start), int(stop)) for start, stop in zip(self.parts, self.parts[1:])]
        if any(start == stop for start, stop in stages):
            names = ", ".join(dict.fromkeys(spec.typename.__name__ for spec in self._layer_specs))
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


class PipePositions(PositionEmbedding):
    """The position table's entry also does the dropout that follows it."""

    def __init__(self, model: ModelConfig, context: ParallelContext, streams: RandomStreams) -> None:
        super().__init__(model.max_position_embeddings, model.hidden_size, context, normal(model.init_method_std))
        self.dropout, self.streams = model.hidden_dropout, streams

    def forward(self, x_bsh: Tensor) -> Tensor:
        return self.streams.residual_dropout(super().forward(x_bsh), self.dropout if self.training else 0.0)


class PipeTransformerBlock(Block):
    """A block that recomputes itself."""

    def __init__(
        self, model: ModelConfig, context: ParallelContext, streams: RandomStreams, is_recomputed: bool
    ) -> None:
        super().__init__(model, context, streams)
        self.is_recomputed = is_recomputed

    def forward(self, x_bsh: Tensor) -> Tensor:
        if self.is_recomputed and self.training:
            return self.streams.checkpointed(super().forward, x_bsh)
        return super().forward(x_bsh)


class _Loss:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, logits_bsv: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Consumes the logits."""
        labels_bs, loss_mask_bs = batch
        nll_bs = cross_entropy(logits_bsv, labels_bs, self.vocabulary)
        return mean_loss(nll_bs, loss_mask_bs, self.vocabulary.context)


def entry_paths(model: ModelConfig) -> list[str | None]:
    """For each pipeline entry of the whole model, its path in the plain one; None where it has no parameters of its
    own (the tied output layer)."""
    blocks = [f"layers.{index}" for index in range(model.num_layers)]
    head = "lm_head" if model.untie_embeddings_and_output_weights else None
    return [_WORDS, "embedding.position_embeddings", *blocks, "final_norm", head]


def _entries(
    model: ModelConfig, context: ParallelContext, streams: RandomStreams, vocabulary: Vocabulary
) -> list[LayerSpec]:
    """In the order of `entry_paths`."""
    matrix = (vocabulary, model.hidden_size, normal(model.init_method_std))
    middle = [
        LayerSpec(PipePositions, model, context, streams),
        *(LayerSpec(PipeTransformerBlock, model, context, streams, is_on) for is_on in _recomputed(model)),
        LayerSpec(LayerNorm, model.hidden_size, context, model.layernorm_epsilon),
    ]
    if model.untie_embeddings_and_output_weights:
        return [LayerSpec(WordEmbedding, *matrix), *middle, LayerSpec(OutputLayer, *matrix)]
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
