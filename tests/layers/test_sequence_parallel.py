"""Layers on parts of the sequence (Megatron's over tp, Ulysses' over sp, both) against plain torch, in fp64.

A rank gets its part of the input and of the upstream gradient; outputs and input gradients must be its parts of the
plain ones, and weight gradients, summed over sp and merged over tp, the plain ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from harness.ranks import run_ranks
from layers import test_parallel_layers as plain
from megatron.layers import linear, norm
from megatron.layers.cross_entropy import mean_loss
from megatron.layers.norm import LayerNorm
from megatron.layers.parameter import layouts_of, normal
from megatron.layers.position import PositionEmbedding
from megatron.parallel.context import build_context
from megatron.parallel.rng import RandomStreams
from megatron.ucp.errors import ReplicaMismatchError
from megatron.ucp.layout import ShardRank
from megatron.ucp.topology import Topology

LENGTH = 12


@dataclass(frozen=True)
class Place:
    tp: int = 1
    sp: int = 1
    cut: bool = False

    @property
    def topology(self) -> Topology:
        return Topology(tp_size=self.tp, sp_size=self.sp)

    def part(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        """Of [b, s, ...]: the chunk of the sp rank, of that the tp rank's."""
        coords = self.topology.coords(rank)
        chunk = x.chunk(self.sp, dim=1)[coords.sp]
        return chunk.chunk(self.tp, dim=1)[coords.tp] if self.cut else chunk

    def tokens(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        """Token ids are cut over sp only: the embedding's output is what --sequence-parallel cuts."""
        return x.chunk(self.sp, dim=1)[self.topology.coords(rank).sp]


PLACES = (
    Place(sp=2),
    Place(sp=3),
    Place(tp=2, cut=True),
    Place(tp=3, cut=True),
    Place(tp=2, sp=3),
    Place(tp=2, sp=3, cut=True),
)
KINDS = {
    "attention": plain._attention,
    "attention-grouped": lambda a, x: plain._attention(a, x, kv_heads=3),
    "mlp": plain._mlp,
    "block": plain._block,
    "embedding": lambda a, x: F.embedding(x, a["weight"]),
    "norm": lambda a, x: plain._norm({f"n.{name}": value for name, value in a.items()}, x, "n"),
    "positions": lambda a, x: x + a["weight"][:LENGTH],
}


def _is_legal(kind: str, place: Place) -> bool:
    """Six query heads, three key/value heads."""
    return kind != "attention-grouped" or (place.tp, place.sp) in ((1, 3), (3, 1))


def _layer(kind, context):
    if kind == "norm":
        return LayerNorm(plain.HIDDEN, context, 1e-5).double()
    if kind == "positions":
        return PositionEmbedding(LENGTH + 3, plain.HIDDEN, context, normal(1.0)).double()
    return plain._layer(kind, context)


def _given(kind):
    generator = torch.Generator().manual_seed(3)
    layouts = layouts_of(_layer(kind, plain.ParallelContext.single()).named_parameters())

    def draw(*shape):
        return 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)

    atoms = {name: draw(*layout.shape) for name, layout in layouts.items()}
    is_tokens = kind == "embedding"
    x = torch.randint(plain.VOCABULARY, (2, LENGTH), generator=generator) if is_tokens else draw(2, LENGTH, 24)
    return atoms, x, draw(2, LENGTH, plain.HIDDEN)


def _truth(kind):
    atoms, x, upstream = _given(kind)
    atoms = {name: atom.requires_grad_() for name, atom in atoms.items()}
    x.requires_grad_(x.is_floating_point())
    y = KINDS[kind](atoms, x)
    y.backward(upstream)
    return y.detach(), x.grad, {name: atom.grad for name, atom in atoms.items()}


def _run(rank, world_size, place, given_by_kind, fault=None):
    context = build_context(place.topology, place.cut)
    if fault == "replicated parameters not summed":
        norm.replicated = linear.replicated = lambda params, context: tuple(params)
    found = {}
    for kind, (atoms, x, upstream) in given_by_kind.items():
        layer = _layer(kind, context)
        for name, param in layer.named_parameters():
            param.data = param.atomic_layout.split(atoms[name], context.shard_rank)
        x = (place.part(x, rank) if x.is_floating_point() else place.tokens(x, rank)).clone()
        x.requires_grad_(x.is_floating_point())
        y = layer(x)
        y.backward(place.part(upstream, rank))
        layouts = layouts_of(layer.named_parameters())
        found[kind] = y.detach(), x.grad, {n: (layouts[n], p.grad) for n, p in layer.named_parameters()}
    return found


def _check(kind, place, results):
    output, input_grad, weight_grads = _truth(kind)
    close = {"rtol": 1e-9, "atol": 1e-10}
    by_tp: dict[str, dict[ShardRank, torch.Tensor]] = {name: {} for name in weight_grads}
    layouts = {}
    for rank, result in enumerate(results):
        y, x_grad, grads = result[kind]
        torch.testing.assert_close(y, place.part(output, rank), **close)
        if input_grad is not None:
            torch.testing.assert_close(x_grad, place.part(input_grad, rank), **close)
        tp_rank = ShardRank(place.topology.coords(rank).tp, place.tp)
        for name, (layout, grad) in grads.items():
            layouts[name] = layout
            by_tp[name][tp_rank] = by_tp[name].get(tp_rank, 0) + grad
    for name, shards in by_tp.items():
        # merge also checks that copies of a replicated gradient are bitwise equal on all tp ranks.
        torch.testing.assert_close(layouts[name].merge(shards), weight_grads[name], **close)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_layers_on_parts_of_the_sequence(place):
    kinds = [kind for kind in KINDS if _is_legal(kind, place)]
    results = run_ranks(place.topology.world_size, _run, place, {kind: _given(kind) for kind in kinds})
    for kind in kinds:
        _check(kind, place, results)


@pytest.mark.parametrize("kind", ["norm", "mlp", "block"])
def test_fault_a_replicated_parameter_whose_gradient_is_not_summed(kind):
    place = Place(tp=2, cut=True)
    results = run_ranks(2, _run, place, {kind: _given(kind)}, "replicated parameters not summed")
    with pytest.raises(ReplicaMismatchError, match="copies that must be equal differ"):
        _check(kind, place, results)


def _masked_loss(rank, world_size, nll, mask):
    context = build_context(Topology(sp_size=world_size))
    own = nll.chunk(world_size, 1)[rank].clone().requires_grad_()
    loss = mean_loss(own, mask.chunk(world_size, 1)[rank], context)
    loss.backward()
    return loss.detach(), own.grad


def test_masked_loss_is_the_whole_sequences():
    """Unmasked positions are dealt unevenly, and one chunk has none: means of chunks would not do."""
    generator = torch.Generator().manual_seed(1)
    nll = torch.rand(3, 8, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 1, 1, 1, 1, 1], [0] * 8])
    whole = nll.clone().requires_grad_()
    truth = ((whole * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
    truth.backward()
    results = run_ranks(2, _masked_loss, nll, mask)
    assert sum(loss for loss, _ in results) / 2 == pytest.approx(truth.item(), abs=1e-12)
    grads = torch.cat([grad for _, grad in results], 1) / 2
    torch.testing.assert_close(grads, whole.grad, rtol=0, atol=1e-12)


def _draws(rank, world_size, cut):
    context = build_context(Topology(tp_size=world_size), cut)
    return RandomStreams(5, context).residual_dropout(torch.ones(4, 16), 0.5)


@pytest.mark.parametrize("cut", [False, True])
def test_dropout_differs_between_tp_ranks_only_where_the_sequence_is_cut(cut):
    first, second = run_ranks(2, _draws, cut)
    assert torch.equal(first, second) != cut
