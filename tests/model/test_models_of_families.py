"""Each family's model as a pipeline, on expert-parallel ranks and with activations cut, against one plain process."""

from __future__ import annotations

import functools

import pytest
import torch
from model.tiny_gpt import EXPERTS, FAMILIES, LLAMA, batch, build, config, merged, parameters

from harness.ranks import run_ranks
from megatron.config.parallel import ParallelConfig
from megatron.layers.router_ledger import RouterLedger
from megatron.model.build import build_model
from megatron.model.flops import flops_per_token, num_parameters
from megatron.model.gpt_pipe import entry_paths
from megatron.parallel.context import build_context
from megatron.parallel.rng import RandomStreams
from megatron.ucp.topology import Topology

NUM_MICRO_BATCHES, CLIP = 2, 0.5
MODELS = {
    **FAMILIES,
    "all at once": {
        **LLAMA, **EXPERTS, "num_experts": (4, 2), "num_layers": 4, "expert_interval": 2, "embed_layernorm": True,
        "add_bias_linear": True, "add_output_layer_bias": True, "qk_layernorm": True, "moe_aux_loss_coeff": 0.5,
        "moe_z_loss_coeff": 0.1, "moe_shared_expert_intermediate_size": 9, "position_embedding_type": "alibi",
        "moe_ffn_hidden_size": 13, "moe_train_capacity_factor": 0.5, "moe_min_capacity": 1,
    },
    "no positions": {"add_position_embedding": False},
}  # fmt: skip
"""num_experts: four experts in the second block, two in the fourth."""


def _micro_batches():
    return [tuple(part[i : i + 1] for part in batch(seed=3)) for i in range(NUM_MICRO_BATCHES)]


def _optimizer(model):
    """Two groups on every stage: plain DeepSpeed waits for a stage that has fewer, as one without experts does with
    `parameter_groups` (engine/engine.py makes up for it). As in test_training_step.py, Adam's default eps would blow
    rounding noise up to full steps."""
    groups = [
        {"params": [param for param in model.parameters() if param.is_decayed == is_decayed], "weight_decay": decay}
        for is_decayed, decay in ((True, 0.1), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-5)


@functools.cache
def _plain(name):
    """Loss, loss after a step, and the parameters before and after."""
    ledger = RouterLedger()
    ledger.scale = 1.0 / NUM_MICRO_BATCHES
    model, _, _ = build(Topology(), config(**MODELS[name]), False, ledger=ledger)
    before, optimizer = merged(*zip(parameters(model)), Topology()), _optimizer(model)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        total = 0.0
        for part in _micro_batches():
            loss = model(*part) / NUM_MICRO_BATCHES
            loss.backward()
            total += loss.item()
        losses.append(total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return losses, before, merged(*zip(parameters(model)), Topology())


def _pipelined(rank, world_size, names, router_loss=1.0):
    import deepspeed

    topology, found = Topology(pp_size=world_size), {}
    for name in names:
        ledger = RouterLedger()
        ledger.scale = router_loss / NUM_MICRO_BATCHES
        model, context, _ = build(topology, config(**MODELS[name]), True, ledger=ledger)
        before = parameters(model)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=_optimizer(model),
            config={
                "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": NUM_MICRO_BATCHES,
                "gradient_clipping": CLIP, "zero_optimization": {"stage": 1}, "steps_per_print": 10**9,
            },
        )  # fmt: skip
        items = [(tokens, (labels, mask)) for tokens, labels, mask in _micro_batches()]
        losses = [float(engine.train_batch(iter(items))) for _ in range(2)]
        found[name] = losses, before, parameters(engine.module), sorted(ledger.take_means())
    return found


@functools.cache
def _pipelines(pp_size):
    return run_ranks(pp_size, _pipelined, list(MODELS))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pp_size", [1, 2])
def test_a_pipeline_trains_as_the_plain_model(pp_size, name):
    """The same names, layouts and first values; the loss before and after a step; the parameters after two."""
    _check_pipeline(name, Topology(pp_size=pp_size), [result[name] for result in _pipelines(pp_size)])


def _check_pipeline(name, topology, results):
    losses, before, after = _plain(name)
    first, last = (merged(*zip(*(result[i] for result in results)), topology) for i in (1, 2))
    assert set(first) == set(last) == set(before)
    for param_name, atom in before.items():
        assert torch.equal(first[param_name], atom), param_name
        torch.testing.assert_close(last[param_name], after[param_name], rtol=0, atol=2e-5)
    for found, *_ in results:
        assert found == pytest.approx(losses, abs=2e-6)
    layers_seen = [layer for *_, seen in results for layer in seen]
    assert tuple(layers_seen) == config(**MODELS[name]).moe_layers


def test_fault_a_router_loss_of_another_scale_is_seen():
    results = run_ranks(2, _pipelined, ["all at once"], float(NUM_MICRO_BATCHES))
    with pytest.raises(AssertionError, match="not close"):
        _check_pipeline("all at once", Topology(pp_size=2), [result["all at once"] for result in results])


def test_entries_stand_where_their_parameters_are():
    for changes in MODELS.values():
        model = config(**changes)
        names = set(parameters(build(Topology(), model, False)[0])[0])
        paths = [path for path in entry_paths(model) if path is not None]
        assert all(any(name.startswith(path + ".") for path in paths) for name in names)


# -- first values -----------------------------------------------------------------------------------------------------


def _parameters(rank, world_size, topology, names):
    return {name: parameters(build(topology, config(**MODELS[name]), topology.pp_size > 1)[0]) for name in names}


@pytest.mark.parametrize(
    "topology",
    [
        Topology(tp_size=2), Topology(tp_size=4), Topology(dp_size=2, ep_size=2), Topology(dp_size=4, ep_size=2),
        Topology(pp_size=2, tp_size=2), Topology(pp_size=2, dp_size=2, ep_size=2),
    ],
    ids=lambda topology: str(topology).replace(" ", ""),
)  # fmt: skip
def test_first_values_are_bitwise_those_of_one_process(topology):
    names = [name for name in MODELS if topology.ep_size == 1 or config(**MODELS[name]).has_experts]
    results = run_ranks(topology.world_size, _parameters, topology, names)
    for name in names:
        expected = _plain(name)[1]
        found = merged(*zip(*(result[name] for result in results)), topology)
        assert set(found) == set(expected)
        for param_name, atom in expected.items():
            assert torch.equal(found[param_name], atom), param_name


@pytest.mark.parametrize("name", MODELS)
def test_num_parameters_is_what_a_model_has(name):
    assert sum(atom.numel() for atom in _plain(name)[1].values()) == num_parameters(config(**MODELS[name]))


def test_flops_of_experts_are_those_a_token_is_sent_to():
    dense = config(**LLAMA)
    model = config(**{**LLAMA, **EXPERTS, "moe_shared_expert_intermediate_size": 8})
    difference = 3 * (4 * 32 + 2 * 3 * 32 * 24 + 3 * 32 * 8 - 3 * 32 * 40)  # router, two experts, shared; not the MLP
    assert flops_per_token(model) - flops_per_token(dense) == 6 * difference
    more = config(**{**LLAMA, **EXPERTS, "moe_shared_expert_intermediate_size": 8, "num_experts": (8,)})
    assert flops_per_token(more) - flops_per_token(model) == 6 * 3 * 4 * 32


# -- expert parallelism, activations cut, sequences shared -------------------------------------------------------------


def _loss_and_grads(rank, world_size, topology, names, is_cut, fault=None):
    """Mean gradients as DeepSpeed takes them: of experts the sum over edp, of others that over dp x sp, by dp x sp."""
    context, found = build_context(topology, is_cut), {}
    for name in names:
        streams, parallel = RandomStreams(1, context), ParallelConfig(no_pipeline_parallel=True)
        model = build_model(config(**MODELS[name]), parallel, context, streams, seed=1234, ledger=RouterLedger())
        parts = [part.chunk(context.dp_size)[context.dp_rank].chunk(context.sp_size, 1)[context.sp_rank]
                 for part in batch(4, seed=3)]  # fmt: skip
        loss = model(*(part.contiguous() for part in parts))
        loss.backward()
        grads = {}
        for param_name, param in model.named_parameters():
            is_dealt = param.kind == "experts" and context.ep_size > 1
            group = context.edp_group if is_dealt else context.zero_group
            if group is not None:
                torch.distributed.all_reduce(param.grad, group=group)
            has_fault = is_dealt and fault == "experts divided by edp"
            grads[param_name] = param.grad / (context.edp_size if has_fault else context.zero_size)
        found[name] = loss.item(), grads, {n: p.atomic_layout for n, p in model.named_parameters()}
    return found


MIXTURES = ["Mixtral", "GLM-4.5", "all at once"]


@functools.cache
def _whole(names):
    return run_ranks(1, _loss_and_grads, Topology(), names, False)[0]


@pytest.mark.parametrize(
    ("topology", "is_cut", "names"),
    [
        (Topology(tp_size=2), True, tuple(MODELS)),
        (Topology(sp_size=2), False, tuple(MODELS)),
        (Topology(dp_size=2, ep_size=2), False, tuple(MIXTURES)),
        (Topology(dp_size=4, ep_size=2), False, tuple(MIXTURES)),
        (Topology(dp_size=2, ep_size=2, tp_size=2), True, tuple(MIXTURES)),
        (Topology(sp_size=2, ep_size=2), False, tuple(MIXTURES)),
    ],
    ids=lambda value: str(value).replace(" ", "") if isinstance(value, Topology) else None,
)
def test_mean_loss_and_gradients_are_those_of_one_process(topology, is_cut, names):
    results = run_ranks(topology.world_size, _loss_and_grads, topology, names, is_cut)
    for name in names:
        _check_gradients(name, topology, [result[name] for result in results])


def _check_gradients(name, topology, results):
    loss, grads, layouts = _whole(tuple(MODELS))[name]
    losses = [found for found, _, _ in results]
    assert sum(losses) / len(losses) == pytest.approx(loss, abs=2e-6)
    # For `merged`, ranks of sp are data parallel ranks: equal after the sum.
    as_dp = Topology(dp_size=topology.zero_size, tp_size=topology.tp_size, ep_size=topology.ep_size)
    found = merged([result[1] for result in results], [result[2] for result in results], as_dp)
    for param_name, grad in merged([grads], [layouts], Topology()).items():
        torch.testing.assert_close(found[param_name], grad, rtol=1e-4, atol=1e-5)


def test_fault_experts_divided_as_nothing_else_is_seen():
    topology = Topology(dp_size=2, ep_size=2)
    results = run_ranks(2, _loss_and_grads, topology, ("Mixtral",), False, "experts divided by edp")
    with pytest.raises(AssertionError, match="not close"):
        _check_gradients("Mixtral", topology, [result["Mixtral"] for result in results])


# -- recomputation, low precision -------------------------------------------------------------------------------------

RECOMPUTED = ["LLaMA 3", "Mixtral", "BLOOM", "all at once"]


def _with_dropout(rank, world_size, topology, is_cut):
    context, found = build_context(topology, is_cut), {}
    for name in RECOMPUTED:
        for granularity in (None, "full", "selective"):
            changes = {**MODELS[name], "hidden_dropout": 0.2, "attention_dropout": 0.3, "moe_router_jitter": 0.1}
            ledger, parallel = RouterLedger(), ParallelConfig(no_pipeline_parallel=True)
            model = build_model(
                config(**changes, recompute_granularity=granularity), parallel, context, RandomStreams(1, context),
                seed=1234, ledger=ledger,
            )  # fmt: skip
            loss = model(*batch(2, seed=3 + context.dp_rank))
            loss.backward()
            grads = [param.grad for param in model.parameters()]
            found[name, granularity] = loss.item(), grads, ledger.take_means()
    return found


@pytest.mark.parametrize(
    ("topology", "is_cut"), [(Topology(tp_size=2), True), (Topology(dp_size=2, ep_size=2), False)], ids=str
)
def test_recomputation_is_bitwise_with_dropout_and_jitter(topology, is_cut):
    for result in run_ranks(topology.world_size, _with_dropout, topology, is_cut):
        for name in RECOMPUTED:
            loss, grads, seen = result[name, None]
            assert tuple(sorted(seen)) == config(**MODELS[name]).moe_layers
            for granularity in ("full", "selective"):
                again, grads_again, seen_again = result[name, granularity]
                assert again == loss
                assert all(torch.equal(grad, other) for grad, other in zip(grads, grads_again))
                assert str(seen_again) == str(seen)


@pytest.mark.parametrize("name", MODELS)
def test_in_bf16_the_loss_is_nearly_that_of_fp32(name):
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build(Topology(), config(**MODELS[name]), False)[0].to(dtype)
        loss = model(*batch(seed=3))
        loss.backward()
        losses.append(loss.item())
        assert loss.dtype == torch.float32
        for param in model.parameters():
            assert param.grad.dtype == dtype and param.grad.isfinite().all()
    assert losses[1] == pytest.approx(losses[0], rel=2e-2) and losses[0] != losses[1]
