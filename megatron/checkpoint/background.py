"""Saves behind training: the state is copied in memory before the next step changes it, and a process of its own
writes the copy.

    with BackgroundSaves(live, max_gib=None) as saves:       # collective, as all that follows
        saves.prepare()                          # after the first step: memory for the copy
        saves.begin(Path("runs/a"), progress)    # True: training may go on. False: no room for a copy
        for event in saves.poll(): ...           # at every step: staged, written, durable, or failed
        for event in saves.wait(): ...           # until the last save is durable or has failed

A save is *staged* when its values are copied: what only the optimizer changes (masters, moments, weights) is copied
while the next step runs forward and backward, and the optimizer waits for the rest of it (CheckFreq, Mohan et al., FAST
2021, calls it a pipelined snapshot). It is *written* when every rank's files are on the disk, and *durable* when the
folder is renamed and `latest` names it. One at a time. The worker process (ucp/save_worker.py) takes part in nothing
collective: ranks agree at the boundary of a step that all of theirs have answered, hold the digests of copies against
each other, and only then rank 0's worker commits. A rank that dies takes its worker with it, and nothing is committed.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from megatron.checkpoint.errors import all_ranks_or_none, on_rank_0
from megatron.checkpoint.live_memory import LiveMemory
from megatron.checkpoint.live_run import LiveRun
from megatron.checkpoint.native_manifest import native_manifest
from megatron.checkpoint.progress import Progress
from megatron.checkpoint.saved_streams import RNG_FILE, streams_content
from megatron.checkpoint.saving import pointers_to, require_room, tell_removed
from megatron.checkpoint.snapshot import Snapshot, take_snapshot
from megatron.checkpoint.staging_memory import StagingMemory, available_bytes, bytes_to_copy, is_supported
from megatron.checkpoint.state_digest import digest_rows, summed_digests
from megatron.parallel.agreement import failures_everywhere, gathered
from megatron.ucp import commit
from megatron.ucp.crc32 import crc32
from megatron.ucp.digest import total
from megatron.ucp.manifest import FileInfo
from megatron.ucp.retention import Keep
from megatron.ucp.save_job import DigestRow, FileToWrite, Values
from megatron.ucp.save_worker import Answer, CommitOrder, SaveWorker, SaveWorkerError, WriteOrder

log = logging.getLogger(__name__)

_SHARE = 0.5
"""Of the memory that is available on a host, for all of its ranks' copies."""
_SPARE = 1.02
"""What is reserved over what the state needs: small tensors come and go."""
_SHARE_OF_A_PROCESSOR = 0.05
"""That a rank's worker takes where training computes on the processors: steps beside a save are not to be a twentieth
slower."""
_TELLS_EVERY = 60.0
"""Seconds."""
_WAITS = 0.5
"""Seconds between two agreements while nothing else is to be done."""


@dataclass(frozen=True)
class SaveEvent:
    """What became of a save. The same on every rank, but for the seconds."""

    kind: Literal["staged", "written", "durable", "failed"]
    iteration: int
    """Of the save."""
    seconds: float
    """Since it began; of `staged`, that training waited."""
    error: str = ""


@dataclass
class _InFlight:
    final: Path
    staging: Path
    iteration: int
    snapshot: Snapshot
    rows: list[DigestRow]
    started: float
    waited: float
    """Seconds that training has."""
    steps_taken: int
    """By the optimizer, of the state that is saved."""
    copying: threading.Thread | None = None
    """What is left of it, after which the worker is told; on this rank."""
    hook: RemovableHandle | None = None
    """Has the optimizer wait for `copying`."""
    is_staged: bool = False
    """On every rank; the same on every rank."""
    problem: str = ""
    """On this rank."""
    is_committing: bool = False
    digest: str = ""
    num_bytes: int = 0


class BackgroundSaves:
    """`max_gib`: of host memory for each rank's copy; by default half of what is available on its host, shared by its
    ranks. `keep`: which earlier checkpoints stay."""

    def __init__(self, live: LiveRun, max_gib: float | None = None, keep: Keep | None = None):
        self._live, self._max_gib, self._keep = live, max_gib, keep or Keep()
        self._memory: StagingMemory | None = None
        self._worker: SaveWorker | None = None
        self._in_flight: _InFlight | None = None
        self._has_told = False
        self._hears_of_steps = True
        """Whether the optimizer is known to tell before it changes anything."""

    def __enter__(self) -> BackgroundSaves:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_busy(self) -> bool:
        """The same on every rank."""
        return self._in_flight is not None

    def prepare(self) -> bool:
        """Memory for the copy, touched, and the process that will write it: otherwise the first save pays for both.
        Whether there is room, on every rank. Collective over the world."""
        memory = LiveMemory()
        for weight in self._live.state.held_weights():
            memory.hold(weight)
        digest_rows(self._live.state, memory.hold, with_experts=False)
        return self._reserve(int(_SPARE * bytes_to_copy(memory.tensors)) + (1 << 20))

    def begin(self, folder: Path, progress: Progress) -> bool:
        """The state as it is now, to `folder`/global_step<iteration>. False where a rank has no memory for a copy of
        it: then nothing is staged, and the caller saves as training waits. Collective over the world. Raises
        CheckpointError on every rank where one of them failed."""
        if self._in_flight is not None:
            raise RuntimeError("a save is in flight: wait for it first")
        started, live = time.perf_counter(), self._live
        final = folder / f"global_step{progress.iteration}"
        with all_ranks_or_none("saving", final):
            live.state.make_states(is_saved=True)
        staging = on_rank_0(lambda: _staged(final))
        memory, files = LiveMemory(), list[FileToWrite]()
        with all_ranks_or_none("staging", final):
            snapshot = take_snapshot(live, staging, progress, memory, files.append)
            rows = digest_rows(live.state, memory.hold)
        require_room(final, files, memory)
        if not self._reserve(bytes_to_copy(memory.tensors)):
            return False
        unchanging = self._unchanging(memory, rows) if self._hears_of_steps else set()
        placed, copy_rest = tuple[Values, ...](), None
        with all_ranks_or_none("staging", final):
            assert self._memory is not None
            placed, copy_rest = self._memory.begin_copy(memory.tensors, unchanging)
        share = _SHARE_OF_A_PROCESSOR if live.engine.device.type == "cpu" else 1.0
        order = WriteOrder(staging, self._memory.num_bytes, tuple(files), tuple(rows), placed, share)
        taken = live.state.steps_taken
        self._in_flight = save = _InFlight(final, staging, progress.iteration, snapshot, rows, started, 0.0, taken)
        if copy_rest is None:
            self._send(save, order)
        else:
            save.copying = threading.Thread(target=self._copy_and_send, args=(save, order, copy_rest))
            save.copying.start()
            save.hook = live.state.before_next_step(self._finish_copy)
        save.waited = time.perf_counter() - started
        return True

    def _copy_and_send(self, save: _InFlight, order: WriteOrder, copy_rest: Callable[[], None]) -> None:
        try:
            copy_rest()
        except Exception as error:
            save.problem = f"copying failed: {type(error).__name__}: {error}"
        else:
            self._send(save, order)

    def _send(self, save: _InFlight, order: WriteOrder) -> None:
        try:
            assert self._worker is not None
            self._worker.send(order)
        except SaveWorkerError as error:
            save.problem = str(error)

    def _unchanging(self, memory: LiveMemory, rows: Sequence[DigestRow]) -> set[int]:
        """Addresses of the storages that only the optimizer's step changes."""
        held = [*(memory.tensors[row.tensor] for row in rows), *self._live.state.held_weights()]
        return {tensor.untyped_storage().data_ptr() for tensor in held}

    def _finish_copy(self) -> None:
        """Called in the middle of a step too, where a rank by itself may not raise."""
        save = self._in_flight
        if save is None or save.copying is None or save.hook is None:
            return
        started = time.perf_counter()
        save.copying.join()
        save.hook.remove()
        save.copying = None
        if self._live.state.steps_taken != save.steps_taken:
            self._hears_of_steps = False
            save.problem = (
                f"the optimizer ({type(self._live.state.base).__name__}) has changed the state before it was copied: "
                "it takes steps that torch's register_step_pre_hook does not tell of. Later saves are copied at once"
            )
            self._drop_worker()  # which was told before anybody could know
        save.waited += time.perf_counter() - started

    def poll(self, seconds: float = 0.0) -> Iterator[SaveEvent]:
        """What has happened since the last call; waits up to `seconds` for this rank's worker. At no cost while nothing
        is in flight, else an agreement of one number. Collective over the world. Raises DivergedCopiesError."""
        save = self._in_flight
        if save is None:
            return
        if not save.is_staged:
            self._finish_copy()
            save.is_staged = True
            log.info("staged %s, training waited %.3f s; it is written meanwhile", save.final, save.waited)
            yield SaveEvent("staged", save.iteration, save.waited)
        if not self._everyone_has_an_answer(save, seconds):
            return
        if save.is_committing:
            yield self._committed(save)
        else:
            yield self._written(save)

    def wait(self) -> Iterator[SaveEvent]:
        """Until nothing is in flight, which now has all of the machine. Collective over the world."""
        self._finish_copy()
        if self._in_flight is not None and self._worker is not None:
            self._worker.hurry()
        began = told = time.monotonic()
        while self._in_flight is not None:
            yield from self.poll(_WAITS)
            if time.monotonic() - told > _TELLS_EVERY:
                told = time.monotonic()
                log.warning("warning: the save is still being written; training has waited %.0f s", told - began)

    def close(self) -> None:
        """Without waiting: a save that is in flight is left undone. Local."""
        self._finish_copy()
        self._drop_worker()
        if self._memory is not None:
            self._memory.close()
        self._memory = self._in_flight = None

    def _drop_worker(self) -> None:
        """The next save starts another."""
        if self._worker is not None:
            self._worker.close()
        self._worker = None

    def _reserve(self, num_bytes: int) -> bool:
        """Memory and worker, on every rank or on none."""
        held = self._memory.num_bytes if self._memory else 0
        more = max(0, num_bytes - held)
        refusal = self._refusal(num_bytes, more) if any(gathered(more)) else ""
        problem = ""
        if not refusal:
            try:
                self._memory = self._memory or StagingMemory()
                self._memory.reserve(num_bytes)
                if self._worker is not None and not self._worker.is_running:
                    self._drop_worker()  # killed while it had nothing to do
                self._worker = self._worker or SaveWorker.start(self._memory.handle)
            except (OSError, SaveWorkerError) as error:
                problem = f"{type(error).__name__}: {error}"
        problems = [text for text in gathered(refusal or problem) if text]
        if problems and not self._has_told:
            log.warning("warning: saves are written while training waits: %s", problems[0])
            self._has_told = True
        return not problems

    def _refusal(self, num_bytes: int, more: int) -> str:
        """Why there is no room for this rank's copy; empty if there is. Collective."""
        everywhere = gathered((socket.gethostname(), more, available_bytes()))
        on_host = [(need, free) for host, need, free in everywhere if host == socket.gethostname()]
        needed, available = sum(need for need, _ in on_host), min(free for _, free in on_host)
        if not is_supported():
            return "this system has no memory that belongs to no file (memfd_create)"
        if self._max_gib is not None:
            if num_bytes > self._max_gib * 2**30:
                return f"a copy of a rank's state takes {num_bytes / 2**30:.2f} GiB, --async-save-max-gib allows less"
            return ""
        if needed > _SHARE * available:
            return (
                f"copies of its ranks' states take {needed / 2**30:.2f} GiB of host {socket.gethostname()}, of "
                f"{available / 2**30:.2f} available (--async-save-max-gib says how much may be taken)"
            )
        return ""

    def _everyone_has_an_answer(self, save: _InFlight, seconds: float) -> bool:
        is_asked = (not save.is_committing or dist.get_rank() == 0) and not save.problem
        is_known = not is_asked or self._worker is None or self._worker.has_answer(seconds)
        has_one = torch.tensor([is_known], dtype=torch.int32)
        has_one = has_one.to(self._live.engine.device)
        dist.all_reduce(has_one, op=dist.ReduceOp.MIN)
        return bool(has_one.item())

    def _answer(self, save: _InFlight) -> Answer:
        """Raises SaveWorkerError, also where the worker says that it failed."""
        if save.problem:
            raise SaveWorkerError(save.problem)
        assert self._worker is not None
        try:
            answer = self._worker.receive()
        except SaveWorkerError:
            self._drop_worker()
            raise
        if answer.error:
            raise SaveWorkerError(answer.error)
        return answer

    def _written(self, save: _InFlight) -> SaveEvent:
        answer, live = Answer(), self._live
        self._in_flight = None  # whatever is raised here, this save is over
        with failures_everywhere() as failures:
            answer = self._answer(save)
        if failures.by_rank:
            return self._failed(save, failures.by_rank)
        digests = summed_digests(live.state, save.rows, answer.digests)
        streams = streams_content(gathered(save.snapshot.streams))
        files = {name: info for of_rank in gathered(answer.files) for name, info in of_rank.items()}
        files[RNG_FILE] = FileInfo(len(streams), f"{crc32(streams):08x}")
        files = dict(sorted(files.items()))
        manifest = native_manifest(
            live.state,
            save.snapshot.part,
            digests,
            files,
            model=live.model,
            common=save.snapshot.common,
            excludes_frozen=live.excludes_frozen,
        )
        pointers = pointers_to(save.final, save.iteration)
        order = CommitOrder(save.staging, save.final, manifest, ((RNG_FILE, streams),), pointers, self._keep)
        with failures_everywhere() as failures:
            if dist.get_rank() == 0 and self._worker is not None:
                self._worker.send(order)
        if failures.by_rank:
            return self._failed(save, failures.by_rank)
        self._in_flight = save
        save.is_committing, save.digest = True, total(digests.whole)
        save.num_bytes = sum(info.bytes for info in files.values())
        return SaveEvent("written", save.iteration, time.perf_counter() - save.started)

    def _committed(self, save: _InFlight) -> SaveEvent:
        self._in_flight = None
        removed: tuple[str, ...] = ()
        with failures_everywhere() as failures:
            if dist.get_rank() == 0:
                removed = self._answer(save).removed
        if failures.by_rank:
            return self._failed(save, failures.by_rank)
        seconds = time.perf_counter() - save.started
        log.info(
            "saved %s: %.1f MiB in %.2f s behind training, which waited %.3f s; state digest %s",
            save.final,
            save.num_bytes / 2**20,
            seconds,
            save.waited,
            save.digest,
        )
        tell_removed(removed)
        return SaveEvent("durable", save.iteration, seconds)

    def _failed(self, save: _InFlight, by_rank: dict[int, str]) -> SaveEvent:
        rank, text = min(by_rank.items())
        error = f"saving {save.final} failed on {len(by_rank)} of {dist.get_world_size()} ranks\nrank {rank}: {text}"
        log.error("error: %s\nThe checkpoint before is untouched.", error)
        return SaveEvent("failed", save.iteration, time.perf_counter() - save.started, error)


def _staged(final: Path) -> Path:
    final.parent.mkdir(parents=True, exist_ok=True)
    if removed := commit.remove_left_overs(final.parent):
        log.info("removed what earlier saves had left unfinished in %s: %s", final.parent, ", ".join(removed))
    return commit.stage(final, replace=True)
