"""A resumed run whose samples come in another order says so, and why; one in the same order says nothing."""

from pathlib import Path

from harness.ranks import run_ranks
from matrix.recording import build, command_line
from megatron.checkpoint.restoring import changed_order


def _order(rank: int, world_size: int, argv: list[str]) -> dict:
    return dict(build(argv, rank, world_size).live.train_order)


def _order_of(data: Path, world_size: int = 1, **flags) -> dict:
    orders = run_ranks(world_size, _order, command_line(data, **flags))
    assert all(order == orders[0] for order in orders)
    return orders[0]


def test_order_does_not_depend_on_topology_or_micro_batch(data):
    reference = _order_of(data)
    assert changed_order(reference, _order_of(data, world_size=2, zero=1)) == []
    assert changed_order(reference, _order_of(data, world_size=2, pp=2, zero=1, micro_batch=2)) == []
    # Longer, but within the same number of epochs.
    assert changed_order(reference, _order_of(data, iters=5)) == []


def test_another_order_is_told_with_the_reason(data):
    reference = _order_of(data)
    lines = changed_order(reference, _order_of(data, seed=5))
    assert "another order" in lines[0] and lines[1:] == ["seed was 1234, is 5"]
    # So much longer that an epoch is added: Megatron's order depends on the number of epochs.
    lines = changed_order(reference, _order_of(data, iters=400, lr_decay_iters=400))
    assert "another order" in lines[0] and lines[1].startswith("num_samples was")


def test_a_source_that_does_not_say_its_order_is_told():
    assert changed_order(None, {"order_crc32": "0"}) == [
        "the Source does not say in which order its training samples came: it cannot be compared"
    ]
