"""--profile: torch's profiler over a few steps, written as traces that TensorBoard, Perfetto and chrome://tracing open.

with Profiler.of(config.run, rank) as profiler:               # a run that ends before writes what there is
    profiler.before(iteration); ...; profiler.after(iteration)    # a no-op but for --profile_steps on --profile-ranks
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.config.run import RunConfig

log = logging.getLogger(__name__)


@dataclass
class Profiler:
    """Of one rank; local."""

    first: int
    last: int
    """The last step that is in the trace."""
    folder: Path
    rank: int
    is_full: bool
    """With shapes, memory and stacks: larger, slower."""
    _running: Any = field(default=None)

    @classmethod
    def of(cls, run: RunConfig, rank: int) -> Profiler:
        """A no-op where --profile is not given, or this is none of --profile-ranks."""
        first, last = run.profiled_steps if run.profile is not None and rank in run.profile_ranks else (0, -1)
        folder = Path(run.tensorboard_dir or ".")
        return cls(first, last, folder, rank, is_full="pt-full" in (run.profile or ()))

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        self.after(self.last)

    def warn_of(self, first: int, last: int) -> None:
        """If none of the steps that this run takes will be in a trace."""
        if self.first <= self.last and not first <= self.first <= last:
            log.warning(
                "warning: --profile_steps %d,%d begin outside of this run's steps, %d to %d: there will be no trace",
                *(self.first, self.last, first, last),
            )

    def before(self, iteration: int) -> None:
        if iteration != self.first or self.last < self.first:
            return
        from torch.profiler import profile

        full = self.is_full
        self._running = profile(record_shapes=full, profile_memory=full, with_stack=full)
        self._running.__enter__()

    def after(self, iteration: int) -> None:
        if self._running is None or iteration < self.last:
            return
        running, self._running = self._running, None
        running.__exit__(None, None, None)
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"rank{self.rank}-steps{self.first}-{self.last}.pt.trace.json"
        running.export_chrome_trace(str(trace))
        log.info("--profile: wrote %s (TensorBoard, ui.perfetto.dev and chrome://tracing open it)", trace)
