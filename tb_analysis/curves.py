"""A curve: one scalar over training steps. The idea: everything after reading is arithmetic on two arrays.

source, target = Curve.from_points(a), Curve.from_points(b)
steps, delta = source.delta(target)          # target - source, on the steps both have
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Point:
    """One logged scalar."""

    step: int
    wall_time: float
    """Seconds since the epoch, as the writer of the event file saw it."""
    value: float


@dataclass(frozen=True)
class Curve:
    """Steps (int64, strictly increasing) and their values (float64; NaN and infinities are kept)."""

    steps: np.ndarray
    values: np.ndarray

    @classmethod
    def from_points(cls, points: Iterable[Point]) -> Curve:
        """Merge the points of any number of event files: for a repeated step the latest wall time wins.

        A run that was restarted from an earlier checkpoint logs some steps twice; what it did last is what
        its next checkpoint holds. Equal wall times: the later in order wins.
        """
        latest: dict[int, Point] = {}
        for point in points:
            known = latest.get(point.step)
            if known is None or point.wall_time >= known.wall_time:
                latest[point.step] = point
        ordered = [latest[step] for step in sorted(latest)]
        return cls(
            np.array([p.step for p in ordered], dtype=np.int64), np.array([p.value for p in ordered], dtype=np.float64)
        )

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def first_step(self) -> int:
        return int(self.steps[0])

    @property
    def last_step(self) -> int:
        return int(self.steps[-1])

    def delta(self, other: Curve, shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Steps both have, and ``other - self`` there; with a shift, other's step s + shift meets s."""
        steps, mine, theirs = np.intersect1d(self.steps, other.steps - shift, assume_unique=True, return_indices=True)
        return steps, other.values[theirs] - self.values[mine]

    def up_to(self, last_step: int) -> Curve:
        keep = self.steps <= last_step
        return Curve(self.steps[keep], self.values[keep])

    def non_finite_steps(self) -> list[int]:
        return [int(step) for step in self.steps[~np.isfinite(self.values)]]
