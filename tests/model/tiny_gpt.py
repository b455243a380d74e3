"""A GPT small enough for every test, built on this rank from a fixed seed.

model = build(rank, topology, config(untied=True), is_pipelined=False)
atoms = merged([shards(model) for each rank], topology)
"""

import dataclasses

import torch

from megatron.config.model import ModelConfig
from megatron.config.parallel import ParallelConfig
from megatron.model.build import build_model, parameter_layouts
from megatron.parallel.context import ParallelContext, build_context
from megatron.parallel.rng import RandomStreams
from megatron.ucp.layout import ShardRank

VOCABULARY = 101
"""Not divisible by anything: every tp size pads it."""


def config(**changes):
    model = ModelConfig(
        num_layers=3, hidden_size=32, num_attention_heads=4, seq_length=12, max_position_embeddings=16,
        vocab_size=VOCABULARY, make_vocab_size_divisible_by=8, hidden_dropout=0.0, attention_dropout=0.0,
        init_method_std=0.1,
    )  # fmt: skip
    return dataclasses.replace(model, **changes)


def build(topology, model, is_pipelined, seed=1234):
    """Collective over the world, if it has more than one rank. Returns the model and its random streams."""
    context = build_context(topology) if torch.distributed.is_initialized() else ParallelContext.single()
    streams = RandomStreams(seed, context)
    parallel = ParallelConfig(
        tensor_model_parallel_size=topology.tp_size,
        pipeline_model_parallel_size=topology.pp_size,
        no_pipeline_parallel=not is_pipelined,
    )
    return build_model(model, parallel, context, streams, seed), context, streams


def batch(num_samples=2, seed=0, length=12):
    """tokens, labels, loss mask; the mask leaves out some positions, differently in each sample."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (num_samples, length + 1), generator=generator)
    mask = (torch.rand(num_samples, length, generator=generator) > 0.3).float()
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask


def shards(model, what=lambda param: param.detach().clone()):
    return {name: what(param) for name, param in model.named_parameters()}


def merged(shards_by_rank, layouts_by_rank, topology):
    """Atomic tensors of the whole model. Layout.merge raises where replicas differ; stages' copies are compared."""
    atoms = {}
    for rank_shards, layouts in zip(shards_by_rank, layouts_by_rank):
        assert set(rank_shards) == set(layouts)
    for pp in range(topology.pp_size):
        for dp in range(topology.dp_size):
            ranks = [topology.rank_of(pp=pp, dp=dp, tp=tp) for tp in range(topology.tp_size)]
            for name, layout in layouts_by_rank[ranks[0]].items():
                parts = {ShardRank(tp, topology.tp_size): shards_by_rank[rank][name] for tp, rank in enumerate(ranks)}
                atom = layout.merge(parts)
                assert name not in atoms or torch.equal(atoms[name], atom), f"copies of {name} differ"
                atoms[name] = atom
    return atoms


def parameters(model):
    return shards(model), parameter_layouts(model)
