"""All-gathers by broadcasts give torch's own bytes, and are what DeepSpeed's steps call."""

from __future__ import annotations

import deepspeed.comm.comm as deepspeed_comm
import pytest
import torch
import torch.distributed as dist

from harness.ranks import RankFailure, run_ranks
from matrix.recording import build, command_line
from megatron.engine.gloo_gathers import gather_by_broadcasts
from megatron.training.loop import fit


def _gather_both_ways(rank: int, world_size: int) -> list[str]:
    """What differs."""
    members = [0, 2]
    part = dist.new_group(members)
    gather_by_broadcasts()
    gather_by_broadcasts()
    differing = []
    for name, group, size in (("world", None, world_size), ("part", part, len(members))):
        if group is not None and rank not in members:
            continue
        index = dist.get_rank(group)
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            own = torch.arange(1000).mul(rank + 1).to(dtype)
            expected = torch.empty(size * 1000, dtype=dtype)
            dist.all_gather_into_tensor(expected, own, group=group)
            for is_view in (False, True):
                for async_op in (False, True):
                    found = torch.zeros(size, 1000, dtype=dtype)
                    given = found[index].copy_(own) if is_view else own
                    handle = deepspeed_comm.all_gather_into_tensor(found, given, group=group, async_op=async_op)
                    if async_op:
                        handle.wait()
                        assert handle.is_completed()
                    if not torch.equal(found.view(-1), expected):
                        differing.append(f"{name}, {dtype}, a view: {is_view}, async: {async_op}")
    return differing


def test_they_give_the_bytes_of_torchs_own():
    assert run_ranks(3, _gather_both_ways) == [[], [], []]


def _gather_what_does_not_fit(rank: int, world_size: int) -> None:
    gather_by_broadcasts()
    own = torch.ones(10)
    for output in (torch.zeros(19), torch.zeros(20, dtype=torch.bfloat16)):
        with pytest.raises((RuntimeError, ValueError), match=r"(?i)size|type|expected"):
            deepspeed_comm.all_gather_into_tensor(output, own)


def test_tensors_that_do_not_fit_are_refused():
    run_ranks(2, _gather_what_does_not_fit)


def _not_gloos_own(*_, **__):
    raise RuntimeError("gathered by gloo's own")


def _train(rank: int, world_size: int, argv: list[str], is_ours: bool) -> None:
    run = build(argv, rank, world_size)
    if is_ours:
        deepspeed_comm.cdb.all_gather_function._other = _not_gloos_own
    else:
        deepspeed_comm.cdb.all_gather_function = _not_gloos_own
    fit(run)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_deepspeeds_steps_gather_so(zero, data):
    argv = command_line(data, zero=zero, iters=2)
    run_ranks(2, _train, argv, True)
    with pytest.raises(RankFailure, match=r"gathered by gloo's own"):  # the control: its steps do gather
        run_ranks(2, _train, argv, False)
