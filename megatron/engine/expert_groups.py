"""Tell DeepSpeed about expert parallelism: which ranks hold the same experts, and which parameters are theirs.

DeepSpeed keeps its expert groups in a table of its own and marks parameters by attributes; both are
filled from our context, so that ranks are dealt as everywhere here (deepspeed/utils/groups.py would take consecutive
ranks, whatever tp is), and any layer can have experts (its engine would only know its own MoE class). Expert gradients
are then summed over edp and divided by dp, and ZeRO partitions experts over edp, in every stage.

    context = register_expert_groups(context, zero_stage)        # before the model is built from it
    mark_expert_groups(groups)                         # the optimizer's

Sources: deepspeed/runtime/engine.py (_reduce_expert_gradients), runtime/zero/stage_1_and_2.py
(_configure_moe_settings), runtime/zero/stage3.py (_autoep_expert_parallel_group).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups as deepspeed_groups
from torch import nn

from megatron.parallel.context import ParallelContext


def register_expert_groups(context: ParallelContext, zero_stage: int) -> ParallelContext:
    """Local. Without expert parallelism there is nothing to say: experts lie as everything else. Returns the context
    with the marks by which DeepSpeed knows experts: it sums their gradients over edp and divides by dp, and ZeRO
    partitions them over edp. (ZeRO-1/2: moe/utils.py, is_moe_param; ZeRO-3: stage3.py, ds_zero_placement_family.)"""
    if context.ep_size == 1:
        return context
    topology, rank = context.topology, context.rank
    # ZeRO-3 uses it only to sum norms, and takes it to span the tp ranks.
    axis, group = ("ep_tp", context.ep_tp_group) if zero_stage == 3 else ("ep", context.ep_group)
    name = expert_group_name(context)
    deepspeed_groups._EXPERT_PARALLEL_GROUP[name] = group
    deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS[name] = _own(topology.groups(axis), rank)
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] = context.edp_group
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = _own(topology.groups("edp"), rank)
    # Read by BF16_Optimizer's norm.
    deepspeed_groups.expert_tensor_parallel_world_size = context.tp_size
    marks = {
        "allreduce": False,
        "group_name": name,
        "ds_zero_partition_group_name": name,
        "ds_zero_placement_family": "autoep_expert",
        "ds_zero_partition_process_group": context.edp_group,
    }
    return dataclasses.replace(context, marks_of_experts=marks)


def expert_group_name(context: ParallelContext) -> str:
    """DeepSpeed's name of the process groups; it reads the number out of it."""
    return f"ep_size_{context.ep_size}"


def mark_expert_groups(param_groups: Iterable[dict[str, Any]]) -> None:
    """DeepSpeed looks a parameter group's process groups up by the group's name, which is ours: an alias for each."""
    for group in param_groups:
        if group["params"] and all(map(is_moe_param, group["params"])):
            group["moe"] = True
            name = group["params"][0].group_name
            for table in (deepspeed_groups._EXPERT_PARALLEL_GROUP, deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP):
                table[group["name"]] = table[name]


def has_dealt_experts(model: nn.Module) -> bool:
    """This stage trains experts of which other ranks have different ones."""
    return any(is_moe_param(param) and param.requires_grad for param in model.parameters())


def _own(groups: list[list[int]], rank: int) -> list[int]:
    return next(ranks for ranks in groups if rank in ranks)
