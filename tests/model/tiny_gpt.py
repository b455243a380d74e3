"""A GPT small enough for every test, built on this rank from a fixed seed.

model = build(rank, topology, config(untied=True), is_pipelined=False)
atoms = merged([shards(model) for each rank], topology)
"""

import dataclasses

import torch

from megatron.config.model import ModelConfig
from megatron.config.parallel import ParallelConfig
from megatron.layers.router_ledger import RouterLedger
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


LLAMA = {
    "normalization": "rmsnorm", "swiglu": True, "ffn_hidden_size": 40, "add_bias_linear": False,
    "position_embedding_type": "rope", "num_key_value_heads": 2, "untie_embeddings_and_output_weights": True,
    "rope_theta": 500.0,
}  # fmt: skip
EXPERTS = {"num_experts": (4,), "topk": 2, "expert_interval": 1, "moe_ffn_hidden_size": 24, "moe_aux_loss_coeff": 0.0}
FAMILIES = {
    "LLaMA": LLAMA,
    "LLaMA, tied": {**LLAMA, "untie_embeddings_and_output_weights": False},
    "LLaMA 3": {
        **LLAMA, "rope_scaling_type": "llama3", "rope_scaling_factor": 8.0, "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0, "rope_original_max_position_embeddings": 64,
    },
    "Qwen3": {**LLAMA, "qk_layernorm": True, "kv_channels": 16},
    "Mixtral": {**LLAMA, **EXPERTS},
    "Qwen3-MoE": {**LLAMA, **EXPERTS, "qk_layernorm": True, "moe_normalize_topk": False},
    "GLM-4.5": {
        **LLAMA, **EXPERTS, "num_layers": 2, "expert_interval": 2, "moe_router_score_function": "sigmoid",
        "moe_shared_expert_intermediate_size": 48, "rotary_percent": 0.5,
    },
    "BLOOM": {
        "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6, "ffn_hidden_size": 192,
        "position_embedding_type": "alibi", "embed_layernorm": True,
    },
    "GPT-NeoX": {
        "hidden_size": 64, "kv_channels": 16, "ffn_hidden_size": 80, "use_parallel_residual": True,
        "position_embedding_type": "rope", "rotary_percent": 0.25, "untie_embeddings_and_output_weights": True,
    },
}  # fmt: skip
"""What is changed of the GPT's configuration, derived sizes too. GLM-4.5: sigmoid scores and a shared expert, as
DeepSeek-V3, and one block without experts before one with."""


def build(topology, model, is_pipelined, seed=1234, ledger=None):
    """Collective over the world, if it has more than one rank. Returns the model and its random streams."""
    context = build_context(topology) if torch.distributed.is_initialized() else ParallelContext.single()
    streams = RandomStreams(seed, context)
    parallel = ParallelConfig(
        tensor_model_parallel_size=topology.tp_size,
        pipeline_model_parallel_size=topology.pp_size,
        no_pipeline_parallel=not is_pipelined,
    )
    return build_model(model, parallel, context, streams, seed, ledger=ledger or RouterLedger()), context, streams


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
        for edp in range(topology.edp_size):
            dps = range(edp * topology.ep_size, (edp + 1) * topology.ep_size)
            for name, layout in layouts_by_rank[topology.rank_of(pp=pp, dp=dps[0])].items():
                # Experts are whole on the ranks of ep together, everything else on each of them.
                for together in [dps] if layout.is_cut_over("ep") else [[dp] for dp in dps]:
                    parts = {
                        ShardRank(tp, topology.tp_size, ep, len(together)): shards_by_rank[
                            topology.rank_of(pp=pp, dp=dp, tp=tp)
                        ][name]
                        for tp in range(topology.tp_size)
                        for ep, dp in enumerate(together)
                    }
                    atom = layout.merge(parts)
                    assert name not in atoms or torch.equal(atoms[name], atom), f"copies of {name} differ"
                    atoms[name] = atom
    return atoms


def parameters(model):
    return shards(model), parameter_layouts(model)
