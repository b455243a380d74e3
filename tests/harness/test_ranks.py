"""The harness itself: results by rank, and every kind of failure is reported with the rank that caused it."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from harness.ranks import RankFailure, run_ranks


def _sum_of_ranks(rank, world_size, offset):
    value = torch.tensor([float(rank + offset)])
    dist.all_reduce(value)
    return value.item(), os.getpid(), "x" * 300_000


def test_results_by_rank_in_fresh_processes():
    results = run_ranks(3, _sum_of_ranks, 1)
    assert [value for value, _, _ in results] == [6.0, 6.0, 6.0]
    again = run_ranks(3, _sum_of_ranks, 1)
    assert not {pid for _, pid, _ in results} & {pid for _, pid, _ in again}


def _fail(rank, world_size, how):
    if rank == 1:
        if how == "raise":
            raise ValueError("planted")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    dist.barrier()


@pytest.mark.parametrize(
    "how, told", [("raise", "rank 1 raised: ValueError: planted"), ("kill", "rank 1 died"), ("hang", "rank 1 hung")]
)
def test_failure_names_the_rank(how, told):
    with pytest.raises(RankFailure, match=told) as caught:
        run_ranks(2, _fail, how, timeout=6 if how == "hang" else 60)
    assert not isinstance(caught.value, AssertionError)
