"""DeepSpeed's own save of an engine that others built, with a ucp.json beside its files, committed by a rename.

    save(engine, write, Path("checkpoint-100"), "global_step100", exclude_frozen=False, save_latest=True)

Collective over the world.

What is written into the tag's folder is there whole or not at all. What the program writes beside it (Trainer's
model.safetensors before, trainer_state.json after) is its own business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.checkpoint.errors import CheckpointError, all_ranks_or_none, on_rank_0
from megatron.checkpoint.live_memory import LiveMemory
from megatron.checkpoint.native_manifest import ManifestPart, checksums, native_manifest
from megatron.checkpoint.snapshot import file_to_write
from megatron.checkpoint.state_digest import DivergedCopiesError, digest_rows, summed_digests
from megatron.engine.counters import loss_scaler_state
from megatron.engine.engine_files import taken_files
from megatron.engine.optimizer_states import UnsupportedOptimizerError
from megatron.engine.protocols import ForeignEngine
from megatron.ucp import commit
from megatron.ucp.digest import total
from megatron.ucp.disk import disk_errors
from megatron.ucp.manifest import LEFT_OUT, FileInfo, Manifest, write_manifest
from megatron.ucp.pointers import LATEST
from megatron.ucp.save_job import digest_row, write_files
from megatron.ucp_deepspeed.engine_view import engine_state

log = logging.getLogger(__name__)


def save(
    engine: ForeignEngine,
    write: Callable[[str, bool], Any],
    folder: Path,
    tag: str,
    *,
    exclude_frozen: bool,
    save_latest: bool,
) -> None:
    """`write(tag, points)`: DeepSpeed's save under a tag, which `latest` then names or not. Collective over the world.
    Raises CheckpointError on every rank where one cannot write; what was saved under the tag before is untouched."""
    final = folder / tag
    try:
        with all_ranks_or_none("describing", final):
            state = engine_state(engine)
            state.make_states(is_saved=True)
        memory = LiveMemory()
        rows = digest_rows(state, memory.hold)
        digests = summed_digests(state, rows, [digest_row(row, memory) for row in rows])
    except (CheckpointError, UnsupportedOptimizerError, DivergedCopiesError) as error:
        log.warning("warning: %s is saved without ucp.json, as DeepSpeed saves it: %s", final, error)
        write(tag, save_latest)
        return
    on_rank_0(lambda: folder.mkdir(parents=True, exist_ok=True))
    staging = on_rank_0(lambda: commit.stage(final, replace=True))
    written: dict[str, FileInfo] = {}

    def take(name: str, content: Any) -> None:
        own = LiveMemory()
        written.update(write_files([file_to_write(name, content, own)], staging, own))

    with all_ranks_or_none("saving", final), taken_files(engine, staging, take):
        write(staging.name, False)
    common: dict[str, Any] = {
        "iteration": engine.global_steps,
        "global_batch_size": engine.train_batch_size(),
        "loss_scaler": loss_scaler_state(state.loss_scaler),
        "engine": {"global_samples": engine.global_samples, "skipped_steps": engine.skipped_steps},
    }
    if exclude_frozen and state.frozen:
        common[LEFT_OUT] = {"digest": total({name: digests.whole[name] for name in state.frozen})}
        state = engine_state(engine, without=state.frozen)
        digests = digests.of(state.layouts)
    files = checksums(staging, final, written)
    manifest = native_manifest(state, ManifestPart.of(state), digests, files, model={}, common=common)
    on_rank_0(lambda: _commit(staging, final, manifest, save_latest))
    log.info("saved %s, state digest %s", final, total(digests.whole))


def _commit(staging: Path, final: Path, manifest: Manifest, save_latest: bool) -> None:
    with disk_errors(staging):
        write_manifest(staging, manifest)
    commit.commit(staging, final, replace=True)
    if save_latest:
        commit.point_to(final.parent, LATEST, final.name)
