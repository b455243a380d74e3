"""SparseMixer against transformers' PhiMoE: choices, weights and gradients, in evaluation and with the same draws in
training."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron.config.model import ModelConfig
from megatron.layers.router import Router
from megatron.layers.sparse_mixer import sparse_mixer
from megatron.parallel.context import ParallelContext

TOKENS, NUM_EXPERTS, EPS = 400, 6, 0.1
THIRD = 2e-4
"""Theirs counts a draw that is not the best 0.3333 times, ours a third."""


def _logits() -> Tensor:
    """Near each other, so that several experts of a token count; of either sign."""
    generator = torch.Generator().manual_seed(3)
    logits = 1 + 0.2 * torch.randn(TOKENS, NUM_EXPERTS, generator=generator)
    logits[::3] -= 2
    return logits.requires_grad_()


@pytest.fixture
def same_draws(monkeypatch):
    """The numbers of a stream that starts anew with `restart()`, in whatever shapes they are drawn. transformers draws
    one of them twice (rand_like, then uniform_ in place); the second draw is left out."""
    generator = torch.Generator()
    monkeypatch.setattr(
        torch.Tensor, "exponential_", lambda x: x.copy_(-(1 - torch.rand(x.shape, generator=generator)).log())
    )
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.rand(x.shape, generator=generator))
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda x: x)
    return lambda: generator.manual_seed(5)


def _with_gradient(route, logits):
    gates, experts = route(logits)
    upstream = torch.linspace(-1, 2, gates.numel()).view(gates.shape)
    return gates.detach(), experts, torch.autograd.grad((gates * upstream).sum(), logits)[0]


def _theirs(logits, is_training, eps=EPS):
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    return sparsemixer(logits, jitter_eps=eps, training=is_training)


def test_evaluation_is_transformers():
    logits = _logits()
    found = _with_gradient(lambda x: sparse_mixer(x, 2, EPS, is_training=False), logits)
    truth = _with_gradient(lambda x: _theirs(x, False), logits)
    gates, experts, gradient = truth
    assert torch.equal(found[1], experts)
    torch.testing.assert_close(found[0], gates, rtol=1e-6, atol=0)
    torch.testing.assert_close(found[2], gradient, rtol=1e-5, atol=1e-7)
    # Tokens of which one expert counts, and several; what another threshold gives, and the rule of the others.
    assert (gates == 1).any() and (gates < 0.6).any() and gates.sum(-1).max() > 1.2
    other = sparse_mixer(logits, 2, EPS / 2, is_training=False)[0]
    assert (other - gates).abs().max() > 0.1


def test_training_is_transformers(same_draws):
    logits = _logits()
    same_draws()
    found = _with_gradient(lambda x: sparse_mixer(x, 2, EPS, is_training=True), logits)
    same_draws()
    gates, experts, gradient = _with_gradient(lambda x: _theirs(x, True), logits)
    assert torch.equal(found[1], experts)
    torch.testing.assert_close(found[0], gates, rtol=THIRD, atol=0)
    torch.testing.assert_close(found[2], gradient, rtol=1e-5, atol=1e-6)
    best = sparse_mixer(logits, 2, EPS, is_training=False)[1]
    is_best = experts[:, 0] == best[:, 0]
    assert 0.2 < is_best.float().mean() < 0.9, "the draws must matter"
    assert (experts[:, 0] != experts[:, 1]).all()


def test_a_draw_has_its_share():
    """Many draws for one token: each expert as often as its share in the softmax over those that count."""
    logits = torch.tensor([1.0, 0.95, 0.9, 0.5]).expand(40_000, 4)
    _, experts = sparse_mixer(logits, 1, EPS, is_training=True)
    seen = torch.bincount(experts.flatten(), minlength=4) / len(logits)
    shares = torch.tensor([1.0, 0.95, 0.9]).softmax(-1)
    torch.testing.assert_close(seen, torch.cat([shares, torch.zeros(1)]), rtol=0, atol=0.012)


def test_the_router_takes_it():
    model = ModelConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, seq_length=8, num_experts=(NUM_EXPERTS,), topk=2,
        expert_interval=1, moe_router_score_function="sparsemixer", moe_sparsemixer_eps=EPS, moe_aux_loss_coeff=0.5,
    )  # fmt: skip
    router = Router(model, NUM_EXPERTS, ParallelContext.single())
    with torch.no_grad():
        router.weight.copy_(torch.rand(NUM_EXPERTS, 16) + 2)
    x = torch.rand(3, 8, 16)
    routing = router.eval().route(x)
    gates, experts = _theirs(router(x).view(-1, NUM_EXPERTS), False)
    assert torch.equal(routing.experts_nk, experts)
    torch.testing.assert_close(routing.gates_nk, gates, rtol=1e-6, atol=0)
    assert (gates < 0.7).any()
    # The loss is that of the softmax's probabilities, as of the other score functions.
    assert routing.statistics["load balancing loss"] > 0 and routing.loss.requires_grad
    drawn = [router.train().route(x).experts_nk for _ in range(2)]
    assert not torch.equal(*drawn)
    same = dataclasses.replace(model, moe_sparsemixer_eps=0.0)
    router.model = same
    assert torch.equal(router.train().route(x).experts_nk, experts)  # only the best one counts: nothing to draw
