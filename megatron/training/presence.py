"""Which rank is missing when a collective does not end: each rank says in the process group's store that it is there.

A thread of every rank writes "I am here, at this iteration" every few seconds. A process that was
stopped or killed, or whose machine is gone, no longer does; one that only waits for it still does. So whoever sees a
collective fail can name the rank to look at, and rank 0 can say so while the wait still lasts.

    with Presence.of_world() as presence:
        presence.at(iteration)              # cheap: no message of its own
        dist.all_reduce(...)                # fails: LostRankError, with the rank, its host and its last iteration

Not collective. A run of one process has nobody to miss.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist
from torch.distributed import distributed_c10d

log = logging.getLogger(__name__)

INTERVAL = 5.0
"""Seconds between two signs of a rank."""
_MISSED = 3
"""Signs that may be missed before a rank is called missing; a machine that swaps is late, not gone."""


class LostRankError(RuntimeError):
    """A collective failed because a rank is gone or stands still; the message names it. Raised on the ranks left."""


@dataclass(frozen=True)
class Sign:
    """The last that was heard of a rank."""

    rank: int
    count: int
    iteration: int
    host: str
    pid: int
    error: str
    """With which it left, if it did, unless it was another that it waited for."""
    is_waiting: bool
    """It saw a collective fail itself, so it is not the one to look for, silent or not."""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid}), last seen at iteration {self.iteration}"


class Presence:
    """A context manager: the thread runs inside it, and a collective that fails inside it names who is missing."""

    def __init__(
        self,
        store: dist.Store | None,
        rank: int,
        world_size: int,
        timeout_minutes: float,
        interval: float = INTERVAL,
        looks_for_lost: bool = True,
    ) -> None:
        """`store` is this object's own connection (a clone), or None for a run of one process. `looks_for_lost`: a
        failure is raised when the rank is known; else at once, for agents that start all again."""
        self._store, self._rank, self._world_size = store, rank, world_size
        self._timeout_minutes, self._interval = timeout_minutes, interval
        self._looks_for_lost = looks_for_lost
        self._iteration = self._count = 0
        self._error, self._is_waiting = "", False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)
        if store is not None:
            store.set_timeout(timedelta(seconds=4 * interval))

    @classmethod
    def of_world(
        cls, timeout_minutes: float = 10, interval: float = INTERVAL, *, looks_for_lost: bool = True
    ) -> Presence:
        """Of torch.distributed, which must be initialised."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        store = None
        if world_size > 1:
            store = dist.PrefixStore("megatron/presence", distributed_c10d._get_default_store().clone())  # type: ignore[attr-defined]
        return cls(store, rank, world_size, timeout_minutes, interval, looks_for_lost)

    def at(self, iteration: int) -> None:
        """This rank begins `iteration`."""
        self._iteration = iteration

    def __enter__(self) -> Presence:
        if self._store is not None:
            self._say()
            self._thread.start()
        return self

    def __exit__(self, error_type: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self._store is None or not isinstance(error, Exception):
                return
            if not is_failure_of_collective(error):
                self._error = f"{type(error).__name__}: {_first_line(error)}"
                with contextlib.suppress(Exception):  # the store may have gone with another rank
                    self._say()
                return
            if not self._looks_for_lost:
                raise LostRankError(
                    f"{self._head(error)}The agents start again with the ranks that are left"
                ) from error
            self._is_waiting = True
            text = self._explained(error)
            if self._rank == 0:
                time.sleep(self._interval)  # its process may hold the store: the others still listen
            raise LostRankError(text) from error
        finally:
            self._ended.set()
            if self._store is not None:
                # A thread that is inside the store's C++ while the interpreter ends would abort the process.
                self._thread.join(timeout=self._interval)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Says so at every interval; on rank 0 tells in the log of ranks that became silent, once each."""
        seen: dict[int, tuple[int, float]] = {}
        told: set[int] = set()
        while not self._ended.wait(self._interval):
            try:
                self._say()
                if self._rank == 0:
                    self._watch(seen, told)
            except Exception:
                # The store is gone with its process. Collectives fail for the same reason, and that is told there.
                return

    def _watch(self, seen: dict[int, tuple[int, float]], told: set[int]) -> None:
        now = time.monotonic()
        for sign in self._signs().values():
            count, since = seen.get(sign.rank, (-1, now))
            if sign.count != count:
                seen[sign.rank] = sign.count, now
                if sign.rank in told:
                    told.discard(sign.rank)
                    log.warning("warning: rank %d answers again", sign.rank)
            elif sign.rank not in told and now - since > _MISSED * self._interval:
                told.add(sign.rank)
                log.warning(
                    "warning: %s has not answered for %d s. Collectives wait for it up to %g minutes "
                    "(--distributed-timeout-minutes)",
                    sign,
                    now - since,
                    self._timeout_minutes,
                )

    def _say(self) -> None:
        self._count += 1
        sign = [self._count, self._iteration, socket.gethostname(), os.getpid(), self._error, self._is_waiting]
        self._store.set(str(self._rank), json.dumps(sign))

    # -- what is known of the others -----------------------------------------------------------------------------

    def _signs(self) -> dict[int, Sign]:
        """Of the ranks that have ever said something."""
        known = [str(rank) for rank in range(self._world_size)]
        if not self._store.check(known):  # one question, but for the first moments
            known = [rank for rank in known if self._store.check([rank])]
        texts = self._store.multi_get(known)
        return {int(rank): Sign(int(rank), *json.loads(text)) for rank, text in zip(known, texts, strict=True)}

    def missing(self) -> list[Sign]:
        """The ranks that left with an error, or else those that are silent while this one listens for as many
        intervals as a rank may miss. Raises what the store raises where it is gone."""
        self._say()
        before = self._signs()
        left = [sign for sign in before.values() if sign.error]
        if left:
            return left
        time.sleep(_MISSED * self._interval)
        after = {rank: sign for rank, sign in self._signs().items() if rank in before}
        return [sign for sign in after.values() if sign.count == before[sign.rank].count and not sign.is_waiting]

    def _explained(self, error: BaseException) -> str:
        head = self._head(error)
        advice = (
            "What to do: look at that process and its machine (killed, out of memory, network); start again with "
            "--load, on the machines that are left if need be. The last checkpoint is untouched"
        )
        try:
            gone = self.missing()
        except Exception:
            return (
                f"{head}The process group's store no longer answers: its process (rank 0, or the launcher on the "
                f"first machine) is gone or stands still. {advice}"
            )
        if not gone:
            return (
                f"{head}Every rank still answers: one of them is busy elsewhere, or the network lost a connection. "
                f"Iterations: {self._iterations()}. {advice}"
            )
        lines = [f"It left with {sign.error}: {sign}\n" if sign.error else f"No answer from {sign}\n" for sign in gone]
        return head + "".join(lines) + advice

    def _head(self, error: BaseException) -> str:
        return f"a collective failed on rank {self._rank} in iteration {self._iteration}: {_first_line(error)}\n"

    def _iterations(self) -> str:
        by_iteration: dict[int, list[int]] = {}
        for sign in self._signs().values():
            by_iteration.setdefault(sign.iteration, []).append(sign.rank)
        return "; ".join(f"ranks {ranks[:8]} at {iteration}" for iteration, ranks in sorted(by_iteration.items()))


_WORDS_OF_GLOO = ("gloo", "application timeout caused pair closure")
"""The second is all that it says of a pair whose earlier collective was waited for in vain."""


def is_failure_of_collective(error: BaseException) -> bool:
    """Whether torch.distributed raised this: it has kinds of its own, and gloo's are plain RuntimeErrors."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    return type(error) is RuntimeError and any(word in str(error).lower() for word in _WORDS_OF_GLOO)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
