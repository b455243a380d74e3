"""Activation checkpointing changes memory and time, and not one bit of a result, dropout included."""

import pytest
import torch
from model.tiny_gpt import batch, build, config

from harness.ranks import run_ranks
from megatron.model.gpt_pipe import PipelineRecomputeError, entry_paths
from megatron.model.recompute import Recompute
from megatron.ucp.topology import Topology

WAYS = {
    "off": {},
    "full": {"recompute_granularity": "full"},
    "uniform-2": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "block-2": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    "selective": {"recompute_granularity": "selective"},
}


def _losses_and_grads(topology, way, is_pipelined=False):
    model, context, _ = build(topology, config(hidden_dropout=0.2, attention_dropout=0.3, **WAYS[way]), is_pipelined)
    losses = []
    for seed in range(2):
        tokens, labels, mask = batch(seed=seed)
        if is_pipelined:
            loss = model.loss_fn(model(tokens), (labels, mask))
        else:
            loss = model(tokens, labels, mask)
        loss.backward()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        held_out = (
            model.loss_fn(model(tokens), (labels, mask)) if is_pipelined else model(tokens, labels, mask)
        ).item()
    return losses, held_out, {name: param.grad for name, param in model.named_parameters()}


def _all_ways(rank, world_size, is_pipelined):
    ways = [way for way in WAYS if not (is_pipelined and way == "uniform-2")]
    topology = Topology(tp_size=world_size)
    return {way: _losses_and_grads(topology, way, is_pipelined) for way in ways}


@pytest.mark.parametrize("tp_size, is_pipelined", [(1, False), (2, False), (1, True)], ids=["tp1", "tp2", "pipe"])
def test_bitwise_equal_with_dropout(tp_size, is_pipelined):
    for result in run_ranks(tp_size, _all_ways, is_pipelined):
        losses, held_out, grads = result["off"]
        assert losses[0] != losses[1] != held_out
        for way, (other_losses, other_held_out, other_grads) in result.items():
            assert (other_losses, other_held_out) == (losses, held_out), way
            for name, grad in grads.items():
                assert torch.equal(grad, other_grads[name]), (way, name)


def test_dropout_agrees_over_tp_where_it_must():
    first, second = (result["off"] for result in run_ranks(2, _all_ways, False))
    assert first[0] == second[0]
    for name in ("final_norm.weight", "layers.0.input_norm.bias", "embedding.position_embeddings.weight"):
        assert torch.equal(first[2][name], second[2][name])


def test_activations_are_not_kept():
    def bytes_kept(way):
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.numel() * tensor.element_size()
            return tensor

        model, _, _ = build(Topology(), config(hidden_dropout=0.2, attention_dropout=0.3, **WAYS[way]), False)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(*batch())
        return kept

    assert bytes_kept("full") < 0.5 * bytes_kept("off")
    assert bytes_kept("block-2") < bytes_kept("off")


@pytest.mark.parametrize(
    "way, expected",
    [
        ("off", [(0, 5, False)]),
        ("full", [(i, i + 1, True) for i in range(5)]),
        ("uniform-2", [(0, 2, True), (2, 4, True), (4, 5, True)]),
        ("block-2", [(0, 1, True), (1, 2, True), (2, 5, False)]),
        ("selective", [(0, 5, False)]),
    ],
)
def test_groups(way, expected):
    assert list(Recompute.of(config(**WAYS[way])).groups(5)) == expected


def test_groups_of_blocks_are_refused_in_a_pipeline():
    from megatron.model.gpt_pipe import _recomputed

    with pytest.raises(PipelineRecomputeError, match="--recompute-num-layers 2"):
        _recomputed(config(**WAYS["uniform-2"]))
    assert _recomputed(config(**WAYS["block-2"])) == [True, True, False]
    assert len(entry_paths(config())) == 3 + 4
