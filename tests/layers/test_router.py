"""The router against plain formulas: choices, gates, losses by sequence, capacity, jitter; and the ledger."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from harness.ranks import run_ranks
from layers.plain_moe import route
from megatron.config.model import ModelConfig
from megatron.layers.router import Router
from megatron.layers.router_ledger import RouterLedger
from megatron.parallel.context import ParallelContext, build_context
from megatron.parallel.rng import RandomStreams
from megatron.ucp.topology import Topology

HIDDEN, LENGTH, NUM_EXPERTS = 16, 10, 6
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def _model(**changes):
    given = {"moe_aux_loss_coeff": 0.7, "moe_z_loss_coeff": 0.2, "topk": 2, **changes}
    return ModelConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        seq_length=LENGTH,
        num_experts=(NUM_EXPERTS,),
        expert_interval=1,
        **given,
    )


def _given(num_samples=4):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(NUM_EXPERTS, HIDDEN, generator=generator, dtype=torch.float64)
    x = 0.7 * torch.randn(num_samples, LENGTH, HIDDEN, generator=generator, dtype=torch.float64)
    return weight, x


def _router(model, context=None):
    router = Router(model, NUM_EXPERTS, context or ParallelContext.single()).double()
    router.weight.data = _given()[0].clone()
    return router


def _grads(loss, gates, router, x):
    """Of a loss in which each gate counts differently."""
    upstream = torch.linspace(-1, 1, gates.numel(), dtype=gates.dtype).view(gates.shape)
    return torch.autograd.grad(loss + (gates * upstream).sum(), [router, x])


@pytest.mark.parametrize(
    ("score", "normalize", "topk"), itertools.product(["softmax", "sigmoid"], [True, False], [1, 2, 4])
)
@pytest.mark.parametrize("factor", [None, 0.5])
def test_routing_is_the_plain_formulas(score, normalize, topk, factor):
    model = _model(
        moe_router_score_function=score,
        moe_normalize_topk=normalize,
        topk=topk,
        moe_train_capacity_factor=factor,
        moe_min_capacity=1,
    )
    weight, x = _given()
    weight.requires_grad_(), x.requires_grad_()
    router = _router(model)
    own = x.detach().clone().requires_grad_()
    routing, truth = router.route(own), route(model, weight, x)
    assert routing.experts_nk.view(4, LENGTH, topk).tolist() == truth.experts
    assert (routing.experts_nk == -1).any() == (factor is not None)
    torch.testing.assert_close(routing.gates_nk.view_as(truth.gates), truth.gates, **CLOSE)
    loss = 0.7 * truth.balance + 0.2 * truth.z
    torch.testing.assert_close(routing.loss, loss, **CLOSE)
    expected = _grads(loss, truth.gates, weight, x)
    for found, grad in zip(_grads(routing.loss, routing.gates_nk.view_as(truth.gates), router.weight, own), expected):
        torch.testing.assert_close(found, grad, **CLOSE)
    seen = routing.statistics
    assert seen["tokens"].sum() == 4 * LENGTH * topk
    assert seen["load balancing loss"].item() == pytest.approx(truth.balance.item(), rel=1e-6)
    dropped = (routing.experts_nk == -1).double().mean().item()
    assert seen["dropped"].item() == pytest.approx(dropped, abs=1e-6)


def test_even_use_has_a_load_balancing_loss_of_one():
    router = _router(_model(topk=1))
    router.weight.data = torch.eye(NUM_EXPERTS, HIDDEN, dtype=torch.float64)
    x = torch.eye(HIDDEN, dtype=torch.float64)[:NUM_EXPERTS].unsqueeze(0)  # each expert's own token
    assert router.route(x).statistics["load balancing loss"].item() == pytest.approx(1.0)
    x = 50.0 * x[:, :1].expand(1, NUM_EXPERTS, HIDDEN)  # all tokens to the first expert, and surely
    assert router.route(x).statistics["load balancing loss"].item() == pytest.approx(NUM_EXPERTS)


@pytest.mark.parametrize("factor", [None, 0.5])
def test_grouping_into_micro_batches_changes_nothing(factor):
    model = _model(moe_train_capacity_factor=factor, moe_min_capacity=1)
    router, (_, x) = _router(model), _given()
    whole, singly = router.route(x), [router.route(x[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.stack([routing.loss for routing in singly]).mean(), whole.loss, **CLOSE)
    assert torch.equal(torch.cat([routing.experts_nk for routing in singly]), whole.experts_nk)


def _chunk(rank, world_size, model):
    context = build_context(Topology(sp_size=world_size))
    own = _given()[1].chunk(world_size, 1)[rank].clone().requires_grad_()
    router = _router(model, context)
    routing = router.route(own)
    grads = torch.autograd.grad(routing.loss, [router.weight, own])
    return routing.experts_nk.view(4, -1, model.topk), routing.loss.detach(), grads


@pytest.mark.parametrize("factor", [None, 0.6])
def test_chunks_of_a_sequence_are_routed_as_the_whole(factor):
    """With the same choices kept; the mean over ranks of the loss, and of the router's gradient, is the whole's."""
    model = _model(moe_train_capacity_factor=factor, moe_min_capacity=1, topk=3)
    router, x = _router(model), _given()[1].requires_grad_()
    whole = router.route(x)
    weight_grad, x_grad = torch.autograd.grad(whole.loss, [router.weight, x])
    results = run_ranks(2, _chunk, model)
    assert torch.equal(torch.cat([experts for experts, _, _ in results], 1), whole.experts_nk.view(4, LENGTH, 3))
    torch.testing.assert_close(sum(loss for _, loss, _ in results) / 2, whole.loss.detach(), **CLOSE)
    torch.testing.assert_close(sum(grads[0] for *_, grads in results) / 2, weight_grad, **CLOSE)
    torch.testing.assert_close(torch.cat([grads[1] for *_, grads in results], 1) / 2, x_grad, **CLOSE)


def test_fault_a_loss_over_the_micro_batch_depends_on_the_grouping():
    """What the loss would be, were its two means taken over all sequences at once."""
    router, (_, x) = _router(_model(moe_z_loss_coeff=0.0)), _given()
    as_one_sequence = router.route(x.reshape(1, 4 * LENGTH, HIDDEN)).loss
    assert abs(as_one_sequence - router.route(x).loss) > 1e-3


def test_capacity_in_evaluation():
    _, x = _given()

    def num_dropped(is_training, **changes):
        router = _router(_model(moe_min_capacity=1, **changes)).train(is_training)
        return int((router.route(x).experts_nk == -1).sum())

    assert num_dropped(True, moe_train_capacity_factor=0.5) > 0
    both = {"moe_train_capacity_factor": 0.5, "moe_eval_capacity_factor": float(NUM_EXPERTS)}
    assert num_dropped(True, **both) > num_dropped(False, **both) == 0
    assert num_dropped(False, moe_train_capacity_factor=0.5) == num_dropped(True, moe_train_capacity_factor=0.5)
    assert num_dropped(True, moe_eval_capacity_factor=0.5) == 0 < num_dropped(False, moe_eval_capacity_factor=0.5)
    assert num_dropped(True, moe_train_capacity_factor=0.5, moe_token_dropping=False) == 0
    assert num_dropped(False, moe_eval_capacity_factor=0.5, moe_token_dropping=False) == 0


def test_the_least_capacity():
    _, x = _given()
    counts = [
        int((_router(_model(moe_train_capacity_factor=0.01, moe_min_capacity=least)).route(x).experts_nk >= 0).sum())
        for least in (1, 2)
    ]
    assert counts[0] < counts[1] <= 2 * NUM_EXPERTS * 4


def _jittered(rank, world_size, cut):
    context = build_context(Topology(tp_size=world_size), cut)
    streams = RandomStreams(3, context)
    streams.residual_dropout(torch.ones(4, 4), 0.5)  # where activations are cut, tp ranks draw differently
    router = _router(_model(moe_router_jitter=0.2), context)
    x = _given()[1]
    found = [router.route(x).gates_nk.detach() for _ in range(2)]
    router.eval()
    return [*found, router.route(x).gates_nk.detach()]


@pytest.mark.parametrize("cut", [False, True])
def test_jitter_is_equal_on_tp_ranks_and_only_in_training(cut):
    first, second = run_ranks(2, _jittered, cut)
    plain = _router(_model())
    x = _given()[1]
    assert torch.equal(plain.route(x).gates_nk, plain.route(x).gates_nk)
    for one, other in zip(first, second):
        assert torch.equal(one, other)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[2], plain.route(x).gates_nk)


def test_choices_are_made_in_fp32():
    """bf16 tokens, and weights that differ by less than bf16 tells."""
    model = dataclasses.replace(_model(topk=1))
    router = Router(model, NUM_EXPERTS, ParallelContext.single())
    router.weight.data = torch.ones(NUM_EXPERTS, HIDDEN)
    router.weight.data[3] += 1e-3
    routing = router.route(torch.ones(1, LENGTH, HIDDEN, dtype=torch.bfloat16))
    assert routing.experts_nk.unique().tolist() == [3] and routing.gates_nk.dtype == torch.float32


# -- the ledger -------------------------------------------------------------------------------------------------------


def _attached(router, ledger, x, layer=1):
    return ledger.attached(x * 1.0, router.route(x), layer)


def test_the_loss_comes_with_the_ledgers_scale_whatever_comes_back():
    router, (_, x) = _router(_model()), _given()
    (expected,) = torch.autograd.grad(router.route(x).loss, router.weight)
    for scale, upstream in ((1.0, 1.0), (0.25, 1.0), (1024.0 / 8, 0.0)):
        ledger = RouterLedger()
        ledger.scale = scale
        own = x.clone().requires_grad_()
        y = _attached(router, ledger, own)
        assert torch.equal(y, own)
        (grad,) = torch.autograd.grad((y * upstream).sum(), router.weight)
        torch.testing.assert_close(grad, scale * expected, **CLOSE)


def test_statistics_are_means_over_micro_batches_since_the_last_call():
    router, ledger, (_, x) = _router(_model()), RouterLedger(), _given()
    routings = [router.route(x[i : i + 1]) for i in range(4)]
    for i in range(4):
        _attached(router, ledger, x[i : i + 1], layer=i % 2).sum().backward()
    seen = ledger.take_means()
    assert sorted(seen) == [0, 1]
    for name in ("load balancing loss", "z loss", "entropy", "dropped"):
        for layer in (0, 1):
            expected = sum(routings[i].statistics[name] for i in (layer, layer + 2)) / 2
            assert seen[layer][name].item() == pytest.approx(expected.item(), rel=1e-6)
    assert seen[0]["tokens"].sum() == LENGTH * 2
    assert ledger.take_means() == {}


def test_evaluation_is_not_written_down():
    router, ledger, (_, x) = _router(_model()).eval(), RouterLedger(), _given()
    with torch.no_grad():
        _attached(router, ledger, x)
    assert ledger.take_means() == {}
