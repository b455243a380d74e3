"""Ranks that fail together: one rank's error becomes every rank's, instead of a hang in the next collective.

    with all_ranks_or_none("loading", folder):       # the block itself communicates with nobody
        read_my_part()
    with stops_all_ranks("reading the data"):        # the same for errors that are no checkpoint's
        datasets = open_them()
    tag = on_rank_0(lambda: choose_tag())            # its result, or its error, everywhere
    parts = gathered(my_part)                        # by rank, on every rank

All are collective over the world.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.parallel.rank_errors import TOLD_ELSEWHERE, told_by_rank_0


class CheckpointError(RuntimeError):
    """A save or a load failed; the message says on which ranks and why. Raised on every rank."""


class SourceMismatchError(CheckpointError):
    """The Source is of another model, or lacks what this run needs."""


class OtherRankError(RuntimeError):
    """Another rank failed, and so this one cannot go on; the message quotes it."""


def gathered(value: Any) -> list[Any]:
    """Every rank's `value`, by rank."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, value)
    return everywhere


def on_rank_0(action: Callable[[], Any]) -> Any:
    """Run on rank 0; its result, or its error, on every rank. Collective."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        with told_by_rank_0(dist.get_rank()):
            raise CheckpointError(outcome[1])
    return outcome[0]


@contextlib.contextmanager
def all_ranks_or_none(what: str, folder: Path) -> Iterator[None]:
    """Ends with an error on every rank where one rank failed, instead of a hang in the next collective."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = _failures(failure)
    if not failed:
        return
    by_text: dict[str, list[int]] = {}
    for rank, text in failed.items():
        by_text.setdefault(text, []).append(rank)
    lines = [f"ranks {ranks[:8]}{'...' if len(ranks) > 8 else ''}: {text}" for text, ranks in by_text.items()]
    kind = SourceMismatchError if isinstance(failure, SourceMismatchError) else CheckpointError
    with told_by_rank_0(dist.get_rank()):
        raise kind(f"{what} {folder} failed on {_how_many(failed)}\n" + "\n".join(lines)) from failure


@contextlib.contextmanager
def stops_all_ranks(what: str) -> Iterator[None]:
    """A rank that failed raises its own error, the others an OtherRankError that quotes it; the block itself
    communicates with nobody."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = _failures(failure)
    if not failed:
        return
    teller, rank = min(failed), dist.get_rank()
    error = failure or OtherRankError(f"{what} failed on {_how_many(failed)}\nrank {teller}: {failed[teller]}")
    setattr(error, TOLD_ELSEWHERE, rank != teller and failed.get(rank, failed[teller]) == failed[teller])
    raise error


def _failures(own: Exception | None) -> dict[int, str]:
    """What failed on which rank. Collective over the world."""
    told = gathered(None if own is None else f"{type(own).__name__}: {own}")
    return {rank: text for rank, text in enumerate(told) if text is not None}


def _how_many(failed: dict[int, str]) -> str:
    return f"{len(failed)} of {dist.get_world_size()} ranks"
