"""Ranks, groups and what DeepSpeed is told of them."""

import pytest
import torch
import torch.distributed as dist

from harness.ranks import RankFailure, run_ranks
from megatron.parallel.context import ParallelContext, build_context
from megatron.parallel.mpu import Mpu
from megatron.ucp.topology import Topology


def _sums(rank, world_size, topology):
    context = build_context(topology)
    mpu = Mpu(context)
    sums = {}
    for axis in ("tensor_model", "data", "pipeline_model"):
        value = torch.tensor([2.0**rank])
        dist.all_reduce(value, group=getattr(mpu, f"get_{axis}_parallel_group")())
        size, index = (getattr(mpu, f"get_{axis}_parallel_{what}")() for what in ("world_size", "rank"))
        sums[axis] = (int(value), size, index)
    sources = mpu.get_tensor_model_parallel_src_rank(), mpu.get_data_parallel_src_rank()
    groups = [group is None for group in (context.tp_group, context.zero_group, context.pp_group)]
    return sums, sources, groups, mpu.get_data_parallel_group_ranks()


def test_groups_of_tp2_dp2_hold_the_right_ranks():
    results = run_ranks(4, _sums, Topology(tp_size=2, dp_size=2))
    # Ranks 0 1 2 3 weigh 1 2 4 8; tp pairs are (0 1) (2 3), dp pairs (0 2) (1 3), no stages: each alone.
    tensor, data, alone = [3, 3, 12, 12], [5, 10, 5, 10], [1, 2, 4, 8]
    for rank, (sums, sources, groups, dp_ranks) in enumerate(results):
        assert sums == {
            "tensor_model": (tensor[rank], 2, rank % 2),
            "data": (data[rank], 2, rank // 2),
            "pipeline_model": (alone[rank], 1, 0),
        }
        assert sources == (rank - rank % 2, rank % 2)
        assert groups == [False, False, True]
        assert dp_ranks == [rank % 2, rank % 2 + 2]


def test_topology_of_another_world_size_is_refused():
    with pytest.raises(RankFailure, match="WorldSizeError: the topology tp2 pp1 dp2"):
        run_ranks(2, _sums, Topology(tp_size=2, dp_size=2))


def test_single_process_needs_no_process_group():
    context = ParallelContext.single()
    assert (context.tp_size, context.dp_size, context.pp_size, context.tp_group) == (1, 1, 1, None)
