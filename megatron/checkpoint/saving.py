"""Save a live run as a native checkpoint: DeepSpeed's own files plus ucp.json, committed by rename.

    folder = save(live, Path("runs/source"), progress)

Every rank writes what it owns under a temporary name; digests are taken from the live state; files are checksummed
and flushed; ucp.json is the last file; then one rename, then the pointer. A crash at any moment leaves the previous
checkpoint and its pointer as they were.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.checkpoint.errors import all_ranks_or_none, on_rank_0
from megatron.checkpoint.live_run import LiveRun
from megatron.checkpoint.native_manifest import checksums, native_manifest
from megatron.checkpoint.progress import Progress
from megatron.checkpoint.saved_streams import RNG_FILE, save_streams
from megatron.checkpoint.state_digest import state_digests
from megatron.engine.counters import loss_scaler_state
from megatron.engine.engine_files import write_engine_files
from megatron.parallel.agreement import gathered
from megatron.ucp import commit
from megatron.ucp.digest import total
from megatron.ucp.disk import disk_errors
from megatron.ucp.file_names import dealt_file
from megatron.ucp.manifest import FileInfo, Manifest, write_manifest
from megatron.ucp.output_file import SummedFile
from megatron.ucp.pointers import LATEST

log = logging.getLogger(__name__)

LATEST_ITERATION = "latest_checkpointed_iteration.txt"
"""Megatron's own pointer, kept for scripts that read it."""


def save(live: LiveRun, folder: Path, progress: Progress) -> Path:
    """Write `folder`/global_step<iteration> and point `latest` to it. Returns the checkpoint's folder.

    Collective over the world. Raises DivergedCopiesError before anything is written, CheckpointError on every rank
    where one of them failed; what was saved before is untouched then.
    """
    started = time.perf_counter()
    final = folder / f"global_step{progress.iteration}"
    # A fresh optimizer (saved before its first step) has no states yet; DeepSpeed would save none.
    with all_ranks_or_none("saving", final):
        live.state.make_states(is_saved=True)
    digests = state_digests(live.state)
    staging = on_rank_0(lambda: commit.stage(final, replace=True))
    with all_ranks_or_none("saving", final):
        written = write_engine_files(
            live.engine, folder, staging.name, dataclasses.asdict(progress), deals_experts=live.context.ep_size > 1
        )
        written |= _save_experts(live, staging)
    streams = gathered(live.streams.state_dict())
    on_rank_0(lambda: save_streams(staging, streams))
    files = checksums(staging, final, written)
    manifest = native_manifest(live.state, digests, files, model=live.model, common=_common(live, progress))
    on_rank_0(lambda: _commit(staging, final, manifest))
    num_bytes = sum(entry.bytes for entry in files.values())
    seconds = time.perf_counter() - started
    log.info(
        "saved %s: %.1f MiB in %.2f s (%.2f GiB/s), state digest %s",
        final,
        num_bytes / 2**20,
        seconds,
        num_bytes / 2**30 / seconds,
        total(digests),
    )
    return final


def _save_experts(live: LiveRun, folder: Path) -> dict[str, FileInfo]:
    """What this rank has of experts that ZeRO does not partition, and DeepSpeed saves of one expert-parallel rank only.
    Returns what was written, by name. Local: on one of the ranks that hold the same."""
    context, state = live.context, live.state
    if context.ep_size == 1 or context.edp_rank > 0 or not state.has_whole_frozen:
        return {}
    module: dict[str, torch.Tensor] = {}
    optimizer: dict[str, dict[str, torch.Tensor]] = {}
    for param, name in live.engine.param_names.items():
        is_trained = name not in state.frozen
        if not state.layouts[name].is_cut_over("ep") or (is_trained and not state.is_replicated):
            continue
        module[name] = param.detach()
        if is_trained:
            optimizer[name] = state.tensor_states(param)
    if not module:
        return {}
    mp_rank = context.topology.mp_rank(pp=context.pp_rank, tp=context.tp_rank)
    name = dealt_file(context.ep_rank, mp_rank)
    with disk_errors(folder / name), SummedFile(folder / name) as file:
        torch.save({"module": module, "optimizer": optimizer}, file)  # type: ignore[arg-type]  # it writes and flushes
    return {name: file.info}


def _commit(staging: Path, final: Path, manifest: Manifest) -> None:
    with disk_errors(staging):
        write_manifest(staging, manifest)
    commit.commit(staging, final, replace=True)
    commit.point_to(final.parent, LATEST, final.name)
    commit.point_to(final.parent, LATEST_ITERATION, str(manifest.common["iteration"]))
    if removed := commit.remove_left_overs(final.parent):
        log.info("removed what earlier saves had left unfinished in %s: %s", final.parent, ", ".join(removed))


def _common(live: LiveRun, progress: Progress) -> dict[str, Any]:
    return {
        **dataclasses.asdict(progress),
        "schedule": live.schedule.state_dict(),
        "loss_scaler": loss_scaler_state(live.state.loss_scaler),
        "rng": {"file": RNG_FILE, "world_size": dist.get_world_size()},
        "global_batch_size": live.batch_sizes.at(progress.consumed_train_samples),
        "train_order": live.train_order,
        "engine": {
            "global_samples": live.engine.global_samples // live.context.sp_size,
            "skipped_steps": live.engine.skipped_steps,
        },
    }
