"""Build a model for this rank, initialised, and ask it about its parameters.

model = build_model(config.model, config.parallel, context, streams, seed=1234)   # GPT or GPTPipe
layouts = parameter_layouts(model)              # canonical name -> Layout, of this stage
groups = parameter_groups(model, weight_decay=0.1)
"""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron.config.model import ModelConfig
from megatron.config.parallel import ParallelConfig
from megatron.layers.parameter import initialize, layouts_of
from megatron.model.gpt import GPT
from megatron.parallel.context import ParallelContext
from megatron.parallel.rng import RandomStreams
from megatron.ucp.layout import Layout


def build_model(
    model: ModelConfig, parallel: ParallelConfig, context: ParallelContext, streams: RandomStreams, seed: int
) -> nn.Module:
    """The model with its first values: the same atomic parameters under every topology. With pipelining,
    collective over the world. `model.vocab_size` must be known."""
    if parallel.is_pipelined:
        # Late: deepspeed.pipe is not needed for a plain model.
        from megatron.model.gpt_pipe import GPTPipe

        built: nn.Module = GPTPipe(model, context, streams)
    else:
        built = GPT(model, context, streams)
    initialize(built.named_parameters(), seed)
    return built


def parameter_layouts(model: nn.Module) -> dict[str, Layout]:
    """Canonical name -> layout, of the parameters on this stage. Raises UndeclaredParameterError."""
    return layouts_of(model.named_parameters())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """For torch optimizers and DeepSpeed: matrices decay, biases and norms do not. No group is empty."""
    parameter_layouts(model)  # so that an undeclared parameter is named, not an AttributeError
    params = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"name": "decay", "params": [p for p in params if p.is_decayed], "weight_decay": weight_decay},
        {"name": "no_decay", "params": [p for p in params if not p.is_decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
