"""The one object through which DeepSpeed asks a plain (not pipelined) model about tensor and data parallelism.

DeepSpeed calls a module named `mpu` by method names that grew over years; they are all here and
nowhere else. A PipelineModule brings its own (`model.mpu()`, deepspeed/runtime/pipe/topology.py).

To DeepSpeed, ranks that share a sequence are data-parallel ranks: it averages gradients over both and partitions over
both, in every ZeRO stage and in pipelines, once the loss is scaled for it (layers/cross_entropy.py, mean_loss). Its
own notion of sequence parallelism sums over sp in ZeRO-1/2, averages in ZeRO-3, and leaves ZeRO-3's ranks to diverge.

    engine = deepspeed.DeepSpeedEngine(..., mpu=Mpu(context))

To DeepSpeed a group of None is the whole world, so a degree of 1 is answered with a group of this rank alone.
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.parallel.context import ParallelContext


class Mpu:
    """Construction is collective over the world."""

    def __init__(self, context: ParallelContext) -> None:
        self._context = context
        topology, coords = context.topology, context.coords
        self._tp_ranks = [
            topology.rank_of(pp=coords.pp, dp=coords.dp, sp=coords.sp, tp=t) for t in range(context.tp_size)
        ]
        self._dp_ranks = [
            topology.rank_of(pp=coords.pp, dp=d, sp=s, tp=coords.tp)
            for d in range(context.dp_size)
            for s in range(context.sp_size)
        ]
        self._alone = None
        if min(context.tp_size, context.zero_size, context.pp_size) == 1:
            # Local synchronisation: no rank waits for groups it is not in.
            self._alone = dist.new_group([context.rank], use_local_synchronization=True)

    # -- tensor parallelism, in DeepSpeed's newer and older words ------------------------------------------------

    def get_tensor_model_parallel_rank(self) -> int:
        return self._context.tp_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._context.tp_size

    def get_tensor_model_parallel_group(self) -> ProcessGroup:
        return self._context.tp_group or self._alone

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self._tp_ranks[0]

    # Without stages "model parallel" (over which norms and overflows are reduced) is tensor parallel.
    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_src_rank = get_tensor_model_parallel_src_rank

    # -- data parallelism, sequence parallelism included --------------------------------------------------------

    def get_data_parallel_rank(self) -> int:
        return self._context.zero_rank

    def get_data_parallel_world_size(self) -> int:
        return self._context.zero_size

    def get_data_parallel_group(self) -> ProcessGroup:
        return self._context.zero_group or self._alone

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self._dp_ranks

    def get_data_parallel_src_rank(self) -> int:
        return self._dp_ranks[0]

    # -- pipeline parallelism -----------------------------------------------------------------------------------

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._context.pp_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._context.pp_size

    def get_pipeline_model_parallel_group(self) -> ProcessGroup:
        return self._context.pp_group or self._alone
