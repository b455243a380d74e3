"""Two streams: who shares which, that they do not disturb each other, and that they can be put back."""

import torch
import torch.nn.functional as F

from megatron.parallel.context import ParallelContext
from megatron.parallel.rng import RandomStreams, derived_seed
from megatron.ucp.topology import Topology


def _draws(rank, topology):
    streams = RandomStreams(7, ParallelContext(topology, rank))
    with streams.fork():
        parallel = torch.rand(4)
    return torch.rand(4), parallel


def test_default_is_shared_over_tp_and_differs_over_dp_and_pp():
    topology = Topology(tp_size=2, dp_size=2, pp_size=2)
    default, parallel = zip(*(_draws(rank, topology) for rank in range(8)))
    for rank in range(0, 8, 2):
        assert torch.equal(default[rank], default[rank + 1])
    distinct = {tuple(draw.tolist()) for draw in default + parallel}
    assert len(distinct) == 4 + 8  # one default stream per (pp, dp), one tensor-parallel stream per rank


def test_fork_leaves_the_default_stream_alone():
    streams = RandomStreams(7, ParallelContext.single())
    expected = torch.rand(2), torch.rand(2)
    streams = RandomStreams(7, ParallelContext.single())
    first = torch.rand(2)
    with streams.fork():
        a = torch.rand(100)
    with streams.fork():
        b = torch.rand(100)
    assert torch.equal(first, expected[0]) and torch.equal(torch.rand(2), expected[1])
    assert not torch.equal(a, b)


def test_state_puts_both_streams_back():
    streams = RandomStreams(7, ParallelContext.single())

    def draw():
        with streams.fork():
            parallel = torch.rand(3)
        return torch.cat([torch.rand(3), parallel])

    draw()
    state = streams.state_dict()
    assert all(value.dtype == torch.uint8 for value in state.values())
    expected = draw()
    with streams.preserved():
        assert torch.equal(draw(), draw()) is False
    streams.load_state_dict(state)
    assert torch.equal(draw(), expected)
    other = RandomStreams(8, ParallelContext.single())
    assert not torch.equal(draw(), expected)
    other.load_state_dict(state)
    streams = other
    assert torch.equal(draw(), expected)


def test_checkpointed_replays_both_streams():
    streams = RandomStreams(7, ParallelContext.single())
    weight = torch.ones(50, requires_grad=True)

    def function(x):
        y = F.dropout(x * weight, 0.5)
        with streams.fork():
            y = F.dropout(y * weight, 0.5)
        return (y * weight).sin()

    state = streams.state_dict()
    results = []
    for run in (function, lambda x: streams.checkpointed(function, x)):
        streams.load_state_dict(state)
        weight.grad = None
        y = run(torch.full((50,), 0.3))
        y.sum().backward()
        results.append((y.detach(), weight.grad, torch.rand(2), streams.state_dict()["tensor_parallel"]))
    for plain, checkpointed in zip(*results):
        assert torch.equal(plain, checkpointed)
    assert results[0][1].abs().sum() > 0


def test_derived_seeds_differ():
    seeds = [derived_seed(1, "a", 2), derived_seed(1, "a", 3), derived_seed(2, "a", 2), derived_seed(1, "b", 2)]
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**63 for seed in seeds)
