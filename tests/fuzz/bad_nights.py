"""A training job of two ranks in which one rank dies or stands still, at any function of a save or of a resume.

    told = run_ranks(2, body, argv, Night("resume", "dies", victim=1, place=17))

The phases are not written down here: they are the functions of the checkpoint's rooms in the order in which a job first
comes to each, so that a function that is new is one of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

ROOMS = ("megatron/checkpoint/", "megatron/ucp/", "megatron/training/saves.py", "megatron/training/starting_point.py")
WAITS = 8.0
"""Seconds that a collective waits for a rank that stands still."""


@dataclass(frozen=True)
class Night:
    during: str
    """"resume" or "save"."""
    fault: str
    """"dies", "stands still", or "" to see which functions there are."""
    victim: int = 0
    place: float = 0
    """Number of the function, as first come to; of "is killed" seconds."""
    mutation: str = ""
    """A check of the product's that is taken away."""


def body(rank: int, world_size: int, argv: list[str], night: Night) -> tuple[dict[str, Any], list[str]]:
    """(final digests, functions that were come to)."""
    import torch.distributed as dist

    from matrix.recording import build
    from megatron.checkpoint.state_digest import state_digests
    from megatron.training import saves
    from megatron.training.launch import set_timeout_of_groups
    from megatron.training.loop import fit
    from megatron.training.presence import Presence

    if night.mutation:
        MUTATIONS[night.mutation]()
    if night.fault == "stands still":
        set_timeout_of_groups(timedelta(seconds=WAITS))
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=WAITS), dist.group.WORLD)
    found: list[str] = []
    is_victim = rank == night.victim
    after_step = saves.Saves.after_step

    def watched_step(these: Any, *, is_last: bool) -> None:
        with _watched(found, night) if is_victim and night.during == "save" else contextlib.nullcontext():
            after_step(these, is_last=is_last)

    saves.Saves.after_step = watched_step
    if night.fault == "is killed" and is_victim:
        threading.Timer(night.place, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    with Presence.of_world(interval=0.2) as presence:
        with _watched(found, night) if is_victim and night.during == "resume" else contextlib.nullcontext():
            run = build(argv, rank, world_size)
        fit(run, presence.at)
        return state_digests(run.live.state), found


@contextlib.contextmanager
def _watched(found: list[str], night: Night) -> Iterator[None]:
    """In this thread, and in those that it starts meanwhile: the fault, at its function."""
    root = str(Path(__file__).resolve().parents[2])

    def called(frame: FrameType, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if event != "call" or not path.startswith(root):
            return
        name = f"{os.path.relpath(path, root)}:{frame.f_code.co_qualname}"
        if not name.startswith(ROOMS) or name in found:
            return
        found.append(name)
        if night.fault and len(found) == night.place:
            if night.fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3600)

    sys.setprofile(called)
    threading.setprofile(called)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def _dead_owners_live() -> None:
    from megatron.ucp import owner

    owner.lives = lambda *args: True


def _collectives_are_not_known() -> None:
    from megatron.training import presence

    presence.is_failure_of_collective = lambda error: False


MUTATIONS = {
    "a dead owner is believed alive": _dead_owners_live,
    "failed collectives are not known": _collectives_are_not_known,
}
