"""The parts of LLaMA, Qwen3, BLOOM and GPT-NeoX against plain torch written here, wherever they may be cut, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness.ranks import run_ranks
from layers import places
from layers.places import HIDDEN, LENGTH, NUM_WORDS, Kind, Place
from megatron.config.model import ModelConfig
from megatron.config.model_checks import legal_sequence_sizes, legal_tensor_sizes
from megatron.layers import attention as attention_module
from megatron.layers import heads as heads_module
from megatron.layers import norm as norm_module
from megatron.layers.attention import Attention
from megatron.layers.block import Block
from megatron.layers.embedding import EmbeddingTail
from megatron.layers.heads import Heads
from megatron.layers.mlp import Mlp
from megatron.layers.norm import RmsNorm
from megatron.layers.parameter import normal
from megatron.layers.router_ledger import RouterLedger
from megatron.layers.vocabulary import OutputLayer, Vocabulary, WordEmbedding
from megatron.parallel.context import ParallelContext
from megatron.parallel.rng import RandomStreams
from megatron.ucp.errors import LayoutError, ReplicaMismatchError
from megatron.ucp.topology import Topology


def _model(num_queries=6, num_keys=None, head_dim=4, **changes):
    """By default heads are as wide as hidden / heads, 24 / 6."""
    return ModelConfig(
        num_layers=2, hidden_size=HIDDEN, num_attention_heads=num_queries, num_key_value_heads=num_keys,
        kv_channels=head_dim, seq_length=LENGTH, hidden_dropout=0.0, attention_dropout=0.0, vocab_size=NUM_WORDS,
        make_vocab_size_divisible_by=8, **changes,
    )  # fmt: skip


BARE = {"add_bias_linear": False}
LLAMA = {**BARE, "normalization": "rmsnorm", "swiglu": True, "ffn_hidden_size": 13, "position_embedding_type": "rope"}
ATTENTIONS = {
    "heads 9/3": _model(9, 3),
    "heads 6/1": _model(6, 1),
    "heads 6/2": _model(6, 2),
    "heads 10/2": _model(10, 2),  # on 3 and 4 ranks some rank's queries belong to both keys, unequally
    "heads 10/2, all of LLaMA's": _model(10, 2, 8, qk_layernorm=True, **LLAMA),
    "wide heads": _model(6, 3, 10),
    "query and key norm": _model(6, 3, 8, qk_layernorm=True),
    "rope": _model(6, 3, 8, position_embedding_type="rope", rope_theta=100.0),
    "long rope": _model(
        6,
        3,
        8,
        position_embedding_type="rope",
        rope_theta=100.0,
        rope_scaling_type="longrope",
        rope_short_factors=(1.0,) * 4,
        rope_long_factors=(2.0,) * 4,
        rope_original_max_position_embeddings=LENGTH - 1,
    ),
    "rope of a part": _model(6, 6, 8, position_embedding_type="rope", rotary_percent=0.25, rope_theta=100.0),
    "alibi": _model(12, 12, 4, position_embedding_type="alibi"),
    "alibi 12/4": _model(12, 4, 4, position_embedding_type="alibi"),
    "alibi 12/2": _model(12, 2, 4, position_embedding_type="alibi"),
    "alibi, recomputed": _model(12, 12, 4, position_embedding_type="alibi", recompute_granularity="selective"),
    "no bias": _model(**BARE),
    "bias of q, k, v": _model(6, 2, add_qkv_bias=True, **BARE),
    "bias of attention": _model(6, 2, add_attention_bias=True, **BARE),
}
BLOCKS = {
    "LLaMA's block": _model(6, 3, 8, **LLAMA),
    "LLaMA's block, one key": _model(6, 1, 8, **LLAMA),
    "GPT-NeoX's block": _model(
        6, 6, 8, use_parallel_residual=True, position_embedding_type="rope", rotary_percent=0.25
    ),
    "BLOOM's block": _model(12, 12, 4, position_embedding_type="alibi", recompute_granularity="selective"),
}
MLPS = {
    "SwiGLU": _model(swiglu=True, ffn_hidden_size=13, **BARE),
    "SwiGLU with biases": _model(swiglu=True, ffn_hidden_size=13),
    "exact GELU": _model(ffn_hidden_size=13, exact_gelu=True),
    "exact GELU without biases": _model(ffn_hidden_size=13, exact_gelu=True, **BARE),
    "GELU without biases": _model(ffn_hidden_size=13, **BARE),
}
EMBEDDINGS = {
    "embedding norm": _model(embed_layernorm=True, add_position_embedding=False),
    "embedding norm and positions": _model(embed_layernorm=True, normalization="rmsnorm"),
}

# -- plain torch ------------------------------------------------------------------------------------------------------


def _rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def _layer_norm(x, weight, bias):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * weight + bias


def _norm(a, x, name):
    if f"{name}.bias" in a:
        return _layer_norm(x, a[f"{name}.weight"], a[f"{name}.bias"])
    return _rms(x, a[f"{name}.weight"])


def _linear(a, x, name):
    y = x @ a[f"{name}.weight"].T
    return y + a[f"{name}.bias"] if f"{name}.bias" in a else y


def _turned(x_bsd, dim, theta, slower):
    """Complex numbers (i, i + dim / 2) times e^(i angle), its parts rounded to fp32 as the layers' table is."""
    angles = torch.outer(
        torch.arange(x_bsd.shape[1]).double() / slower,
        torch.tensor([theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64),
    )
    turn = torch.complex(angles.cos().float().double(), angles.sin().float().double())
    pairs = torch.complex(x_bsd[..., : dim // 2], x_bsd[..., dim // 2 : dim]) * turn
    return torch.cat([pairs.real, pairs.imag, x_bsd[..., dim:]], -1)


def _rates(num_heads):
    assert num_heads == 12  # 8 of the series of 8, 4 of that of 16
    exponents = [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]
    return [torch.tensor(2.0**-exponent).double() for exponent in exponents]


def _attention(model, a, x):
    """One head at a time."""
    n, g, d, s = model.num_attention_heads, model.num_key_value_heads, model.kv_channels, x.shape[1]
    q, k, v = _linear(a, x, "query_key_value").split([n * d, g * d, g * d], dim=-1)
    distance = (torch.arange(s)[:, None] - torch.arange(s)[None, :]).double()
    heads = []
    for head in range(n):
        key = head // (n // g)
        q_bsd, k_bsd, v_bsd = (part[..., i * d : i * d + d] for part, i in ((q, head), (k, key), (v, key)))
        if model.qk_layernorm:
            q_bsd, k_bsd = _rms(q_bsd, a["query_norm.weight"]), _rms(k_bsd, a["key_norm.weight"])
        if model.position_embedding_type == "rope":
            dim = int(d * model.rotary_percent)
            slower = 2.0 if model.rope_scaling_type == "longrope" else 1.0  # its sequences are long ones
            q_bsd, k_bsd = (_turned(part, dim, model.rope_theta, slower) for part in (q_bsd, k_bsd))
        scores = q_bsd @ k_bsd.transpose(1, 2) / math.sqrt(d)
        if model.position_embedding_type == "alibi":
            scores = scores - _rates(n)[head] * distance
        heads.append(scores.masked_fill(distance < 0, -math.inf).softmax(-1) @ v_bsd)
    return _linear(a, torch.cat(heads, -1), "dense")


def _mlp(model, a, x):
    y = _linear(a, x, "dense_h_to_4h")
    if model.swiglu:
        gate, up = y[..., : model.ffn_hidden_size], y[..., model.ffn_hidden_size :]
        return _linear(a, gate * torch.sigmoid(gate) * up, "dense_4h_to_h")
    if model.exact_gelu:
        return _linear(a, 0.5 * y * (1 + torch.erf(y / math.sqrt(2))), "dense_4h_to_h")
    return _linear(a, 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))), "dense_4h_to_h")


def _within(a, prefix):
    return {name.removeprefix(prefix + "."): value for name, value in a.items() if name.startswith(prefix + ".")}


def _block(model, a, x):
    after_attention = x + _attention(model, _within(a, "attention"), _norm(a, x, "input_norm"))
    if model.use_parallel_residual:
        return after_attention + _mlp(model, _within(a, "mlp"), _norm(a, x, "post_attention_norm"))
    return after_attention + _mlp(model, _within(a, "mlp"), _norm(a, after_attention, "post_attention_norm"))


def _embedding(model, a, tokens):
    x = F.embedding(tokens, a["words.weight"])
    if "tail.position_embeddings.weight" in a:
        x = x + a["tail.position_embeddings.weight"]
    return _norm(a, x, "tail.norm")


# -- ours -------------------------------------------------------------------------------------------------------------


class _Embedding(nn.Module):
    def __init__(self, model, context):
        super().__init__()
        vocabulary = Vocabulary(NUM_WORDS, model.padded_vocab_size(context.tp_size), context)
        self.words = WordEmbedding(vocabulary, HIDDEN, normal(1.0))
        self.tail = EmbeddingTail(model, context, RandomStreams(1, context))

    def forward(self, tokens_bs):
        return self.tail(self.words(tokens_bs))


class _Output(OutputLayer):
    def forward(self, x_bsh):
        return self.vocabulary.gathered(super().forward(x_bsh))


def _kinds():
    kinds = {}
    for name, model in ATTENTIONS.items():
        kinds[name] = Kind(
            lambda context, model=model: Attention(model, context, RandomStreams(1, context)),
            lambda a, x, model=model: _attention(model, a, x),
        )
    for name, model in BLOCKS.items():
        kinds[name] = Kind(
            lambda context, model=model: Block(model, context, RandomStreams(1, context)),
            lambda a, x, model=model: _block(model, a, x),
        )
    for name, model in MLPS.items():
        kinds[name] = Kind(
            lambda context, model=model: Mlp(model, context), lambda a, x, model=model: _mlp(model, a, x)
        )
    for name, model in EMBEDDINGS.items():
        kinds[name] = Kind(
            lambda context, model=model: _Embedding(model, context),
            lambda a, x, model=model: _embedding(model, a, x),
            takes_tokens=True,
        )
    kinds["RMSNorm"] = Kind(lambda context: RmsNorm(HIDDEN, context, 1e-5), lambda a, x: _rms(x, a["weight"]))
    kinds["output layer with a bias"] = Kind(
        lambda context: _Output(
            Vocabulary(NUM_WORDS, 8 * context.tp_size if context.tp_size > 1 else 16, context),
            HIDDEN, normal(1.0), has_bias=True,
        ),
        lambda a, x: x @ a["weight"].T + a["bias"], num_features=NUM_WORDS, has_whole_output=True,
    )  # fmt: skip
    return kinds


KINDS = _kinds()
PLACES = (
    Place(), Place(tp=2), Place(tp=3), Place(tp=4), Place(tp=2, cut=True), Place(tp=3, cut=True),
    Place(tp=4, cut=True), Place(sp=2), Place(sp=3), Place(tp=2, sp=2), Place(tp=2, sp=2, cut=True),
)  # fmt: skip


def _is_legal(name, place):
    model = {**ATTENTIONS, **BLOCKS}.get(name)
    return model is None or place.sp in legal_sequence_sizes(model, place.tp)


def _kinds_at(place):
    return [name for name in KINDS if _is_legal(name, place)]


def _run(rank, world_size, place, given_by_kind, fault=None):
    if fault is not None:
        FAULTS[fault](place)
    return places.run(rank, place, KINDS, given_by_kind)


def _results(place, names, fault=None):
    given_by_kind = {name: places.given(KINDS[name]) for name in names}
    return run_ranks(place.topology.world_size, _run, place, given_by_kind, fault)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_layers_are_the_plain_ones(place):
    names = _kinds_at(place)
    results = _results(place, names)
    for name in names:
        places.check(KINDS[name], place, [result[name] for result in results])


def test_enough_cases_are_run():
    cases = {(name, str(place)) for place in PLACES for name in _kinds_at(place)}
    assert len(cases) >= 230, len(cases)
    for case in (("alibi", "sp2"), ("alibi", "tp2sp2cut"), ("heads 6/1", "tp4cut"), ("heads 9/3", "tp3")):
        assert case in cases


# -- faults -----------------------------------------------------------------------------------------------------------


def _kv_gradients_not_summed(place):
    class Lonely:
        def __getattr__(self, name):
            return (lambda *a, **k: None) if name == "all_reduce" else getattr(torch.distributed, name)

    heads_module.dist = Lonely()


def _head_norms_not_summed(place):
    norm_module.copy_to_tp = lambda x, context: x


def _every_rank_has_the_first_slopes(place):
    slopes = attention_module.alibi_slopes
    attention_module.alibi_slopes = lambda n, device: slopes(n, device)[:6].repeat(2)


def _every_ranks_part_is_a_sequence(place):
    table = attention_module.rotary_table
    attention_module.rotary_table = lambda rotary, start, length, of_length, device: table(
        rotary, start, length, length, device
    )


def _positions_from_zero(place):
    table = attention_module.rotary_table
    attention_module.rotary_table = lambda rotary, start, *rest: table(rotary, 0, *rest)


FAULTS = {
    "kv gradients not summed": _kv_gradients_not_summed,
    "head norms not summed": _head_norms_not_summed,
    "every rank has the first slopes": _every_rank_has_the_first_slopes,
    "positions from zero": _positions_from_zero,
    "every rank's part is a sequence": _every_ranks_part_is_a_sequence,
}


@pytest.mark.parametrize(
    ("fault", "name", "place"),
    [
        ("kv gradients not summed", "heads 6/1", Place(tp=2)),
        ("head norms not summed", "query and key norm", Place(tp=2)),
        ("every rank has the first slopes", "alibi", Place(tp=2)),
        ("every rank has the first slopes", "alibi", Place(sp=2)),
        ("positions from zero", "rope", Place(sp=3)),
        ("every rank's part is a sequence", "long rope", Place(sp=3)),
    ],
    ids=str,
)
def test_fault_is_seen(fault, name, place):
    results = [result[name] for result in _results(place, [name], fault)]
    told = "copies that must be equal differ" if fault == "head norms not summed" else "Tensor-likes are not close"
    with pytest.raises((AssertionError, ReplicaMismatchError), match=told):
        places.check(KINDS[name], place, results)


# -- which heads a rank has -------------------------------------------------------------------------------------------


def _heads(model, tp_size):
    return [Heads.of(model, ParallelContext(Topology(tp_size=tp_size), rank)) for rank in range(tp_size)]


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(9, 3), (6, 1), (6, 2), (10, 2), (12, 4), (12, 12), (8, 4)])
def test_every_query_head_has_one_rank_and_its_own_key(num_queries, num_keys, tp_size):
    found = []
    for heads in _heads(_model(num_queries, num_keys), tp_size):
        first_key, stop_key = heads.keys_here
        keys = heads.key_of_query
        if keys is None:
            group, rest = divmod(heads.num_queries_here, stop_key - first_key)
            assert rest == 0  # scaled_dot_product_attention's enable_gqa
            keys = [index // group for index in range(heads.num_queries_here)]
        found += [(heads.first_query + i, first_key + key) for i, key in enumerate(keys)]
        assert heads.sizes_here[0] == heads.num_queries_here * 4
    assert found == [(query, query // (num_queries // num_keys)) for query in range(num_queries)]


def test_only_a_rank_whose_queries_are_of_unequal_groups_copies_keys():
    assert [heads.key_of_query for heads in _heads(_model(10, 2), 4)] == [None, (0, 0, 1), None, None]
    assert [heads.key_of_query for heads in _heads(_model(9, 3), 2)] == [None, None]
    assert [heads.keys_here for heads in _heads(_model(6, 1), 4)] == [(0, 1)] * 4


@pytest.mark.parametrize(("num_keys", "tp_size"), [(1, 4), (2, 3), (3, 2), (3, 4)])
def test_each_element_of_the_fused_weight_has_one_owner(num_keys, tp_size):
    model = _model(6, num_keys)
    contexts = [ParallelContext(Topology(tp_size=tp_size), rank) for rank in range(tp_size)]
    weights = [Attention(model, context, None).query_key_value.weight for context in contexts]
    assert sum(weight.shape[0] for weight in weights) == (6 + 2 * num_keys) * 4
    assert all(weight.tensor_model_parallel for weight in weights)


@pytest.mark.parametrize(
    "model",
    [_model(6, 1, 3), _model(6, 6), _model(12, 2, 4, ffn_hidden_size=5), _model(9, 3, swiglu=True, ffn_hidden_size=7),
     _model(6, 2, num_experts=(4,), expert_interval=1, moe_ffn_hidden_size=4, **BARE),
     _model(6, 2, num_experts=(4,), expert_interval=1, moe_shared_expert_intermediate_size=3)],
    ids=lambda model: f"{model.num_attention_heads}/{model.num_key_value_heads}",
)  # fmt: skip
def test_legal_tensor_sizes_are_those_that_can_be_built(model):
    legal = legal_tensor_sizes(model)
    for tp_size in range(1, max(legal) + 1):
        for rank in range(tp_size):
            Block(model, ParallelContext(Topology(tp_size=tp_size), rank), None, ledger=RouterLedger())
    with pytest.raises((LayoutError, IndexError), match="ranks|index"):  # IndexError: the last rank has no query head
        Block(model, ParallelContext(Topology(tp_size=max(legal) + 1), max(legal)), None, ledger=RouterLedger())
