"""What ranks must know of each other before they go on. All are collective over the world.

    with stops_all_ranks("reading the data"):        # the block itself communicates with nobody
        datasets = open_them()
    parts = gathered(my_part)                        # by rank, on every rank

One rank's error becomes every rank's, instead of a hang in the next collective.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from megatron.parallel.rank_errors import REPORTED_ELSEWHERE


class OtherRankError(RuntimeError):
    """Another rank failed, and so this one cannot go on; the message quotes it."""


@dataclass
class Failures:
    own: Exception | None = None
    """This rank's."""
    by_rank: dict[int, str] = field(default_factory=dict)
    """Type and message of every rank that failed."""

    @property
    def how_many(self) -> str:
        return f"{len(self.by_rank)} of {dist.get_world_size()} ranks"


def gathered(value: Any) -> list[Any]:
    """Every rank's `value`, by rank."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, value)
    return everywhere


@contextlib.contextmanager
def failures_everywhere() -> Iterator[Failures]:
    """Holds back what the block raises, and fills in what it raised on every rank."""
    failures = Failures()
    try:
        yield failures
    except Exception as error:
        failures.own = error
    told = gathered(None if failures.own is None else f"{type(failures.own).__name__}: {failures.own}")
    failures.by_rank = {rank: text for rank, text in enumerate(told) if text is not None}


@contextlib.contextmanager
def stops_all_ranks(what: str) -> Iterator[None]:
    """A rank that failed raises its own error, the others an OtherRankError that quotes it; the block itself
    communicates with nobody."""
    with failures_everywhere() as failures:
        yield
    failed = failures.by_rank
    if not failed:
        return
    teller, rank = min(failed), dist.get_rank()
    error = failures.own or OtherRankError(f"{what} failed on {failures.how_many}\nrank {teller}: {failed[teller]}")
    setattr(error, REPORTED_ELSEWHERE, rank != teller and failed.get(rank, failed[teller]) == failed[teller])
    raise error
