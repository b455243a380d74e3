"""How a parameter comes into being: with its layout, its initial distribution and whether it decays, all declared
by the layer that makes it.

Nothing later infers any of these from a name or a shape. Checkpoints ask for `.atomic_layout`
(`.layout` is torch's own), DeepSpeed's gradient norm for `.tensor_model_parallel`, the optimizer's groups for
`.is_decayed` and `.kind`.

    self.weight = declare(Layout.shard_v((out, in)), context, normal(0.02), is_decayed=True)
    initialize(model, seed)                  # names are known only now, and a value depends on seed and name
    layouts = layouts_of(model.named_parameters())

Initialisation does not depend on the topology: the full atomic tensor is drawn by a generator seeded with
(seed, canonical name), and each rank keeps its part: of a ZeRO-3 model, which is never whole, only its piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from megatron.parallel.context import ParallelContext
from megatron.parallel.rng import derived_seed
from megatron.ucp.layout import Layout


class UndeclaredParameterError(TypeError):
    """A model has parameters that no layer declared."""


@dataclass(frozen=True)
class Initial:
    """The distribution of a parameter's first value: a constant `mean` if `std` is 0."""

    mean: float
    std: float


Kind = Literal["matrix", "vocabulary", "experts", "other"]
"""What the optimizer may treat differently: a matrix of a linear layer (Muon), the word embedding and the output layer
(--decoupled-lr), and what is dealt to expert-parallel ranks (in parameter groups of its own)."""

ZEROS = Initial(0.0, 0.0)
ONES = Initial(1.0, 0.0)


def normal(std: float) -> Initial:
    return Initial(0.0, std)


def declare(
    layout: Layout, context: ParallelContext, initial: Initial, is_decayed: bool, kind: Kind = "other"
) -> nn.Parameter:
    """This rank's shard, its values not set yet (see `initialize`). Raises LayoutError if it cannot be cut."""
    param = nn.Parameter(torch.empty(layout.shard_shape(context.shard_rank)))
    param.atomic_layout = layout
    param.shard_rank = context.shard_rank
    param.initial = initial
    param.is_decayed = is_decayed
    param.kind = kind
    # DeepSpeed's old and new word for "every tp rank holds another part": it counts the others once in norms.
    param.model_parallel = param.tensor_model_parallel = layout.is_cut_over("tp")
    return param


def layouts_of(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Layout]:
    """By name. Raises UndeclaredParameterError with every name that lacks one."""
    return {name: param.atomic_layout for name, param in _declared(named_parameters)}


@torch.no_grad()
def initialize(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    seed: int,
    write: Callable[[nn.Parameter, torch.Tensor], None] | None = None,
) -> None:
    """Give every parameter its first value. Local; equal on all ranks that hold the same part. `write` puts a shard
    into a parameter, of which this rank may hold a piece only; without it, into a whole one."""
    write = write or write_whole
    for name, param in _declared(named_parameters):
        initial: Initial = param.initial
        if initial.std == 0:
            atomic = torch.full(param.atomic_layout.shape, initial.mean)
        else:
            generator = torch.Generator("cpu").manual_seed(derived_seed(seed, "initial", name))
            atomic = torch.empty(param.atomic_layout.shape).normal_(initial.mean, initial.std, generator=generator)
        shard = param.atomic_layout.split(atomic, param.shard_rank)
        write(param, shard)


def write_whole(param: nn.Parameter, shard: torch.Tensor) -> None:
    """This rank's shard into a parameter that holds all of it."""
    param.copy_(shard)


def _declared(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    pairs = list(named_parameters)
    missing = sorted(name for name, param in pairs if not isinstance(getattr(param, "atomic_layout", None), Layout))
    if missing:
        raise UndeclaredParameterError(
            f"{len(missing)} parameter(s) have no layout. Found: {', '.join(missing)}. Expected: every parameter made "
            "by megatron.layers.parameter.declare. What to do: declare them in the layer that creates them."
        )
    return pairs
