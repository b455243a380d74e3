"""Where the time of a step goes: data, forward, backward, optimizer, communication; the rest is the loop's own.

times = StepTimes(wait=accelerator.synchronize)
with times.measuring():                     # one step; communication is found by itself
    with times.part("forward"): ...
times.taken()                               # {"forward": 0.2, "communication": 0.05, ...} seconds a step; starts anew

Parts do not overlap: what is communicated inside forward counts as communication only. Where a device works beside the
host, each boundary waits for it, so only steps that are logged should be measured there (`is_free` is False).
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import deepspeed.comm
import torch.distributed

PARTS = ("data", "forward", "backward", "optimizer", "communication", "other")

_COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter", "barrier"),
    *("reduce_scatter_tensor", "all_to_all", "all_to_all_single", "send", "recv", "broadcast_object_list"),
    *("all_gather_object", "all_gather_coalesced", "all_reduce_coalesced"),
)


class StepTimes:
    """Local: of this rank's clock. What is asked for outside of `measuring` costs nothing and is not counted."""

    def __init__(
        self, wait: Callable[[], object] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`wait`: for the device, at each boundary; None where the host computes itself."""
        self._wait, self._clock = wait, clock
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._steps = 0
        self._open: list[str] = []
        self._since = 0.0

    @property
    def is_free(self) -> bool:
        """Measuring costs nothing to speak of, so that every step may be."""
        return self._wait is None

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for module in (torch.distributed, deepspeed.comm):
                stack.enter_context(self._noticing(module))
            self._since, self._open = self._now(), ["other"]
            try:
                yield
                self._count()
                self._steps += 1
            finally:
                self._open = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self._open:
            yield
            return
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            if self._open:
                self._count()
                self._open.pop()

    def taken(self) -> dict[str, float]:
        """Mean seconds of each part since the last call, over the steps that were measured; empty if none was."""
        means = {name: seconds / self._steps for name, seconds in self._seconds.items()} if self._steps else {}
        self._seconds, self._steps = dict.fromkeys(PARTS, 0.0), 0
        return means

    def _count(self) -> None:
        """What has passed since the last boundary belongs to the innermost part."""
        now = self._now()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now

    def _now(self) -> float:
        if self._wait is not None:
            self._wait()
        return self._clock()

    @contextlib.contextmanager
    def _noticing(self, module: ModuleType) -> Iterator[None]:
        """While a step is measured, the collectives of a module are timed where they are called by its name. One that
        is started and waited for later counts as far as its start."""
        replaced = {name: getattr(module, name) for name in _COLLECTIVES if hasattr(module, name)}
        try:
            for name, collective in replaced.items():
                setattr(module, name, self._timed(collective))
            yield
        finally:
            for name, collective in replaced.items():
                setattr(module, name, collective)

    def _timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part("communication"):
                return collective(*args, **kwargs)

        return timed
