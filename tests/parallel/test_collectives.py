"""Forward and backward of the three tensor-parallel operations, against their definitions."""

import pytest
import torch

from harness.ranks import run_ranks
from megatron.parallel import collectives
from megatron.parallel.context import ParallelContext, build_context
from megatron.ucp.topology import Topology

OPERATIONS = ("copy_to_tp", "reduce_from_tp", "gather_from_tp")


def _apply(rank, world_size, operation, inputs, upstreams, sizes):
    context = build_context(Topology(tp_size=world_size))
    x = inputs[rank].clone().requires_grad_()
    extra = {"sizes": sizes} if operation == "gather_from_tp" else {}
    y = getattr(collectives, operation)(x, context, **extra)
    other = y * 1.0  # a second branch that gets the same gradient tensor: it must not be written to
    gradient = upstreams[rank].clone()
    (y + other.detach()).backward(gradient)
    assert torch.equal(gradient, upstreams[rank])
    return y.detach(), x.grad


@pytest.mark.parametrize("sizes", [[2, 2], [3, 2, 2]], ids=["tp2", "tp3-uneven"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_forward_and_backward(operation, sizes):
    size, total = len(sizes), sum(sizes)
    generator = torch.Generator().manual_seed(0)

    def draw(width):
        return torch.randn(2, width, generator=generator, dtype=torch.float64)

    narrow, wide = [draw(n) for n in sizes], [draw(total) for _ in sizes]
    inputs, upstreams = {
        "copy_to_tp": (wide, [draw(total) for _ in sizes]),
        "reduce_from_tp": (wide, [draw(total) for _ in sizes]),
        "gather_from_tp": (narrow, wide),
    }[operation]
    starts = [sum(sizes[:r]) for r in range(size)]
    results = run_ranks(size, _apply, operation, inputs, upstreams, sizes)
    for rank, (output, grad) in enumerate(results):

        def own(tensor, rank=rank):
            return tensor[:, starts[rank] : starts[rank] + sizes[rank]]

        expected = {
            "copy_to_tp": lambda rank=rank, own=own: (inputs[rank], sum(upstreams)),
            "reduce_from_tp": lambda rank=rank, own=own: (sum(inputs), upstreams[rank]),
            "gather_from_tp": lambda rank=rank, own=own: (torch.cat(inputs, -1), own(upstreams[rank])),
        }[operation]()
        torch.testing.assert_close(output, expected[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(grad, expected[1], rtol=0, atol=1e-12)


def test_all_are_the_identity_on_one_rank():
    x = torch.ones(2)
    assert all(getattr(collectives, operation)(x, ParallelContext.single()) is x for operation in OPERATIONS)


def test_even_sizes_follow_array_split():
    assert collectives.even_sizes(7, 3) == [3, 2, 2]
    assert collectives.even_sizes(2, 4) == [1, 1, 0, 0]
