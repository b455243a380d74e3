"""The first atomic parameters are a function of the seed and the model alone."""

import pytest
import torch
from model.tiny_gpt import batch, build, config, merged, parameters

from harness.ranks import run_ranks
from megatron.layers.parameter import UndeclaredParameterError, initialize
from megatron.model.build import parameter_groups, parameter_layouts
from megatron.model.flops import flops_per_token, num_parameters
from megatron.model.gpt import GPT
from megatron.parallel.context import ParallelContext
from megatron.parallel.rng import RandomStreams
from megatron.ucp.topology import Topology


def _parameters(rank, world_size, topology, model, is_pipelined):
    return parameters(build(topology, model, is_pipelined)[0])


def _atoms(topology, model, is_pipelined=False):
    if topology.world_size == 1 and not is_pipelined:
        results = [parameters(build(topology, model, False)[0])]
    else:
        results = run_ranks(topology.world_size, _parameters, topology, model, is_pipelined)
    return merged(*zip(*results), topology)


@pytest.mark.parametrize(
    "topology, untied, is_pipelined",
    [
        (Topology(tp_size=2), False, False),
        (Topology(tp_size=4), True, False),
        (Topology(), False, True),
        (Topology(pp_size=2), False, True),
        (Topology(pp_size=2, tp_size=2), True, True),
        (Topology(dp_size=2), False, False),
    ],
    ids=lambda value: str(value).replace(" ", "") if isinstance(value, Topology) else str(value),
)
def test_atomic_parameters_are_bitwise_those_of_one_process(topology, untied, is_pipelined):
    model = config(untie_embeddings_and_output_weights=untied)
    expected, found = _atoms(Topology(), model), _atoms(topology, model, is_pipelined)
    assert set(found) == set(expected)
    for name, atom in expected.items():
        assert torch.equal(found[name], atom), name
    assert sum(atom.numel() for atom in found.values()) == num_parameters(model)


def test_values_have_the_declared_distributions():
    model = config(hidden_size=128, num_attention_heads=4)
    atoms = _atoms(Topology(), model)
    for name, atom in atoms.items():
        if name.endswith("bias"):
            assert not atom.any()
        elif "norm" in name:
            assert (atom == 1).all()
        else:
            scaled = name.endswith(("dense.weight", "dense_4h_to_h.weight"))
            expected = 0.1 / 6**0.5 if scaled else 0.1
            assert atom.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(atom.mean().item()) < 0.01
    blocks = [atoms[f"layers.{i}.mlp.dense_h_to_4h.weight"] for i in range(3)]
    assert not torch.equal(blocks[0], blocks[1])


def test_another_seed_gives_other_values():
    model = config()
    one, two = (build(Topology(), model, False, seed)[0] for seed in (1, 2))
    assert not torch.equal(one.layers[0].mlp.dense_h_to_4h.weight, two.layers[0].mlp.dense_h_to_4h.weight)


def test_undeclared_parameters_are_all_named():
    model, _, _ = build(Topology(), config(), False)
    model.layers[1].mlp.gate = torch.nn.Linear(2, 2)
    for ask in (parameter_layouts, lambda m: parameter_groups(m, 0.1), lambda m: initialize(m.named_parameters(), 1)):
        with pytest.raises(UndeclaredParameterError, match=r"2 parameter.*layers\.1\.mlp\.gate\.bias, layers\.1\.mlp"):
            ask(model)


def test_groups_split_matrices_from_the_rest():
    model, _, _ = build(Topology(), config(), False)
    decay, no_decay = parameter_groups(model, 0.1)
    assert (decay["name"], decay["weight_decay"], no_decay["name"], no_decay["weight_decay"]) == (
        "decay",
        0.1,
        "no_decay",
        0.0,
    )
    assert {param.dim() for param in decay["params"]} == {2}
    assert {param.dim() for param in no_decay["params"]} == {1}
    assert len(decay["params"]) + len(no_decay["params"]) == len(list(model.parameters()))
    model.requires_grad_(False)
    model.final_norm.requires_grad_(True)
    (only,) = parameter_groups(model, 0.1)
    assert only["name"] == "no_decay" and len(only["params"]) == 2


def test_experts_and_the_output_layers_bias_have_groups_of_their_own():
    model, _, _ = build(
        Topology(),
        config(
            num_experts=(4,), expert_interval=1, untie_embeddings_and_output_weights=True, add_output_layer_bias=True
        ),
        False,
    )
    names = {param: name for name, param in model.named_parameters()}
    groups = {group["name"]: group for group in parameter_groups(model, 0.1, has_decoupled=True)}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "decay": 0.1,
        "no_decay": 0.0,
        "decoupled": 0.1,
        "decoupled_no_decay": 0.0,
        "experts": 0.1,
        "experts_no_decay": 0.0,
    }
    assert [names[param] for param in groups["decoupled_no_decay"]["params"]] == ["lm_head.bias"]
    assert {names[param].rpartition(".")[2] for param in groups["experts"]["params"]} == {
        "dense_h_to_4h",
        "dense_4h_to_h",
    }
    assert {names[param].rpartition(".")[2] for param in groups["experts_no_decay"]["params"]} == {
        "bias_h_to_4h",
        "bias_4h_to_h",
    }


def test_experts_without_a_ledger_are_refused():
    """Their losses would be scaled by nobody."""
    alone = ParallelContext.single()
    with pytest.raises(TypeError, match="no RouterLedger"):
        GPT(config(num_experts=(4,), expert_interval=1), alone, RandomStreams(1, alone))


def test_flops_are_counted_by_hand():
    model = config()
    # per block: qkv 32x96, dense 32x32, up 32x128, down 128x32; 2 x 12 x 32 for scores and values; output 32 x 101
    forward = 2 * (3 * (32 * 96 + 32 * 32 + 2 * 32 * 128 + 2 * 12 * 32) + 32 * 101)
    assert flops_per_token(model) == 3 * forward
    # Of weights that are not trained no gradient is computed; attention's products are no weights.
    products = 2 * 3 * 2 * 12 * 32
    assert flops_per_token(config(lora_rank=2)) == 2 * forward + products


@pytest.mark.parametrize(
    "changes",
    [
        {"add_bias_linear": False},
        {"num_key_value_heads": 2},
        {"ffn_hidden_size": 48, "max_position_embeddings": 99},
        {"lora_rank": 3, "num_key_value_heads": 2, "ffn_hidden_size": 48},
        {
            "lora_rank": 3,
            "swiglu": True,
            "ffn_hidden_size": 48,
            "lora_target_modules": ("v_proj", "gate_proj", "o_proj"),
        },
        {"lora_rank": 3, "swiglu": True, "num_key_value_heads": 2, "lora_fused": True},
    ],
    ids=str,
)
def test_num_parameters_is_what_a_model_has(changes):
    model = config(**changes)
    built, _, _ = build(Topology(), model, False)
    assert sum(layout.numel for layout in parameter_layouts(built).values()) == num_parameters(model)
    assert num_parameters(model) != num_parameters(config())
    tokens, labels, mask = batch()
    built(tokens, labels, mask).backward()
    assert all(param.grad is not None for param in built.parameters())
