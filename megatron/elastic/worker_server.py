"""The process from which an agent's ranks are forked: what a rank imports is there already, so that a restart costs a
fork and not seconds.

It belongs to one agent and ends with it. For each rank it has a proxy (proxy.py), which torch's agent takes for the
rank; where a proxy is gone, its rank is ended, unless it was asked to end and is about to save: then the next rank in
its place waits for it.

    python -m megatron.elastic.worker_server SOCKET --agent PID --job JSON --save RUN_FOLDER --max-failures N \
        --grace SECONDS [--preload]
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import math
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron.elastic.launch import take
from megatron.elastic.orphans import end_with_parent
from megatron.elastic.worker import INTERRUPTED, Job, work
from megatron.ucp.pointers import LATEST, read_pointer

_MAX_REQUEST = 1 << 22
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
GIVEN_UP = 1


@dataclass
class _Rank:
    """One that was asked for: its proxy, and the process once it was started."""

    proxy: socket.socket | None
    environment: Mapping[str, str]
    outputs: list[int]
    pid: int | None = None
    was_asked_to_end: bool = False
    is_ended_at: float = math.inf
    """Monotonic; of one that has no proxy any more and is about to save."""

    @property
    def place(self) -> str:
        return self.environment.get("LOCAL_RANK", "0")

    @property
    def start(self) -> str:
        """The same for the ranks that began together."""
        return f"{self.environment.get('MASTER_ADDR')}:{self.environment.get('MASTER_PORT')}"

    def forget_proxy(self) -> None:
        if self.proxy is not None:
            self.proxy.close()
            self.proxy = None


@dataclass
class Failures:
    """Of the starts of one agent's workers, one after the other, since the newest checkpoint changed."""

    save_folder: Path
    limit: int
    newest: str = ""
    count: int = 0
    last: str = ""

    def add(self, start: str) -> None:
        """A worker has failed; those of one start count once."""
        if start == self.last:
            return
        newest, self.last = self._newest(), start
        self.count = self.count + 1 if newest == self.newest else 1
        self.newest = newest

    @property
    def are_too_many(self) -> bool:
        return self.count >= self.limit and self._newest() == self.newest

    def told(self) -> str:
        return (
            f"elastic: {self.count} starts ended in failure without a new checkpoint ({self.newest or 'none'} in "
            f"{self.save_folder}): this agent gives up. What to do: look at the first error above; a higher "
            "--max-failures, or a smaller --save-interval"
        )

    def _newest(self) -> str:
        return read_pointer(self.save_folder, LATEST).named


@dataclass
class Server:
    path: str
    job: Job
    agent: int
    failures: Failures
    grace: float
    """Seconds for a last save, of a rank whose proxy is gone: one that stands still does not end by itself."""
    ranks: list[_Rank] = field(default_factory=list)

    def serve(self) -> None:
        """Until the process is ended."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(self.path)
        listener.listen(1024)
        reads, writes = os.pipe()
        for end in (reads, writes):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        # A terminal and a scheduler send them to all processes; this one has to outlive its ranks' last saves.
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self._inherited = [listener.fileno(), reads, writes]
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            selector.register(reads, selectors.EVENT_READ)
            self._selector = selector
            while True:
                for key, _ in selector.select(self._seconds_to_wait()):
                    if key.fileobj is listener:
                        self._accept(listener)
                    elif key.fileobj == reads:
                        with contextlib.suppress(BlockingIOError):
                            os.read(reads, 4096)
                        self._reap()
                    else:
                        self._hear(key.data)
                self._end_those_who_are_late()
                self._start_those_who_can()

    def _seconds_to_wait(self) -> float | None:
        """None: until something happens."""
        first = min((rank.is_ended_at for rank in self.ranks), default=math.inf)
        return None if first == math.inf else max(0.0, first - time.monotonic())

    def _end_those_who_are_late(self) -> None:
        for rank in self.ranks:
            if rank.pid is not None and time.monotonic() >= rank.is_ended_at:
                rank.is_ended_at = math.inf
                os.kill(rank.pid, signal.SIGKILL)

    def _accept(self, listener: socket.socket) -> None:
        proxy, _ = listener.accept()
        try:
            environment, outputs = _request(proxy)
        except (OSError, ValueError, RecursionError):
            proxy.close()
            return
        rank = _Rank(proxy, environment, outputs)
        self.ranks.append(rank)
        self._selector.register(proxy, selectors.EVENT_READ, rank)

    def _hear(self, rank: _Rank) -> None:
        assert rank.proxy is not None
        try:
            numbers = rank.proxy.recv(256).split()
        except OSError:
            numbers = []
        if not numbers:
            self._selector.unregister(rank.proxy)
            rank.forget_proxy()
            if rank.pid is None:
                self._drop(rank)
            elif rank.was_asked_to_end:
                rank.is_ended_at = time.monotonic() + self.grace
            else:
                os.kill(rank.pid, signal.SIGKILL)
        for number in map(int, numbers):
            rank.was_asked_to_end = True
            if rank.pid is None:  # it waits for its place
                self._answer(rank, number)
                return
            os.kill(rank.pid, number)

    def _start_those_who_can(self) -> None:
        for rank in [rank for rank in self.ranks if rank.pid is None]:
            if any(other.pid is not None and other.place == rank.place for other in self.ranks):
                continue  # the one before it is still saving
            if self.failures.are_too_many:
                print(self.failures.told(), file=sys.stderr, flush=True)
                self._answer(rank, GIVEN_UP << 8)
                os.kill(self.agent, signal.SIGTERM)
                continue
            self._fork(rank)

    def _fork(self, rank: _Rank) -> None:
        server = os.getpid()
        rank.pid = os.fork()
        if rank.pid == 0:
            try:
                end_with_parent(server)
                signal.set_wakeup_fd(-1)
                for number in (signal.SIGCHLD, *_SIGNALS):
                    signal.signal(number, signal.SIG_DFL)
                self._selector.close()
                others = [each.proxy.fileno() for each in self.ranks if each.proxy is not None]
                waiting = [handle for each in self.ranks if each is not rank for handle in each.outputs]
                for handle in (*self._inherited, *others, *waiting):
                    os.close(handle)
                run_rank(self.job, rank.environment, rank.outputs)
            finally:
                os._exit(1)
        for handle in rank.outputs:
            os.close(handle)
        rank.outputs = []

    def _reap(self) -> None:
        for rank in [rank for rank in self.ranks if rank.pid is not None]:
            assert rank.pid is not None
            pid, status = os.waitpid(rank.pid, os.WNOHANG)
            if pid:
                if not rank.was_asked_to_end and os.waitstatus_to_exitcode(status) not in (0, INTERRUPTED):
                    self.failures.add(rank.start)
                self._answer(rank, status)

    def _answer(self, rank: _Rank, status: int) -> None:
        if rank.proxy is not None:
            with contextlib.suppress(OSError):
                rank.proxy.sendall(b"%d\n" % status)
            self._selector.unregister(rank.proxy)
            rank.forget_proxy()
        self._drop(rank)

    def _drop(self, rank: _Rank) -> None:
        for handle in rank.outputs:
            os.close(handle)
        self.ranks.remove(rank)


def run_rank(job: Job, environment: Mapping[str, str], outputs: list[int]) -> None:
    """In the forked process; ends it."""
    code = 1
    try:
        take(environment)
        for target, handle in zip((1, 2), outputs, strict=True):
            os.dup2(handle, target)
            os.close(handle)
        code = work(job)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def _request(proxy: socket.socket) -> tuple[dict[str, str], list[int]]:
    """Raises ValueError, OSError."""
    proxy.settimeout(10)
    content, outputs = b"", []
    while not content.endswith(b"\n"):
        part, handles, _, _ = socket.recv_fds(proxy, 1 << 16, 2)
        outputs += handles
        content += part
        if not part or len(content) > _MAX_REQUEST:
            raise ValueError("no request")
    if len(outputs) != 2:
        raise ValueError("a request without output")
    proxy.settimeout(None)
    return json.loads(content), outputs


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="worker_server")
    parser.add_argument("socket")
    parser.add_argument("--agent", type=int, required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--save", required=True)
    parser.add_argument("--max-failures", type=int, required=True)
    parser.add_argument("--grace", type=float, required=True)
    parser.add_argument("--preload", action="store_true")
    given = parser.parse_args(argv)
    end_with_parent(given.agent)
    if given.preload:
        from megatron.elastic.preload import preload

        preload()
    job = json.loads(given.job)
    server = Server(
        given.socket,
        Job(tuple(job["argv"]), tuple(job["store"]), job["topologies"]),
        given.agent,
        Failures(Path(given.save), given.max_failures),
        given.grace,
    )
    server.serve()


if __name__ == "__main__":
    main(sys.argv[1:])
