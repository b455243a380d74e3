"""A save or a load that fails, fails on every rank, with one message.

    with all_ranks_or_none("loading", folder):       # the block itself communicates with nobody
        read_my_part()
    tag = on_rank_0(lambda: choose_tag())            # its result, or its error, everywhere

Both are collective over the world.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megatron.parallel.agreement import failures_everywhere
from megatron.parallel.rank_errors import reported_by_rank_0
from megatron.ucp.errors import (
    CorruptFileError,
    DigestMismatchError,
    ManifestError,
    MissingFileError,
    UnsafePickleError,
)

_Result = TypeVar("_Result")


class CheckpointError(RuntimeError):
    """A save or a load failed; the message says on which ranks and why. Raised on every rank."""


class SourceMismatchError(CheckpointError):
    """The Source is of another model, or lacks what this run needs."""


def on_rank_0(action: Callable[[], _Result]) -> _Result:
    """Run on rank 0; its result, or its error as a CheckpointError, on every rank. Collective over the world."""
    outcome: list = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        with reported_by_rank_0(dist.get_rank()):
            raise CheckpointError(outcome[1])
    return outcome[0]


class DamagedCheckpointError(CheckpointError):
    """What a checkpoint holds is not what was saved, or part of it is gone. An older one may be whole."""


_DAMAGE = tuple(
    f"{kind.__name__}:" for kind in (CorruptFileError, DigestMismatchError, ManifestError, MissingFileError)
)
_DAMAGE += (f"{UnsafePickleError.__name__}:", f"OSError: [Errno {errno.EIO}]")
"""How what is told of a damaged file begins. A class that nobody may load is no other thing: bytes of a pickle that
have changed may name one, and nothing of it is run."""


def _is_damage(by_rank: Mapping[int, str]) -> bool:
    """A file that only some ranks miss is there: their node does not see the disk, nor an older checkpoint on it."""
    is_missing = any(text.startswith(f"{MissingFileError.__name__}:") for text in by_rank.values())
    if is_missing and len(by_rank) < dist.get_world_size():
        return False
    return all(text.startswith(_DAMAGE) for text in by_rank.values())


@contextlib.contextmanager
def all_ranks_or_none(what: str, folder: Path) -> Iterator[None]:
    """Ends with an error on every rank where one rank failed, instead of a hang in the next collective."""
    with failures_everywhere() as failures:
        yield
    if not failures.by_rank:
        return
    by_text: dict[str, list[int]] = {}
    for rank, text in failures.by_rank.items():
        by_text.setdefault(text, []).append(rank)
    lines = [f"ranks {ranks[:8]}{'...' if len(ranks) > 8 else ''}: {text}" for text, ranks in by_text.items()]
    kind = SourceMismatchError if isinstance(failures.own, SourceMismatchError) else CheckpointError
    if _is_damage(failures.by_rank):
        kind = DamagedCheckpointError
    with reported_by_rank_0(dist.get_rank()):
        raise kind(f"{what} {folder} failed on {failures.how_many}\n" + "\n".join(lines)) from failures.own
