"""The MoE layer wherever it may be cut against plain torch on all tokens, in fp64.

Weight gradients of experts are summed over the ranks that hold the same experts, all others over dp and sp: what
DeepSpeed does, before it divides both by the number of ranks that have tokens.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from harness.ranks import run_ranks
from layers import places
from layers.places import HIDDEN, LENGTH, Kind, Place
from layers.plain_moe import moe
from megatron.config.model import ModelConfig
from megatron.layers import experts as experts_module
from megatron.layers import moe as moe_module
from megatron.layers.experts import grouped_linear
from megatron.layers.moe import Dispatch, MoeMlp
from megatron.layers.router_ledger import RouterLedger
from megatron.parallel.context import ParallelContext, build_context
from megatron.parallel.rng import RandomStreams
from megatron.ucp.topology import Topology

BARE, GATED = {"add_bias_linear": False}, {"add_bias_linear": False, "swiglu": True}


def _model(num_experts=8, topk=2, **changes):
    given = {"moe_ffn_hidden_size": 7, "moe_aux_loss_coeff": 0.3, "init_method_std": 0.5, **changes}
    return ModelConfig(
        num_layers=2, hidden_size=HIDDEN, num_attention_heads=6, seq_length=LENGTH, hidden_dropout=0.0,
        attention_dropout=0.0, num_experts=(num_experts,), topk=topk, expert_interval=1, **given,
    )  # fmt: skip


MODELS = {
    "GELU with biases": _model(),
    "exact GELU": _model(exact_gelu=True),
    "SwiGLU (Mixtral)": _model(**GATED),
    "SwiGLU with biases": _model(swiglu=True, moe_shared_expert_intermediate_size=9),
    "sigmoid, shared expert (DeepSeek)": _model(
        moe_router_score_function="sigmoid", moe_shared_expert_intermediate_size=5, topk=3, **GATED
    ),
    "as they are (OLMoE)": _model(topk=4, moe_normalize_topk=False, moe_z_loss_coeff=0.2, **GATED),
    "top-1 with a capacity (Switch)": _model(topk=1, moe_train_capacity_factor=1.0, moe_min_capacity=1, **BARE),
    "capacity": _model(num_experts=4, topk=2, moe_train_capacity_factor=0.5, moe_min_capacity=1),
    "crowded": _model(num_experts=8, topk=2, **GATED),
    "crowded, with biases": _model(num_experts=8, topk=2),
}


def _crowd(atoms, x):
    """All tokens to experts 0 and 1: other ep ranks have nothing to compute."""
    x[..., 0] = 1.0
    atoms["router.weight"][:, 0] = -30.0
    atoms["router.weight"][:2, 0] = torch.tensor([8.0, 9.0], dtype=torch.float64)


def _layer(model, context):
    ledger = RouterLedger()
    # Each of these ranks has the mean over its own tokens.
    ledger.scale = 1.0 / context.zero_size
    return MoeMlp(model, 0, context, ledger)


KINDS = {
    name: Kind(
        lambda context, model=model: _layer(model, context),
        lambda a, x, model=model: moe(model, a, x),
        **({"adjust": _crowd} if "crowded" in name else {}),
    )
    for name, model in MODELS.items()
}
PLACES = (
    Place(), Place(tp=2), Place(tp=3), Place(tp=2, cut=True), Place(tp=3, cut=True), Place(dp=2), Place(sp=2),
    Place(dp=2, ep=2), Place(dp=4, ep=2), Place(dp=4, ep=4), Place(sp=2, ep=2), Place(sp=2, dp=2, ep=4),
    Place(sp=2, dp=2, ep=2), Place(tp=2, dp=2, ep=2), Place(tp=2, dp=2, ep=2, cut=True),
    Place(tp=3, dp=2, ep=2, cut=True), Place(tp=2, sp=2, ep=2, cut=True),
)  # fmt: skip


def _run(rank, world_size, place, given_by_kind, fault=None):
    if fault is not None:
        FAULTS[fault](rank)
    return places.run(rank, place, KINDS, given_by_kind)


def _results(place, names, fault=None):
    given_by_kind = {name: places.given(KINDS[name]) for name in names}
    return run_ranks(place.topology.world_size, _run, place, given_by_kind, fault, timeout=60)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_layer_is_the_plain_one(place):
    names = [name for name, model in MODELS.items() if model.num_experts[0] % place.ep == 0]
    results = _results(place, names)
    for name in names:
        places.check(KINDS[name], place, [result[name] for result in results])


def test_the_crowd_leaves_an_ep_rank_without_tokens():
    """What the kind is there for."""
    atoms, x, _ = places.given(KINDS["crowded"])
    chosen = (x @ atoms["router.weight"].T).topk(2, -1).indices
    assert set(chosen.flatten().tolist()) == {0, 1}


# -- faults -----------------------------------------------------------------------------------------------------------


def _gates_not_summed(rank):
    whole = moe_module.copy_to_tp
    moe_module.copy_to_tp = lambda x, context: x if x.dim() == 2 else whole(x, context)


def _tokens_not_summed(rank):
    whole = moe_module.copy_to_tp
    moe_module.copy_to_tp = lambda x, context: x if x.dim() == 3 else whole(x, context)


def _experts_renumbered(rank):
    """Those of the first rank are taken in reverse."""
    plain = experts_module.grouped_linear
    if rank == 0:
        experts_module.grouped_linear = lambda x, weight, bias, counts: plain(
            x, weight[[1, 0, *range(2, len(weight))]], bias, counts
        )


def _bias_not_divided(rank):
    experts_module.gather_rows = lambda w, context, sizes: 1.001 * w


FAULTS = {
    "gates not summed": _gates_not_summed,
    "tokens not summed": _tokens_not_summed,
    "experts renumbered": _experts_renumbered,
    "biases scaled": _bias_not_divided,
}


@pytest.mark.parametrize(
    ("fault", "place"),
    [
        ("gates not summed", Place(tp=2)),
        ("tokens not summed", Place(tp=2)),
        ("experts renumbered", Place(dp=2, ep=2)),
        ("biases scaled", Place()),
    ],
    ids=str,
)
def test_fault_is_seen(fault, place):
    name = "GELU with biases"
    results = [result[name] for result in _results(place, [name], fault)]
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        places.check(KINDS[name], place, results)


# -- no tokens, recomputation, statistics -----------------------------------------------------------------------------


def _recomputed(rank, world_size, is_recomputed):
    """Of each rank, the input's gradient and what the ledger has seen; half the ranks have no rows."""
    context = build_context(Topology(dp_size=world_size, ep_size=world_size))
    streams = RandomStreams(1, context)
    atoms, x, upstream = places.given(KINDS["crowded"])
    ledger = RouterLedger()
    ledger.scale = 0.25
    layer = MoeMlp(MODELS["crowded"], 1, context, ledger).double()
    for name, param in layer.named_parameters():
        param.data = param.atomic_layout.split(atoms[name], context.shard_rank)
    for sample in range(2):  # two micro batches
        own = x[sample : sample + 1].clone().requires_grad_()
        y = streams.checkpointed(layer, own) if is_recomputed else layer(own)
        y.backward(upstream[sample : sample + 1])
    grads = [own.grad, *(param.grad for param in layer.parameters())]
    seen = ledger.take_means()
    layer.eval()
    with torch.no_grad():
        layer(own)
    return grads, seen, ledger.take_means()


def test_recomputation_changes_nothing_and_counts_nothing_twice():
    plain, again = (run_ranks(2, _recomputed, is_on, timeout=60) for is_on in (False, True))
    for (grads, seen, later), (grads_again, seen_again, _) in zip(plain, again):
        for grad, grad_again in zip(grads, grads_again):
            assert torch.equal(grad, grad_again)
        assert list(seen) == [1] and later == {}
        # A mean over the two micro batches of one sequence of 12, each token with two choices.
        assert seen[1]["tokens"].tolist() == [12, 12, 0, 0, 0, 0, 0, 0]
        assert {name: value.tolist() for name, value in seen[1].items()} == {
            name: value.tolist() for name, value in seen_again[1].items()
        }
    nothing_here = plain[1][0]
    assert all(grad is not None for grad in nothing_here)


# -- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 9], [0, 0, 0, 0], [2, 3, 4, 0]], ids=str)
@pytest.mark.parametrize("width", [16, 7])
def test_grouped_linear_is_each_experts_own(counts, width, dtype):
    """16 features are aligned, and torch's grouped_mm takes them; of 7 there is a loop."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(counts), width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(4, 24, width, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(4, 24, generator=generator).to(dtype).requires_grad_()
    y = grouped_linear(x, weight, bias, counts)
    upstream = torch.randn(y.shape, generator=generator).to(dtype)
    y.backward(upstream)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    start = 0
    for expert, count in enumerate(counts):
        rows = slice(start, start + count)
        torch.testing.assert_close(y[rows], F.linear(x[rows], weight[expert], bias[expert]), **close)
        torch.testing.assert_close(bias.grad[expert], upstream[rows].sum(0), **close)
        torch.testing.assert_close(x.grad[rows], upstream[rows] @ weight[expert], **close)
        torch.testing.assert_close(weight.grad[expert], upstream[rows].T @ x[rows], **close)
        assert count or not weight.grad[expert].any()
        start += count


def test_both_ways_of_grouped_linear_are_taken(monkeypatch):
    taken = []
    plain = F.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *a, **k: taken.append(1) or plain(*a, **k))
    weight = torch.ones(2, 24, 16)
    grouped_linear(torch.ones(3, 16), weight, None, [1, 2])
    assert len(taken) == 1
    for x, other in ((torch.ones(0, 16), weight), (torch.ones(3, 7), torch.ones(2, 24, 7))):
        grouped_linear(x, other, None, [0, x.shape[0]])
    grouped_linear(torch.ones(3, 16).double(), weight.double(), None, [1, 2])
    assert len(taken) == 1


def test_dropped_choices_are_not_sent():
    context = ParallelContext.single()
    experts_nk = torch.tensor([[2, -1], [0, 2], [-1, -1]])
    dispatch = Dispatch(experts_nk, 3, context)
    assert dispatch.counts_here == [1, 0, 2]
    assert dispatch.tokens.tolist() == [1, 0, 1]
    x = torch.tensor([[1.0], [10.0], [100.0]])
    gates = torch.tensor([[0.5, 9.0], [2.0, 0.25], [7.0, 7.0]])
    rows = dispatch.to_experts(x)
    assert rows.flatten().tolist() == [10.0, 1.0, 10.0]
    assert dispatch.from_experts(rows, gates).flatten().tolist() == [0.5, 22.5, 0.0]
