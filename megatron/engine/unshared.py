"""ZeRO-1 and ZeRO-2 where a rank is alone in its data-parallel group: nothing is copied to be exchanged with nobody.

    spare_copies(engine.optimizer)       # after the engine is built; before anything is loaded

DeepSpeed copies each gradient into a bucket, divides it by one, sums it over a group of one, copies it out again, and
in fp32 keeps a second copy of every weight as its master. Here gradients stay where backward left them, and in fp32
the master is the weight itself. The arithmetic is the same, so are the files.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def spare_copies(optimizer: Any) -> None:
    """Of DeepSpeed's optimizer for ZeRO-1 and ZeRO-2; any other, one that shares its state with other ranks, and one
    that is offloaded or gathers gradients in another precision stay as they are. Local."""
    if not hasattr(optimizer, "bit16_groups") or optimizer.cpu_offload:
        return
    # Experts may be this rank's alone while their gradients are a sum over others' samples too, to be divided.
    if any(dist.get_world_size(group) > 1 for group in (optimizer.dp_process_group, *optimizer.real_dp_process_group)):
        return
    groups = range(len(optimizer.bit16_groups))
    if not any(optimizer._use_compact_grad_partition_buffer(group) for group in groups):
        optimizer.contiguous_gradients = False
        optimizer.buffered_reduce_fallback = _reduce_over_nobody
    for master, (weights,) in zip(
        optimizer.single_partition_of_fp32_groups, optimizer.parallel_partitioned_bit16_groups, strict=True
    ):
        if master.dtype == weights.dtype:
            master.data = weights
    # DeepSpeed's own way from a parameter to its master was to the copies; to its moments it is found at the next step.
    optimizer._link_all_hp_params()
    optimizer._hp_optimizer_states_linked = False


def _reduce_over_nobody(rank: int | None, gradients: list[torch.Tensor], *_: Any, **__: Any) -> None:
    """In place of a sum over the data-parallel group and a division by its size."""
