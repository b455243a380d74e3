"""A layer at its place among the ranks against the same layer in plain torch, in fp64.

Truth is a function of the atomic weights and the whole input. A rank gets its part of the input and of
the upstream gradient; outputs and input gradients must be its parts of the truth's, and weight gradients, summed over
the ranks that hold the same shard and merged over the others, the truth's.

    KINDS = {"norm": Kind(lambda context: LayerNorm(24, context, 1e-5), lambda atoms, x: ...)}
    results = run_ranks(place.topology.world_size, _run, place, {"norm": given(KINDS["norm"])})
    check(KINDS["norm"], place, [result["norm"] for result in results])
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron.layers.parameter import layouts_of
from megatron.parallel.context import ParallelContext, build_context
from megatron.ucp.layout import ShardRank
from megatron.ucp.topology import Topology

HIDDEN, LENGTH, NUM_SAMPLES, NUM_WORDS = 24, 12, 4, 11
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


@dataclass(frozen=True)
class Place:
    tp: int = 1
    sp: int = 1
    dp: int = 1
    ep: int = 1
    cut: bool = False
    """--sequence-parallel."""

    def __str__(self) -> str:
        sizes = "".join(f"{name}{getattr(self, name)}" for name in ("tp", "sp", "dp", "ep") if getattr(self, name) > 1)
        return (sizes or "one") + ("cut" if self.cut else "")

    @property
    def topology(self) -> Topology:
        return Topology(tp_size=self.tp, sp_size=self.sp, dp_size=self.dp, ep_size=self.ep)

    def tokens(self, x: Tensor, rank: int) -> Tensor:
        """Of [b, s, ...]: the samples of the dp rank, of these the chunk of the sp rank."""
        coords = self.topology.coords(rank)
        return x.chunk(self.dp, dim=0)[coords.dp].chunk(self.sp, dim=1)[coords.sp]

    def part(self, x: Tensor, rank: int) -> Tensor:
        """Of that, where activations are cut, the tp rank's."""
        x = self.tokens(x, rank)
        return x.chunk(self.tp, dim=1)[self.topology.coords(rank).tp] if self.cut else x

    def shard_rank(self, rank: int, is_dealt: bool) -> ShardRank:
        """`is_dealt` over ep."""
        coords = self.topology.coords(rank)
        return ShardRank(coords.tp, self.tp, *((self.topology.ep_rank(coords), self.ep) if is_dealt else ()))


@dataclass(frozen=True)
class Kind:
    build: Callable[[ParallelContext], nn.Module]
    truth: Callable[[Mapping[str, Tensor], Tensor], Tensor | tuple[Tensor, Tensor]]
    """(atomic weights, input) -> output, or (output, a loss of the layer's own)."""
    num_features: int = HIDDEN
    """Of the output."""
    takes_tokens: bool = False
    has_whole_output: bool = False
    """Where activations are cut, the output is not."""
    adjust: Callable[[dict[str, Tensor], Tensor], None] = lambda atoms, x: None
    """What is special about the weights and the input; in place."""

    def __hash__(self) -> int:
        return id(self)


@functools.cache
def given(kind: Kind) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Atomic weights, input, upstream gradient."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)

    layouts = layouts_of(kind.build(ParallelContext.single()).named_parameters())
    atoms = {name: draw(*layout.shape) for name, layout in layouts.items()}
    x = draw(NUM_SAMPLES, LENGTH, HIDDEN)
    if kind.takes_tokens:
        x = torch.randint(NUM_WORDS, (NUM_SAMPLES, LENGTH), generator=generator)
    kind.adjust(atoms, x)
    return atoms, x, draw(NUM_SAMPLES, LENGTH, kind.num_features)


def run(rank: int, place: Place, kinds: Mapping[str, Kind], given_by_kind: Mapping[str, tuple]) -> dict[str, tuple]:
    """On one rank: by kind the output, the input's gradient, the weights' gradients. Collective."""
    context = build_context(place.topology, place.cut)
    found = {}
    for name, (atoms, x, upstream) in given_by_kind.items():
        kind = kinds[name]
        layer = kind.build(context).double()
        for param_name, param in layer.named_parameters():
            param.data = param.atomic_layout.split(atoms[param_name], context.shard_rank)
        x = (place.tokens if kind.takes_tokens else place.part)(x, rank).clone()
        x.requires_grad_(x.is_floating_point())
        y = layer(x)
        y.backward((place.tokens if kind.has_whole_output else place.part)(upstream, rank))
        layouts = layouts_of(layer.named_parameters())
        found[name] = y.detach(), x.grad, {n: (layouts[n], p.grad) for n, p in layer.named_parameters()}
    return found


@functools.cache
def _truth(kind: Kind) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    atoms, x, upstream = given(kind)
    atoms = {name: atom.clone().requires_grad_() for name, atom in atoms.items()}
    x = x.clone().requires_grad_(x.is_floating_point())
    y = kind.truth(atoms, x)
    y, loss = y if isinstance(y, tuple) else (y, 0.0)
    ((y * upstream).sum() + loss).backward()
    return y.detach(), x.grad, {name: atom.grad for name, atom in atoms.items()}


def check(kind: Kind, place: Place, results: list[tuple]) -> None:
    """Raises AssertionError, or ReplicaMismatchError where gradients that must be equal on all tp ranks are not."""
    output, input_grad, weight_grads = _truth(kind)
    sums: dict[str, dict[ShardRank, Tensor]] = {name: {} for name in weight_grads}
    layouts = {}
    for rank, (y, x_grad, grads) in enumerate(results):
        assert set(grads) == set(weight_grads)
        own_output = (place.tokens if kind.has_whole_output else place.part)(output, rank)
        torch.testing.assert_close(y, own_output, **CLOSE)
        if input_grad is not None:
            torch.testing.assert_close(x_grad, place.part(input_grad, rank), **CLOSE)
        for name, (layout, grad) in grads.items():
            layouts[name] = layout
            shard_rank = place.shard_rank(rank, layout.is_cut_over("ep"))
            sums[name][shard_rank] = sums[name].get(shard_rank, 0) + grad
    for name, shards in sums.items():
        # merge also checks that copies of a replicated gradient are bitwise equal on all tp ranks.
        torch.testing.assert_close(layouts[name].merge(shards), weight_grads[name], **CLOSE)
