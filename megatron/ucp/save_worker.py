"""A process that writes saves behind a training process: python -m megatron.ucp.save_worker, as its parent starts it.

    worker = SaveWorker.start(memory_handle)             # in the training process
    worker.send(WriteOrder(staging, memory_bytes, files, rows, placed))
    worker.has_answer()                                  # at every step, at no cost
    worker.hurry()                                       # where training waits
    answer = worker.receive()                            # Answer, or SaveWorkerError where the process is gone

It has values in memory that it shares with its parent, does one order after the other at a low priority, and ends when
its parent does: an order that is not done by then is left undone, so that nothing is committed for a dead run. It loads
neither torch nor DeepSpeed, opens no socket of the job's, and takes part in no collective.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import numpy as np

from megatron.ucp import commit
from megatron.ucp.disk import disk_errors
from megatron.ucp.errors import NotACheckpointError, listed
from megatron.ucp.manifest import FileInfo, Manifest, write_manifest
from megatron.ucp.retention import Keep
from megatron.ucp.save_job import CopiedMemory, DigestRow, FileToWrite, RowDigests, Values, digest_row, write_files

NICENESS = 10
"""Training goes first where they share processors."""
_HURRY = "hurry"
_ENDS_WITHIN = 10.0
"""Seconds that a worker is given to see that it is no longer needed."""


class SaveWorkerError(RuntimeError):
    """The process that writes saves is gone, or could not be started."""


@dataclass(frozen=True)
class WriteOrder:
    folder: Path
    """That is being written; it is there."""
    memory_bytes: int
    """Of the shared memory, which may have grown."""
    files: tuple[FileToWrite, ...]
    rows: tuple[DigestRow, ...]
    placed: tuple[Values, ...]
    """Where in the memory the numbered tensors lie."""
    share: float = 1.0
    """Of a processor's time that it may take until told to hurry: less than all where training computes on the
    processors itself, and every moment that one of its threads is kept from running all the others wait for it."""


@dataclass(frozen=True)
class CommitOrder:
    staging: Path
    final: Path
    manifest: Manifest
    small_files: tuple[tuple[str, bytes], ...]
    """(name, content) of what is written right before."""
    pointers: tuple[tuple[str, str], ...]
    """(name, content), in the order in which they are moved."""
    keep: Keep = Keep()
    """What stays beside it."""


@dataclass(frozen=True)
class Answer:
    error: str = ""
    """Type and message; empty where the order was done."""
    files: dict[str, FileInfo] = field(default_factory=dict)
    digests: tuple[RowDigests, ...] = ()
    removed: tuple[str, ...] = ()
    """Keep.thin_out's."""


class SaveWorker:
    """The training process's end."""

    def __init__(self, process: subprocess.Popen[bytes], connection: Connection):
        self._process, self._connection = process, connection

    @classmethod
    def start(cls, memory_handle: int) -> SaveWorker:
        """Raises SaveWorkerError."""
        ours, its = Pipe()
        root = str(Path(__file__).resolve().parents[2])
        arguments = [sys.executable, "-c", _START, root, str(its.fileno()), str(memory_handle)]
        try:
            # A process group of its own: a signal to the job's, such as Ctrl-C, is its parent's to act on. Not a
            # session of its own: Linux shares processors among sessions evenly, however nice their processes are.
            process = subprocess.Popen(
                arguments, pass_fds=(its.fileno(), memory_handle), stdin=subprocess.DEVNULL, process_group=0
            )
        except OSError as error:
            raise SaveWorkerError(f"the process that writes saves could not be started: {error}") from error
        finally:
            its.close()
        return cls(process, ours)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def send(self, order: WriteOrder | CommitOrder) -> None:
        """Raises SaveWorkerError."""
        try:
            self._connection.send(order)
        except OSError as error:
            raise self._lost() from error

    def hurry(self) -> None:
        """Whatever it does, at full speed from here on. Where it is gone, `receive` tells."""
        with contextlib.suppress(OSError):
            self._connection.send(_HURRY)

    def has_answer(self, seconds: float = 0.0) -> bool:
        """Whether `receive` returns, or raises, at once; waits for that up to `seconds`."""
        return self._connection.poll(seconds)

    def receive(self) -> Answer:
        """Of the order that was sent last. Raises SaveWorkerError."""
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._lost() from error
        return answer

    def close(self) -> None:
        """Whatever it does is left undone."""
        self._connection.close()
        try:
            self._process.wait(_ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _lost(self) -> SaveWorkerError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        code = self._process.poll()
        how = "it closed its connection" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
        return SaveWorkerError(f"the process that writes saves (pid {self.pid}) is gone: {how}")


class _ParentIsGone(Exception):
    pass


class _Pace:
    """Called often while an order is done: sees whether the parent is there, and rests."""

    def __init__(self, connection: Connection):
        self._connection, self._share, self._worked_until = connection, 1.0, 0.0

    def begin(self, share: float) -> None:
        self._share, self._worked_until = share, time.thread_time()

    def __call__(self) -> None:
        if self._share < 1.0:
            worked = time.thread_time() - self._worked_until
            self._connection.poll(worked * (1.0 / self._share - 1.0))  # a rest that a message ends
            self._worked_until = time.thread_time()
        if self._connection.poll(0):
            try:
                if self._connection.recv() == _HURRY:
                    self._share = 1.0
            except (EOFError, OSError) as error:
                raise _ParentIsGone from error


def serve_parent() -> None:
    """The worker's main function: sys.argv has the handles of the connection and of the memory."""
    connection, memory_handle = Connection(int(sys.argv[2])), int(sys.argv[3])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the end of the connection is what ends it
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    serve(connection, memory_handle)


_START = f"import sys; sys.path[:0] = [sys.argv[1]]; import {__name__} as worker; worker.{serve_parent.__name__}()"
"""What the process is told to run: Python finds this module wherever its parent has found it."""


def serve(connection: Connection, memory_handle: int) -> None:
    """Does orders until the connection ends."""
    pace = _Pace(connection)
    with contextlib.suppress(EOFError, ConnectionError, _ParentIsGone):
        while True:
            order = connection.recv()
            if order == _HURRY:  # it came after the answer
                continue
            try:
                pace.begin(order.share if isinstance(order, WriteOrder) else 1.0)
                answer = _done(order, memory_handle, pace)
            except Exception as error:
                if isinstance(error, _ParentIsGone):
                    raise
                answer = Answer(error=f"{type(error).__name__}: {error}")
            connection.send(answer)


def _done(order: WriteOrder | CommitOrder, memory_handle: int, go_on: Callable[[], None]) -> Answer:
    go_on()
    if isinstance(order, WriteOrder):
        return _written(order, memory_handle, go_on)
    return Answer(removed=tuple(_commit(order)))


def _written(order: WriteOrder, memory_handle: int, go_on: Callable[[], None]) -> Answer:
    mapped = mmap.mmap(memory_handle, max(order.memory_bytes, 1), access=mmap.ACCESS_READ)
    memory = CopiedMemory(order.placed, np.frombuffer(mapped, dtype=np.uint8))
    digests = []
    for row in order.rows:
        go_on()
        digests.append(digest_row(row, memory))
    files = write_files(order.files, order.folder, memory, go_on)
    for name in files:
        with disk_errors(order.folder / name):
            commit.flush(order.folder / name)
    return Answer(files=files, digests=tuple(digests))


def _commit(order: CommitOrder) -> list[str]:
    with disk_errors(order.staging):
        for name, raw in order.small_files:
            (order.staging / name).write_bytes(raw)
        if odd := sorted(set(commit.data_files(order.staging)) ^ set(order.manifest.files)):
            raise NotACheckpointError(
                f"{listed(odd, 5)} are not both in the folder and in the manifest", where=order.staging
            )
        write_manifest(order.staging, order.manifest)
    commit.commit(order.staging, order.final, replace=True)
    for pointer, content in order.pointers:
        commit.point_to(order.final.parent, pointer, content)
    return order.keep.thin_out(order.final.parent, int(order.manifest.iteration or 0))
