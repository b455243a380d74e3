"""Build a model for this rank, initialised, and ask it about its parameters.

model = build_model(config.model, config.parallel, context, streams, seed=1234)   # GPT or GPTPipe
layouts = parameter_layouts(model)              # canonical name -> Layout, of this stage
groups = parameter_groups(model, weight_decay=0.1)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.config.optimizer import (
    DECAY,
    DECOUPLED,
    DECOUPLED_NO_DECAY,
    EXPERTS,
    EXPERTS_NO_DECAY,
    MATRICES,
    NO_DECAY,
    is_decayed,
)
from megatron.config.parallel import ParallelConfig
from megatron.kernels.kernels import TORCH, Kernels
from megatron.layers.parameter import initialize, layouts_of
from megatron.layers.router_ledger import RouterLedger
from megatron.model.gpt import GPT
from megatron.parallel.context import ParallelContext
from megatron.parallel.rng import RandomStreams
from megatron.ucp.layout import Layout


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    context: ParallelContext,
    streams: RandomStreams,
    seed: int,
    construction: AbstractContextManager | None = None,
    kernels: Kernels = TORCH,
    ledger: RouterLedger | None = None,
    write: Callable[[nn.Parameter, Tensor], None] | None = None,
) -> nn.Module:
    """The model with its first values: the same atomic parameters under every topology. With pipelining,
    collective over the world. `model.vocab_size` must be known. A plain model is constructed, not initialised, under
    `construction` (deepspeed.zero.Init, which is collective); then `write` is what puts a first value into a parameter
    of which this rank holds a piece (layers/parameter.py)."""
    if parallel.is_pipelined:
        # Late: deepspeed.pipe is not needed for a plain model.
        from megatron.model.gpt_pipe import GPTPipe

        built: nn.Module = GPTPipe(model, context, streams, parallel.pp_partition_method, kernels, ledger)
    else:
        with construction or nullcontext():
            built = GPT(model, context, streams, kernels, ledger)
    initialize(built.named_parameters(), seed, write)
    return built


def parameter_layouts(model: nn.Module) -> dict[str, Layout]:
    """Canonical name -> layout, of the parameters on this stage. Raises UndeclaredParameterError."""
    return layouts_of(model.named_parameters())


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    has_matrices: bool = False,
    has_decoupled: bool = False,
    trained_later: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """For torch optimizers and DeepSpeed: matrices decay, biases and norms do not, frozen parameters are left out. No
    group is empty. Experts are in groups of their own; with `has_matrices` the linear layers' matrices too (Muon), with
    `has_decoupled` the word embedding and the output layer (--decoupled-lr). What `trained_later` names is in groups
    apart, with what it says at the end of the group's name (training/trainable.py)."""
    parameter_layouts(model)  # so that an undeclared parameter is named, not an AttributeError
    order = (MATRICES, DECAY, NO_DECAY, DECOUPLED, DECOUPLED_NO_DECAY, EXPERTS, EXPERTS_NO_DECAY)
    members: dict[str, list[nn.Parameter]] = {name: [] for name in order}
    for param_name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        group = DECAY if param.is_decayed else NO_DECAY
        if has_matrices and param.kind == "matrix":
            group = MATRICES
        elif has_decoupled and param.kind == "vocabulary":
            group = DECOUPLED if param.is_decayed else DECOUPLED_NO_DECAY
        elif param.kind == "experts":
            group = EXPERTS if param.is_decayed else EXPERTS_NO_DECAY
        if group != MATRICES:  # Muon's momentum has no step to count from
            group += (trained_later or {}).get(param_name, "")
        members.setdefault(group, []).append(param)
    return [
        {"name": name, "params": params, "weight_decay": weight_decay if is_decayed(name) else 0.0}
        for name, params in members.items()
        if params
    ]
