"""A signal that asks the run to save and end at the next iteration, whoever sends it to whom.

Launchers, schedulers and shells send the signal to every process that they find, data-loader workers
included, and often twice. Here it is remembered; in the workers it is blocked, since they end with their rank anyway.

    stop = StopSignal.install("SIGTERM", grace=25)
    with without_signals(["SIGTERM"]):          # processes started inside never see it
        loader = iter(...)
    if stop.is_set: ...
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

FORCED = 128 + signal.SIGTERM
"""Exit code of a run that did not end in time: a shell's, of a process that the signal ended."""


class StopSignal:
    def __init__(self, name: str) -> None:
        self.name, self.is_set = name, False

    @classmethod
    def install(cls, name: str, grace: float | None = None) -> StopSignal:
        """`grace`: seconds after the signal in which the process has to have ended; then it is ended, as it is."""
        stop = cls(name)
        if grace is not None:
            stop._watch(grace)
        signal.signal(signal.Signals[name], stop._handle)
        # Before multiprocessing's own end, which sends SIGTERM to workers and waits for them.
        atexit.register(_end_workers)
        return stop

    def ignore(self) -> None:
        """From here on: the run ends by itself, and a second signal must not turn its success into a failure."""
        signal.signal(signal.Signals[self.name], signal.SIG_IGN)

    def _handle(self, number: int, frame: Any) -> None:
        self.is_set = True

    def _watch(self, grace: float) -> None:
        """A thread that Python's own C handler wakes: a main thread that is stuck in a collective runs no handler."""
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        signal.set_wakeup_fd(writes, warn_on_full_buffer=False)

        def watch() -> None:
            while signal.Signals[self.name] not in os.read(reads, 64):
                pass
            time.sleep(grace)
            print(
                f"\nStopSignal: {self.name} came {grace:g} s ago and the run has not saved and ended: it is stopped "
                "where it stands. Earlier checkpoints are as they were; what was being written is removed by the next "
                "save. What to do: a longer --exit-signal-grace, or --async-save",
                file=sys.stderr,
                flush=True,
            )
            os._exit(FORCED)

        threading.Thread(target=watch, name="exit-signal-grace", daemon=True).start()


@contextmanager
def without_signals(names: Iterable[str]) -> Iterator[None]:
    """Blocked in this thread, and for good in the processes that it starts meanwhile; delivered here afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.Signals[name] for name in names])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_workers() -> None:
    workers = multiprocessing.active_children()
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would call this a crash of the worker
    for worker in workers:
        worker.kill()
