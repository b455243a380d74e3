"""ucp.json of a native checkpoint: what a live engine's state says of the files that DeepSpeed wrote of it.

files = checksums(staging, final, written)          # collective, as the next
manifest = native_manifest(state, ManifestPart.of(state), digests, files, model={}, common={"iteration": 100})
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import megatron
from megatron.checkpoint.errors import CheckpointError, all_ranks_or_none
from megatron.checkpoint.state_digest import StateDigests
from megatron.engine.engine_state import EngineState, OwnedInterval
from megatron.parallel.agreement import gathered
from megatron.ucp import commit
from megatron.ucp.digest import total
from megatron.ucp.manifest import LEFT_OUT, FileInfo, Manifest, OptimizerInfo, ParameterInfo
from megatron.ucp.topology import Topology


def checksums(staging: Path, final: Path, written: Mapping[str, FileInfo]) -> dict[str, FileInfo]:
    """Of all files that are to be `final`. `written`: what this rank summed while it wrote; the others are read, each
    by one rank. Collective over the world."""
    known = {name: info for of_rank in gathered(dict(written)) for name, info in of_rank.items()}
    with all_ranks_or_none("checksumming", final):
        there = commit.data_files(staging)
        mine = [path for path in there if path not in known][dist.get_rank() :: dist.get_world_size()]
        own = {path: commit.checksum_file(staging / path) for path in mine}
    known |= {name: info for of_rank in gathered(own) for name, info in of_rank.items()}
    return {name: known[name] for name in there}


@dataclass(frozen=True)
class ManifestPart:
    """What this rank's engine says, beside the values, at the moment that is saved."""

    numbers: dict[str, dict[str, Any]]
    """{parameter: step, scalars, shapes}."""
    groups: dict[str, str]
    """{parameter: its group of the optimizer's}."""
    hyper_parameters: dict[str, Any]
    stage3_order: list[list[str]]
    flat_table: list[tuple[str, int, int, int]]

    @classmethod
    def of(cls, state: EngineState) -> ManifestPart:
        """Local."""
        numbers = {interval.name: _numbers(state, interval) for interval in state.intervals}
        groups = {interval.name: interval.group for interval in state.intervals}
        hyper_parameters = copy.deepcopy(state.hyper_parameters())  # a schedule goes on changing them
        return cls(numbers, groups, hyper_parameters, state.stage3_order, state.flat_table)


def native_manifest(
    state: EngineState,
    own: ManifestPart,
    digests: StateDigests,
    files: Mapping[str, FileInfo],
    *,
    model: Mapping[str, Any],
    common: Mapping[str, Any],
    excludes_frozen: bool = False,
) -> Manifest:
    """`own` and `digests`: of the state as it was saved; `excludes_frozen`: without the weights that are not trained.
    Collective over the world. Raises CheckpointError where ranks hold a parameter at different steps."""
    left_out = state.frozen if excludes_frozen else frozenset()
    if left_out:
        told = {
            "digest": total({name: digests.whole[name] for name in left_out}),
            "dtype": state.weight_dtype,
            "parameters": len(left_out),
        }
        common = {**common, LEFT_OUT: told}
        digests = digests.of(set(state.layouts) - left_out)
    everywhere = gathered(own)
    numbers, groups = dict(own.numbers), dict(own.groups)
    for part in everywhere:
        for name, there in part.numbers.items():
            if numbers.setdefault(name, there) != there:
                raise CheckpointError(f"ranks hold {name} at different optimizer steps: {numbers[name]} and {there}")
        groups.update(part.groups)
    hyper_parameters = {name: values for part in everywhere for name, values in part.hyper_parameters.items()}
    parameters = {
        name: ParameterInfo(
            layout=layout,
            group=groups.get(name, ""),
            is_trainable=name not in state.frozen,
            pp_stages=state.pp_stages[name],
            states=tuple(digests.whole[name]),
            dtype=state.weight_dtype,
            **numbers.get(name, {}),
        )
        for name, layout in state.layouts.items()
        if name not in left_out
    }
    topology = state.context.topology
    is_pipelined = state.engine.pipeline_parallelism
    return Manifest(
        kind="native",
        saved_by={
            "framework": "megatron-deepspeed-ucp",
            "version": megatron.__version__,
            "deepspeed": deepspeed.__version__,
            "torch": torch.__version__,
        },
        topology=topology,
        zero_stage=state.engine.zero_optimization_stage(),
        is_pipelined=is_pipelined,
        parameters=parameters,
        optimizer=OptimizerInfo(kind=type(state.base).__name__, wrapper=state.wrapper, groups=hyper_parameters),
        model=dict(model),
        common=dict(common),
        digests={name: dict(values) for name, values in digests.whole.items()},
        expert_digests=digests.of_experts,
        files=dict(files),
        zero0_order=_by_mp_rank(topology, [list(part.numbers) for part in everywhere]) if state.is_replicated else [],
        zero3_order=_by_mp_rank(topology, [part.stage3_order for part in everywhere]) if own.stage3_order else [],
        fragments=_fragments(topology, [part.flat_table for part in everywhere]),
        pipeline_layers=list(state.engine.module.entry_paths) if is_pipelined else [],
    )


def _numbers(state: EngineState, interval: OwnedInterval) -> dict[str, Any]:
    """What ParameterInfo keeps beside the tensors."""
    shape = state.layouts[interval.name].shape
    own_shapes = {held.state: held.layout.shape for held in state.states_of(interval) if held.layout.shape != shape}
    return {"step": state.step_of(interval.flat), "scalars": state.scalars_of(interval.flat), "shapes": own_shapes}


def _fragments(topology: Topology, tables: list[list[tuple[str, int, int, int]]]) -> dict[str, list[list[int]]]:
    """The manifest's, from every rank's table."""
    fragments: dict[str, list[list[int]]] = {}
    for rank, table in enumerate(tables):
        at = topology.coords(rank)
        for name, *place in table:
            part = [topology.mp_rank(pp=at.pp, tp=at.tp), topology.zero_rank(at), *place]
            fragments.setdefault(name, []).append(part)
    return {name: sorted(parts) for name, parts in fragments.items()}


def _by_mp_rank(topology: Topology, by_rank: list[Any]) -> list[Any]:
    """What data-parallel ranks have in common, once each."""
    return [by_rank[topology.rank_of(pp=pp, tp=tp)] for pp in range(topology.pp_size) for tp in range(topology.tp_size)]
