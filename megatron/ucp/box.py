"""A box: one block of a parameter, where it lies in the whole and where it lies in a rank's shard.

Every way of cutting a parameter is a few boxes per rank, so whatever reads and writes boxes needs to
know nothing about tensor, expert or pipeline parallelism.

    box = Box(atomic=((4, 8), (0, 16)), shard=((0, 4), (0, 16)))   # rows 4..7 of the whole are rows 0..3 of the shard
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Range = tuple[int, int]


@dataclass(frozen=True)
class Box:
    atomic: tuple[Range, ...]
    shard: tuple[Range, ...]

    def __post_init__(self) -> None:
        assert len(self.atomic) == len(self.shard)
        assert all(a1 - a0 == s1 - s0 > 0 for (a0, a1), (s0, s1) in zip(self.atomic, self.shard)), self

    @property
    def numel(self) -> int:
        return math.prod(stop - start for start, stop in self.atomic)

    @property
    def atomic_slices(self) -> tuple[slice, ...]:
        return tuple(slice(*r) for r in self.atomic)

    @property
    def shard_slices(self) -> tuple[slice, ...]:
        return tuple(slice(*r) for r in self.shard)
