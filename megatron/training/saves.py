"""When a run saves, and how: while training waits, or behind it.

with Saves(config.checkpoint, live, progress, run_log) as saves:
    saves.after_step(is_last=False)          # at every step; collective
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from megatron.checkpoint.background import BackgroundSaves, SaveEvent
from megatron.checkpoint.errors import CheckpointError, on_rank_0
from megatron.checkpoint.live_run import LiveRun
from megatron.checkpoint.progress import Progress
from megatron.checkpoint.saving import save
from megatron.checkpoint.state_digest import DivergedCopiesError
from megatron.checkpoint.state_watch import StateChangedError
from megatron.config.checkpoint import CheckpointConfig
from megatron.parallel.agreement import stops_all_ranks
from megatron.training.hub_exports import HubExports
from megatron.training.tensorboard import RunLog
from megatron.ucp.commit import damage_of, mark_damaged
from megatron.ucp.errors import UcpError
from megatron.ucp.manifest import MANIFEST_NAME, read_manifest
from megatron.ucp.retention import Keep

log = logging.getLogger(__name__)


class Saves:
    """Nothing without --save. Leaving the block with a save in flight leaves that undone; the last step waits for it.
    All methods are collective over the world."""

    def __init__(self, config: CheckpointConfig, live: LiveRun, progress: Progress, run_log: RunLog):
        """`progress`: of the run, which goes on."""
        self._config, self._live, self._progress, self._run_log = config, live, progress, run_log
        self._saved_at = progress.iteration
        """Of the newest save that is durable; what was resumed from needs no save either."""
        is_behind = config.async_save and config.save is not None
        self._keep = Keep(config.keep_last, config.keep_every, config.keep_newest_verified)
        self._behind = BackgroundSaves(live, config.async_save_max_gib, self._keep) if is_behind else None
        self._is_prepared = False
        self._exports = None
        with stops_all_ranks("looking for the model's name at Hugging Face"):
            if dist.get_rank() == 0:
                self._exports = HubExports.of(config, live.model)

    def __enter__(self) -> Saves:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._behind is not None:
            self._behind.close()
        if self._exports is not None:
            self._exports.close()

    def after_step(self, *, is_last: bool) -> None:
        """Saves if it is time to, and sees what became of a save behind. `is_last`: the run stops here, with all that
        it has come to saved. Raises CheckpointError, and DivergedCopiesError."""
        if self._config.save is None:
            return
        if self._behind is not None:
            if not self._is_prepared:
                self._behind.prepare()
                self._is_prepared = True
            self._see(*self._behind.poll())
        if self._exports is not None:
            self._exports.poll()
        iteration, interval = self._progress.iteration, self._config.save_interval
        if interval and iteration % interval == 0:
            self._save(Path(self._config.save))
        if is_last:
            self.finish_last()
            if self._saved_at != iteration:
                self._save_now(Path(self._config.save))

    def finish_last(self) -> None:
        """Waits for the save in flight."""
        if self._behind is not None:
            if self._behind.is_busy:
                log.info("waiting for the save that is being written")
            self._see(*self._behind.wait())

    def finish_exports(self) -> None:
        """Waits for what is being exported, and for what is to be."""
        if self._exports is not None:
            self._exports.finish()

    def finish_and_mark(self, change: StateChangedError) -> None:
        """Waits for the save in flight; then a checkpoint that holds what has changed is marked damaged, so that nobody
        goes on from it."""
        try:
            self.finish_last()
        except (CheckpointError, DivergedCopiesError) as error:
            log.error("error: %s", error)
        if self._config.save is not None:
            folder = Path(self._config.save) / f"global_step{change.iteration}"
            on_rank_0(lambda: _mark_changed(folder, change))

    def _save(self, folder: Path) -> None:
        if self._behind is None:
            self._save_now(folder)
            return
        try:
            self._begin(self._behind, folder)
        except CheckpointError as error:  # on every rank; what was saved before is whole
            if self._config.exit_on_save_failure:
                raise
            log.error("error: %s\nTraining goes on, and tries again at the next --save-interval.", error)

    def _begin(self, behind: BackgroundSaves, folder: Path) -> None:
        started = time.perf_counter()
        if behind.is_busy:
            log.warning("warning: training waits: the save before is not written yet; --save-interval is too short")
            self._see(*behind.wait())
        if not behind.begin(folder, self._progress):
            self._save_now(folder)
            return
        self._run_log.times(self._progress.iteration, {"checkpoint": time.perf_counter() - started})

    def _save_now(self, folder: Path) -> None:
        started, iteration = time.perf_counter(), self._progress.iteration
        save(self._live, folder, self._progress, self._keep)
        self._is_durable(iteration)
        self._run_log.times(iteration, {"checkpoint": time.perf_counter() - started})

    def _is_durable(self, iteration: int) -> None:
        self._saved_at = iteration
        if self._exports is not None:
            self._exports.after_save(Path(self._config.save or "") / f"global_step{iteration}", iteration)

    def _see(self, *events: SaveEvent) -> None:
        for event in events:
            self._run_log.save(event.iteration, event.kind, event.seconds)
            if event.kind == "durable":
                self._is_durable(event.iteration)
            elif event.kind == "failed" and self._config.exit_on_save_failure:
                raise CheckpointError(f"{event.error}\nThe run stops here, as --exit-on-save-failure asks.")


def _mark_changed(folder: Path, change: StateChangedError) -> None:
    if not (folder / MANIFEST_NAME).is_file() or damage_of(folder):
        return
    try:
        manifest = read_manifest(folder)
    except (UcpError, OSError):
        return  # a resume passes it over
    if change.is_in(manifest.iteration, manifest.digests):
        mark_damaged(folder, f"the state changed in memory between step {change.iteration} and this save")
        log.warning("warning: %s was saved after the state had changed: it is marked damaged and passed over", folder)
