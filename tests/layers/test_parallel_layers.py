"""Every tensor-parallel layer against plain torch written here: output, input gradient, weight gradients, in fp64."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

from harness.ranks import run_ranks
from megatron.config.model import ModelConfig
from megatron.layers.attention import Attention
from megatron.layers.block import Block
from megatron.layers.linear import ColumnLinear, RowLinear
from megatron.layers.mlp import Mlp
from megatron.layers.parameter import layouts_of, normal
from megatron.layers.vocabulary import OutputLayer, Vocabulary, WordEmbedding
from megatron.parallel.collectives import copy_to_tp, gather_from_tp
from megatron.parallel.context import ParallelContext, build_context
from megatron.parallel.rng import RandomStreams
from megatron.ucp.layout import Layout, ShardRank
from megatron.ucp.topology import Topology

HIDDEN, VOCABULARY = 24, 11
MODEL = ModelConfig(
    num_layers=2, hidden_size=HIDDEN, num_attention_heads=6, seq_length=5, hidden_dropout=0.0, attention_dropout=0.0
)
GROUPED = ModelConfig(
    num_layers=2,
    hidden_size=HIDDEN,
    num_attention_heads=6,
    num_key_value_heads=3,
    seq_length=5,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)


class _Column(ColumnLinear):
    def forward(self, x):
        return gather_from_tp(super().forward(x), self.context, _sizes(self.weight, 0))


class _Row(RowLinear):
    def forward(self, x):
        return super().forward(copy_to_tp(x, self.context).split(_sizes(self.weight, 1), -1)[self.context.tp_rank])


class _Output(OutputLayer):
    def forward(self, x):
        return self.vocabulary.gathered(super().forward(x))


def _sizes(weight, dim):
    size = weight.shard_rank.tp_size
    return [weight.atomic_layout.shard_shape(ShardRank(rank, size))[dim] for rank in range(size)]


def _layer(kind, context):
    streams = RandomStreams(1, context)
    vocabulary = Vocabulary(VOCABULARY, 16 if context.tp_size < 3 else 24, context)
    return {
        "column": lambda: _Column(HIDDEN, 7, context, normal(1.0)),
        "column-no-bias": lambda: _Column(HIDDEN, 7, context, normal(1.0), has_bias=False),
        "row": lambda: _Row(HIDDEN, 7, context, normal(1.0), unit=4),
        "attention": lambda: Attention(MODEL, context, streams),
        "attention-grouped": lambda: Attention(GROUPED, context, streams),
        "mlp": lambda: Mlp(MODEL, context),
        "block": lambda: Block(MODEL, context, streams),
        "embedding": lambda: WordEmbedding(vocabulary, HIDDEN, normal(1.0)),
        "output": lambda: _Output(vocabulary, HIDDEN, normal(1.0)),
    }[kind]().double()


def _attention(a, x, kv_heads=6):
    """Plain attention from the atomic weights, one head at a time."""
    b, s, h = x.shape
    d, group = h // 6, 6 // kv_heads
    q, k, v = (x @ a["query_key_value.weight"].T + a["query_key_value.bias"]).split(
        [6 * d, kv_heads * d, kv_heads * d], dim=-1
    )
    heads = []
    for head in range(6):
        own, shared = slice(head * d, head * d + d), slice(head // group * d, head // group * d + d)
        scores = q[..., own] @ k[..., shared].transpose(1, 2) / d**0.5
        scores = scores + torch.full((s, s), float("-inf"), dtype=x.dtype).triu(1)
        heads.append(torch.softmax(scores, -1) @ v[..., shared])
    return torch.cat(heads, -1) @ a["dense.weight"].T + a["dense.bias"]


def _mlp(a, x):
    y = x @ a["dense_h_to_4h.weight"].T + a["dense_h_to_4h.bias"]
    y = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    return y @ a["dense_4h_to_h.weight"].T + a["dense_4h_to_h.bias"]


def _norm(a, x, which):
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return y * a[f"{which}.weight"] + a[f"{which}.bias"]


def _within(a, prefix):
    return {name[len(prefix) + 1 :]: value for name, value in a.items() if name.startswith(prefix + ".")}


def _block(a, x):
    x = x + _attention(_within(a, "attention"), _norm(a, x, "input_norm"))
    return x + _mlp(_within(a, "mlp"), _norm(a, x, "post_attention_norm"))


REFERENCE = {
    "column": lambda a, x: F.linear(x, a["weight"], a["bias"]),
    "column-no-bias": lambda a, x: F.linear(x, a["weight"]),
    "row": lambda a, x: F.linear(x, a["weight"], a["bias"]),
    "attention": _attention,
    "attention-grouped": lambda a, x: _attention(a, x, kv_heads=3),
    "mlp": _mlp,
    "block": _block,
    "embedding": lambda a, x: F.embedding(x, a["weight"]),
    "output": lambda a, x: x @ a["weight"].T,
}


def _run(rank, world_size, kind, atoms, x, upstream, fault):
    context = build_context(Topology(tp_size=world_size)) if world_size > 1 else ParallelContext.single()
    layer = _layer(kind, context)
    for name, param in layer.named_parameters():
        layout = param.atomic_layout
        if fault == "qkv as one part" and name == "query_key_value.weight":
            layout = Layout.shard_v(layout.shape)
        param.data = layout.split(atoms[name], context.shard_rank)
    x = x.clone()
    if x.is_floating_point():
        x.requires_grad_()
    y = layer(x)
    y.backward(upstream)
    return y.detach(), x.grad, {name: param.grad for name, param in layer.named_parameters()}


def _case(kind):
    generator = torch.Generator().manual_seed(3)
    layouts = layouts_of(_layer(kind, ParallelContext.single()).named_parameters())
    atoms = {
        name: 0.5 * torch.randn(layout.shape, generator=generator, dtype=torch.float64)
        for name, layout in layouts.items()
    }
    x = torch.randn(2, 5, HIDDEN, generator=generator, dtype=torch.float64)
    if kind == "embedding":
        x = torch.tensor([[0, 1, 2, 9, 10], [10, 10, 3, 4, 7]])
    parameters = {name: atom.clone().requires_grad_() for name, atom in atoms.items()}
    x_plain = x.clone().requires_grad_(x.is_floating_point())
    y = REFERENCE[kind](parameters, x_plain)
    upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    y.backward(upstream)
    grads = {name: parameter.grad for name, parameter in parameters.items()}
    return (atoms, x, upstream), (y.detach(), x_plain.grad, grads)


def _run_all(rank, world_size, cases):
    return {kind: _run(rank, world_size, kind, *given, None) for kind, given in cases.items()}


@functools.cache
def _results(tp_size):
    """Of every kind, from one start of the ranks."""
    return run_ranks(tp_size, _run_all, {kind: _case(kind)[0] for kind in REFERENCE})


@pytest.mark.parametrize("tp_size", [1, 2, 3])
@pytest.mark.parametrize("kind", sorted(REFERENCE))
def test_layer_is_the_plain_one(kind, tp_size):
    _, (output, input_grad, weight_grads) = _case(kind)
    results = [result[kind] for result in _results(tp_size)]
    for rank_output, rank_input_grad, _ in results:
        torch.testing.assert_close(rank_output, output, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(rank_input_grad, input_grad, rtol=1e-9, atol=1e-10)
    context = ParallelContext(Topology(tp_size=tp_size))
    for name, param in _layer(kind, context).named_parameters():
        shards = {ShardRank(rank, tp_size): grads[name] for rank, (_, _, grads) in enumerate(results)}
        # merge also checks that replicated gradients are bitwise equal on all ranks
        merged = param.atomic_layout.merge(shards)
        torch.testing.assert_close(merged, weight_grads[name], rtol=1e-9, atol=1e-10)
        assert param.tensor_model_parallel == param.model_parallel == (param.atomic_layout.cuts != ())


def test_fault_a_fused_weight_cut_as_one_part_is_seen():
    given, (output, _, _) = _case("attention")
    results = run_ranks(2, _run, "attention", *given, "qkv as one part")
    assert (results[0][0] - output).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["embedding", "output"])
def test_padding_rows_get_no_gradient(kind):
    padding = torch.cat([result[kind][2]["weight"] for result in _results(2)])[VOCABULARY:]
    assert padding.shape[0] == 16 - VOCABULARY
    assert not padding.any()


def test_three_kv_heads_keep_their_query_heads_at_tp2():
    rows = [
        Attention(GROUPED, ParallelContext(Topology(tp_size=2), rank), None).query_key_value.weight.shape[0]
        for rank in range(2)
    ]
    assert rows == [(4 + 2 + 2) * 4, (2 + 1 + 1) * 4]


def test_attributes_survive_a_cast_as_deepspeed_does_it():
    layer = _layer("mlp", ParallelContext.single()).to(torch.bfloat16)
    assert set(layouts_of(layer.named_parameters())) == set(dict(layer.named_parameters()))
    assert copy.copy(layer.dense_h_to_4h.weight).dtype == torch.bfloat16
