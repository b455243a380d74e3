"""Save a live run as a native checkpoint: the files that DeepSpeed would write plus ucp.json, committed by rename.

    folder = save(live, Path("runs/source"), progress)

Every rank writes what it owns under a temporary name; digests are taken from the live state; files are summed while
they are written, and flushed; ucp.json is the last file; then one rename, then the pointer. A crash at any moment
leaves the previous checkpoint and its pointer as they were.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from megatron.checkpoint.errors import all_ranks_or_none, on_rank_0
from megatron.checkpoint.live_memory import LiveMemory
from megatron.checkpoint.live_run import LiveRun
from megatron.checkpoint.native_manifest import checksums, native_manifest
from megatron.checkpoint.progress import Progress
from megatron.checkpoint.saved_streams import save_streams
from megatron.checkpoint.snapshot import take_snapshot
from megatron.checkpoint.state_digest import digest_rows, summed_digests
from megatron.parallel.agreement import gathered
from megatron.ucp import commit
from megatron.ucp.digest import total
from megatron.ucp.disk import disk_errors, require_space
from megatron.ucp.manifest import FileInfo, Manifest, write_manifest
from megatron.ucp.pointers import LATEST
from megatron.ucp.retention import Keep
from megatron.ucp.save_job import FileToWrite, digest_row, write_files

log = logging.getLogger(__name__)

LATEST_ITERATION = "latest_checkpointed_iteration.txt"
"""Megatron's own pointer, kept for scripts that read it."""


def save(live: LiveRun, folder: Path, progress: Progress, keep: Keep | None = None) -> Path:
    """Write `folder`/global_step<iteration> and point `latest` to it; then remove what `keep` does not. Returns the
    checkpoint's folder.

    Collective over the world. Raises DivergedCopiesError before anything is written, CheckpointError on every rank
    where one of them failed; what was saved before is untouched then.
    """
    started = time.perf_counter()
    final = folder / f"global_step{progress.iteration}"
    # A fresh optimizer (saved before its first step) has no states yet; DeepSpeed would save none.
    with all_ranks_or_none("saving", final):
        live.state.make_states(is_saved=True)
    memory = LiveMemory()
    rows = digest_rows(live.state, memory.hold)
    digests = summed_digests(live.state, rows, [digest_row(row, memory) for row in rows])
    staging = on_rank_0(lambda: commit.stage(final, replace=True))
    files_to_write: list[FileToWrite] = []
    with all_ranks_or_none("saving", final):
        snapshot = take_snapshot(live, staging, progress, memory, files_to_write.append)
    require_room(final, files_to_write, memory)
    written: dict[str, FileInfo] = {}
    with all_ranks_or_none("saving", final):
        written = write_files(files_to_write, staging, memory)
    streams = gathered(snapshot.streams)
    on_rank_0(lambda: save_streams(staging, streams))
    files = checksums(staging, final, written)
    manifest = native_manifest(
        live.state,
        snapshot.part,
        digests,
        files,
        model=live.model,
        common=snapshot.common,
        excludes_frozen=live.excludes_frozen,
    )
    on_rank_0(lambda: _commit(staging, final, manifest, keep or Keep()))
    num_bytes = sum(entry.bytes for entry in files.values())
    seconds = time.perf_counter() - started
    log.info(
        "saved %s: %.1f MiB in %.2f s (%.2f GiB/s), state digest %s",
        final,
        num_bytes / 2**20,
        seconds,
        num_bytes / 2**30 / seconds,
        total(digests.whole),
    )
    return final


def require_room(final: Path, files: Sequence[FileToWrite], memory: LiveMemory) -> None:
    """Before anything is written. Collective over the world. Raises CheckpointError on every rank where the disk has no
    room for what all of them write."""
    num_bytes = sum(gathered(sum(file.num_bytes(memory) for file in files)))
    on_rank_0(lambda: require_space(final.parent, num_bytes))


def pointers_to(final: Path, iteration: int) -> tuple[tuple[str, str], ...]:
    """(pointer, what it says), in the order in which they are moved."""
    return (LATEST, final.name), (LATEST_ITERATION, str(iteration))


def tell_removed(removed: Sequence[str]) -> None:
    if removed:
        log.info("removed, as --keep-last asks: %s", ", ".join(removed))


def _commit(staging: Path, final: Path, manifest: Manifest, keep: Keep) -> None:
    with disk_errors(staging):
        write_manifest(staging, manifest)
    commit.commit(staging, final, replace=True)
    for pointer, content in pointers_to(final, manifest.common["iteration"]):
        commit.point_to(final.parent, pointer, content)
    tell_removed(keep.thin_out(final.parent, manifest.common["iteration"]))
    if removed := commit.remove_left_overs(final.parent):
        log.info("removed what earlier saves had left unfinished in %s: %s", final.parent, ", ".join(removed))
