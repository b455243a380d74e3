"""EngineState describes engines that nothing of ours has built: plain deepspeed.initialize over a torch.nn.Module.

The truth is gathered with DeepSpeed's own accessors.
"""

from __future__ import annotations

import pytest
import torch
from ucp import test_ucp_stock_engines as stock

from harness.ranks import run_ranks
from megatron.checkpoint.state_digest import state_digests
from megatron.engine.engine_state import EngineState
from megatron.parallel.context import ParallelContext
from megatron.ucp.digest import digest_tensor
from megatron.ucp.layout import Layout
from megatron.ucp.topology import Topology

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
KINDS = {
    "zero0": (0, {}),
    "zero1": (1, {}),
    "zero2": (2, {}),
    "zero3": (3, {}),
    "zero1-offload": (1, OFFLOAD),
    "zero2-offload": (2, OFFLOAD),
    "zero3-offload": (3, OFFLOAD),
}


def _state(engine, rank: int, world_size: int) -> EngineState:
    names = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    return EngineState(
        engine,
        {name: Layout.unique(shape) for name, shape in names.items()},
        ParallelContext(Topology(dp_size=world_size), rank, zero_group=torch.distributed.group.WORLD),
        dict.fromkeys(names, (0,)),
    )


def _trained(rank: int, world_size: int, kind: str):
    """What is seen by DeepSpeed's accessors after three steps, our digests, and the loss of the fourth."""
    stage, zero = KINDS[kind]
    engine = stock._engine(
        stage, world_size, 0, True, 1e-2, {"zero_optimization": dict(zero), "zero_force_ds_cpu_optimizer": False}
    )
    for step in range(stock.STEPS):
        stock._step(engine, step, rank, world_size)
    seen = stock._seen(engine)
    digests = state_digests(_state(engine, rank, world_size))
    seen.loss = stock._step(engine, stock.STEPS, rank, world_size)
    return seen, digests


def _placed(rank: int, world_size: int, kind: str, truth: stock.Seen):
    """Digests of an engine of other weights after the truth was placed into it, and the loss of its next step."""
    stage, zero = KINDS[kind]
    engine = stock._engine(
        stage, world_size, 7, True, 1e-2, {"zero_optimization": dict(zero), "zero_force_ds_cpu_optimizer": False}
    )
    state = _state(engine, rank, world_size)
    state.make_states()
    for interval in state.intervals:
        for part in state.states_of(interval):
            flat = truth.state[interval.name, part.state].view(-1)
            for atomic, local, length in part.runs.tolist():
                part.values[local : local + length] = flat[atomic : atomic + length]
        state.set_step(interval.flat, stock.STEPS)
    state.refresh_weights()
    assert state.stale_weights() == []
    return state_digests(state), stock._step(engine, stock.STEPS, rank, world_size)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_engines_state_is_described_and_placed(kind):
    seen, digests = run_ranks(2, _trained, kind)[0]
    truth = {}
    for (name, state), tensor in seen.state.items():
        truth.setdefault(name, {})[state] = digest_tensor(tensor, name=name, state=state).hex()
    assert digests == truth
    for target, world_size in ((kind, 2), ("zero1", 3), ("zero3", 1)):
        for placed, loss in run_ranks(world_size, _placed, target, seen):
            assert placed == truth and loss == pytest.approx(seen.loss, abs=1e-6)


def test_planted_fault_one_bit_of_one_moment():
    seen, digests = run_ranks(2, _trained, "zero3")[0]
    values = seen.state["out.weight", "exp_avg"].view(-1)
    values[-1] = torch.nextafter(values[-1], torch.tensor(1.0))
    placed, _ = run_ranks(2, _placed, "zero3", seen)[0]
    differing = [
        (name, state) for name in digests for state in digests[name] if placed[name][state] != digests[name][state]
    ]
    assert differing == [("out.weight", "exp_avg")]
