"""The GPT as DeepSpeed pipeline stages: the plain model's layers in a row, one entry of the pipeline each.

The one idea: every entry holds its layer at the layer's canonical path, so `state_dict` keys (and with them
DeepSpeed's layer_XX files) are canonical, and `named_parameters` only has to drop DeepSpeed's own prefix
("4." or "tied_modules.<key>."). Nothing else in the project ever sees a numbered name.

    0          word embedding (tied: the same parameter is used by the last entry, possibly on another stage)
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

import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.layers.block import Block
from megatron.layers.cross_entropy import cross_entropy, mean_loss
from megatron.layers.norm import LayerNorm
from megatron.layers.vocabulary import Vocabulary, WordEmbedding
from megatron.model.gpt import embeddings, output_layer, vocabulary_of
from megatron.model.recompute import Recompute
from megatron.parallel.context import ParallelContext
from megatron.parallel.rng import RandomStreams

log = logging.getLogger(__name__)

_TIED_KEY = "word_embeddings"
_WORDS = "embedding.word_embeddings"


class PipelineRecomputeError(ValueError):
    """A way of recomputing that pipeline entries cannot do."""


class GPTPipe(PipelineModule):
    """Construction is collective over the world. Parameters are not initialised here (see `build_model`)."""

    def __init__(self, model: ModelConfig, context: ParallelContext, streams: RandomStreams) -> None:
        topology = context.topology
        said = io.StringIO()
        # DeepSpeed prints how it partitions; that belongs in a log.
        with contextlib.redirect_stdout(said):
            super().__init__(
                _entries(model, context, streams),
                topology=PipeModelDataParallelTopology(
                    num_pp=topology.pp_size, num_mp=topology.tp_size, num_dp=topology.dp_size
                ),
                loss_fn=_Loss(vocabulary_of(model, context)),
                # By blocks, not by parameters: the vocabulary's matrices would otherwise fill stages of their own,
                # and DeepSpeed would build the whole model on every rank to count.
                partition_method=f"type:^{BlockEntry.__name__}$",
            )
        log.debug("%s", said.getvalue())

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Canonical names: what DeepSpeed's engine takes into its checkpoints as parameter names."""
        for name, param in super().named_parameters("", recurse, remove_duplicate):
            first, _, rest = name.partition(".")
            if first == "tied_modules":
                rest = rest.partition(".")[2]
            yield (f"{prefix}.{rest}" if prefix else rest), param


class _Entry(nn.Module):
    """A layer at a dotted path: its parameters are named `path`.*, as in the plain model."""

    def __init__(self, path: str, layer: nn.Module) -> None:
        super().__init__()
        *folders, last = path.split(".")
        parent: nn.Module = self
        for folder in folders:
            child = nn.Module()
            parent.add_module(folder, child)
            parent = child
        parent.add_module(last, layer)
        self._path = path

    @property
    def layer(self) -> nn.Module:
        return self.get_submodule(self._path)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WordEntry(_Entry):
    """Token ids -> hidden."""

    def __init__(self, model: ModelConfig, context: ParallelContext) -> None:
        words, _ = embeddings(model, context, vocabulary_of(model, context))
        super().__init__(_WORDS, words)


class PositionEntry(_Entry):
    def __init__(self, model: ModelConfig, context: ParallelContext) -> None:
        _, positions = embeddings(model, context, vocabulary_of(model, context))
        super().__init__("embedding.position_embeddings", positions)
        self.dropout = model.hidden_dropout

    def forward(self, x_bsh: Tensor) -> Tensor:
        return F.dropout(self.layer(x_bsh), self.dropout, self.training)


class BlockEntry(_Entry):
    def __init__(
        self, model: ModelConfig, context: ParallelContext, streams: RandomStreams, index: int, is_recomputed: bool
    ) -> None:
        super().__init__(f"layers.{index}", Block(model, context, streams))
        self.streams, self.is_recomputed = streams, is_recomputed

    def forward(self, x_bsh: Tensor) -> Tensor:
        if self.is_recomputed and self.training:
            return self.streams.checkpointed(self.layer, x_bsh)
        return self.layer(x_bsh)


class FinalNormEntry(_Entry):
    def __init__(self, model: ModelConfig, context: ParallelContext) -> None:
        super().__init__("final_norm", LayerNorm(model.hidden_size, context, model.layernorm_epsilon))


class OutputEntry(_Entry):
    """Hidden -> this rank's logits, with a weight of its own."""

    def __init__(self, model: ModelConfig, context: ParallelContext) -> None:
        super().__init__("lm_head", output_layer(model, vocabulary_of(model, context)))


def _tied_logits(entry: WordEntry, x_bsh: Tensor) -> Tensor:
    words = entry.layer
    assert isinstance(words, WordEmbedding)
    return words.logits(x_bsh)


class _Loss:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, logits_bsv: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Consumes the logits."""
        labels_bs, loss_mask_bs = batch
        return mean_loss(cross_entropy(logits_bsv, labels_bs, self.vocabulary), loss_mask_bs)


def _entries(model: ModelConfig, context: ParallelContext, streams: RandomStreams) -> list[LayerSpec]:
    is_recomputed = _recomputed(model)
    blocks = [
        LayerSpec(BlockEntry, model, context, streams, index, is_recomputed[index]) for index in range(model.num_layers)
    ]
    middle = [LayerSpec(PositionEntry, model, context), *blocks, LayerSpec(FinalNormEntry, model, context)]
    if model.untie_embeddings_and_output_weights:
        return [LayerSpec(WordEntry, model, context), *middle, LayerSpec(OutputEntry, model, context)]

    def tied(forward_fn=None) -> TiedLayerSpec:
        weight = f"{_WORDS}.weight"
        return TiedLayerSpec(_TIED_KEY, WordEntry, model, context, forward_fn=forward_fn, tied_weight_attr=weight)

    return [tied(), *middle, tied(_tied_logits)]


def _recomputed(model: ModelConfig) -> list[bool]:
    recompute = Recompute.of(model)
    if recompute.method == "uniform" and recompute.num_layers > 1:
        raise PipelineRecomputeError(
            "a pipeline's entries are single blocks, so they cannot be recomputed in groups. Found: "
            f"--recompute-num-layers {recompute.num_layers} with --recompute-method uniform. Expected: 1. What to do: "
            "drop the flag, or use --no-pipeline-parallel (at one stage), or --recompute-method block."
        )
    return [is_on for start, stop, is_on in recompute.groups(model.num_layers) for _ in range(start, stop)]
