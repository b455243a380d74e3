"""Does the state change while nobody writes to it? What memory, a driver or a stray pointer does to masters and moments
between the end of a step and the beginning of the next is in every later loss and in every later checkpoint.

    watch = StateWatch(live.state)
    watch.remember(iteration)          # after a step
    watch.check()                      # before the next one: StateChangedError names rank, parameter, state, step

What only fills up (a padded vocabulary, the end of a flat buffer) is no part of a state, and not watched.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist

from megatron.checkpoint.live_memory import LiveMemory
from megatron.checkpoint.state_digest import digest_rows, summed_digests
from megatron.engine.engine_state import EngineState
from megatron.parallel.agreement import gathered
from megatron.parallel.rank_errors import reported_by_rank_0
from megatron.ucp.errors import listed
from megatron.ucp.save_job import DigestRow, RowDigests, digest_row


class StateChangedError(RuntimeError):
    """Masters, moments or weights are not what the last step left. Raised on every rank."""

    def __init__(self, told: str, iteration: int, left: Mapping[str, Mapping[str, str]]):
        super().__init__(told)
        self.iteration = iteration
        """Of the last step."""
        self.left = left
        """The digests of what it left; empty where live weights have changed, of which none is kept."""

    def is_in(self, iteration: int | None, digests: Mapping[str, Mapping[str, str]]) -> bool:
        """Whether a checkpoint of that iteration with these digests may hold what has changed."""
        return iteration == self.iteration and (not self.left or digests != self.left)


class StateWatch:
    def __init__(self, state: EngineState):
        self._state = state
        self._iteration: int | None = None
        self._left: list[RowDigests] = []
        self._left_in_all: Mapping[str, Mapping[str, str]] = {}

    def remember(self, iteration: int) -> None:
        """What the step left. Collective over the world. Raises DivergedCopiesError where ranks' copies differ."""
        rows, self._left = self._digests()
        self._iteration = iteration
        self._left_in_all = summed_digests(self._state, rows, self._left).whole

    def check(self) -> None:
        """Nothing where nothing is remembered. Collective over the world. Raises StateChangedError."""
        iteration, self._iteration = self._iteration, None
        if iteration is None:
            return
        rows, found = self._digests()
        pairs = zip(rows, found, self._left, strict=True)
        changed = [f"{row.name} ({row.state})" for row, now, was in pairs if now != was]
        stale = [f"{name} (live weights)" for name in self._state.stale_weights() if f"{name} (fp32)" not in changed]
        everywhere = gathered(([*changed, *stale], bool(stale)))
        lines = [f"rank {rank}: {listed(of_rank, 5)}" for rank, (of_rank, _) in enumerate(everywhere) if of_rank]
        if lines:
            with reported_by_rank_0(dist.get_rank()):
                raise StateChangedError(
                    f"the state changed after step {iteration} had ended and before the next began, while nothing "
                    "writes to it:\n  " + "\n  ".join(lines[:20]) + "\nWhat to do: go on from a checkpoint of before "
                    f"iteration {iteration}; if it happens again on the same rank, its memory is failing",
                    iteration,
                    {} if any(has_stale for _, has_stale in everywhere) else self._left_in_all,
                )

    def _digests(self) -> tuple[list[DigestRow], list[RowDigests]]:
        memory = LiveMemory()
        rows = digest_rows(self._state, memory.hold, with_experts=False)
        return rows, [digest_row(row, memory) for row in rows]
