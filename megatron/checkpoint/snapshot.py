"""What a checkpoint of a live run is to hold, taken at one moment: all that the run would change afterwards.

    memory = LiveMemory()
    snapshot = take_snapshot(live, staging, progress, memory, files.append)        # collective over the world

Values are numbered tensors (live_memory.py), still the engine's own: who writes them later has to copy them first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.checkpoint.live_memory import LiveMemory
from megatron.checkpoint.live_run import LiveRun
from megatron.checkpoint.native_manifest import ManifestPart
from megatron.checkpoint.progress import Progress
from megatron.checkpoint.saved_streams import RNG_FILE
from megatron.engine.counters import loss_scaler_state
from megatron.engine.engine_files import take_engine_files
from megatron.ucp.file_names import dealt_file
from megatron.ucp.live_content import pickled
from megatron.ucp.save_job import FileToWrite


@dataclass(frozen=True)
class Snapshot:
    part: ManifestPart
    common: dict[str, Any]
    """The manifest's."""
    streams: dict[str, torch.Tensor]


def take_snapshot(
    live: LiveRun, staging: Path, progress: Progress, memory: LiveMemory, take: Callable[[FileToWrite], None]
) -> Snapshot:
    """Gives `take` each file of this rank's, whose tensors `memory` then holds. Collective over the world; raises this
    rank's first error when all ranks are through."""

    def pickle(name: str, content: Any) -> None:
        take(file_to_write(name, content, memory))

    take_engine_files(
        live.engine,
        staging.parent,
        staging.name,
        dataclasses.asdict(progress),
        pickle,
        deals_experts=live.context.ep_size > 1,
        excludes_frozen=live.excludes_frozen,
    )
    for name, content in _dealt_experts(live).items():
        pickle(name, content)
    streams = {key: value.clone() for key, value in live.streams.state_dict().items()}
    return Snapshot(ManifestPart.of(live.state), _common(live, progress), streams)


def file_to_write(name: str, content: Any, memory: LiveMemory) -> FileToWrite:
    """Whose tensors `memory` then holds."""
    live = pickled(content)
    return FileToWrite(name, live.pickle, live.is_whole_file, tuple(memory.hold(tensor) for tensor in live.tensors))


def _dealt_experts(live: LiveRun) -> dict[str, Any]:
    """What this rank has of experts that ZeRO does not partition, and DeepSpeed saves of one expert-parallel rank only,
    by file. On one of the ranks that hold the same."""
    context, state = live.context, live.state
    if context.ep_size == 1 or context.edp_rank > 0 or not state.has_whole_frozen:
        return {}
    module: dict[str, torch.Tensor] = {}
    optimizer: dict[str, dict[str, torch.Tensor]] = {}
    for param, name in live.engine.param_names.items():
        is_trained = name not in state.frozen
        is_saved = state.is_replicated if is_trained else not live.excludes_frozen
        if not state.layouts[name].is_cut_over("ep") or not is_saved:
            continue
        module[name] = param.detach()
        if is_trained:
            optimizer[name] = state.tensor_states(param)
    if not module:
        return {}
    mp_rank = context.topology.mp_rank(pp=context.pp_rank, tp=context.tp_rank)
    return {dealt_file(context.ep_rank, mp_rank): {"module": module, "optimizer": optimizer}}


def _common(live: LiveRun, progress: Progress) -> dict[str, Any]:
    return {
        **dataclasses.asdict(progress),
        "schedule": live.schedule.state_dict(),
        "loss_scaler": loss_scaler_state(live.state.loss_scaler),
        "rng": {"file": RNG_FILE, "world_size": dist.get_world_size()},
        "global_batch_size": live.batch_sizes.at(progress.consumed_train_samples),
        "train_order": live.train_order,
        "model_settings": live.model_settings,
        "engine": {
            "global_samples": live.engine.global_samples // live.context.sp_size,
            "skipped_steps": live.engine.skipped_steps,
        },
    }
