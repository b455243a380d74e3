"""Run a function on several ranks on CPU, each a fresh fork of a process that has DeepSpeed loaded already.

One case of 2-8 ranks costs 0.2-1 s this way (6-40 s under torchrun) and leaves no state behind.

    from harness.ranks import run_ranks

    def body(rank, world_size, scale):
        ...                                  # torch.distributed (gloo) is up
        return losses                        # picklable

    losses_by_rank = run_ranks(2, body, 0.5)
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing as mp
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

GRACE_SECONDS = 0.5
"""How long the other ranks may go on after the first failed, so that their own errors are seen too."""

_context = None


class RankFailure(Exception):
    """At least one rank raised, died, or did not end in time. The message holds every rank's story.

    No AssertionError: a test that expects one of a comparison must not be content with a run that broke."""


def run_ranks(world_size: int, body: Callable, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``body(rank, world_size, *args)`` on ``world_size`` processes; return the results by rank.

    ``body`` must be a module-level function; arguments and results are pickled. Raises RankFailure.
    """
    context = _fork_server()
    scratch = Path(tempfile.mkdtemp(prefix="ranks-"))
    readers, processes = [], []
    try:
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(rank, world_size, str(scratch), writer, sys.path[:], body.__module__, body.__qualname__, args),
                daemon=True,
            )
            process.start()
            writer.close()
            readers.append(reader)
            processes.append(process)
        return _collect(processes, readers, scratch, timeout)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        shutil.rmtree(scratch, ignore_errors=True)


def _fork_server():
    global _context  # one server for the whole test session: that it is shared is its point
    if _context is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ["OMP_NUM_THREADS"] = "1"
        _context = mp.get_context("forkserver")
        _context.set_forkserver_preload(["harness.warm"])
        tests = str(Path(__file__).resolve().parents[1])
        # The server is a new interpreter: it finds the preload module through PYTHONPATH.
        os.environ["PYTHONPATH"] = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    return _context


def _rank_main(rank, world_size, scratch, writer, path, module, name, args) -> None:
    log = open(Path(scratch) / f"rank{rank}.log", "w", buffering=1)  # noqa: SIM115 - open until the process ends
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log, all_threads=True)
    sys.path[:] = path
    try:
        _initialise(rank, world_size, scratch)
        import torch.distributed

        body: Any = importlib.import_module(module)
        for part in name.split("."):
            body = getattr(body, part)
        # Pickled here: multiprocessing would send a tensor as a file descriptor of a process that has ended.
        message = ("ok", pickle.dumps(body(rank, world_size, *args)))
        # A rank that ends while a peer is still connecting a group would look to it like a crash.
        torch.distributed.barrier()
    except BaseException as error:  # noqa: B036 - whatever ended the rank is what the parent must hear of
        message = ("raised", f"{type(error).__name__}: {error}", traceback.format_exc())
    try:
        writer.send(message)
    except Exception:
        writer.send(("raised", "result cannot be pickled", traceback.format_exc()))
    writer.close()
    log.flush()
    os._exit(0)  # no atexit, no thread joins: gloo's would wait for peers that are gone


def _initialise(rank: int, world_size: int, scratch: str) -> None:
    import torch

    import harness.warm  # noqa: F401 - a no-op when the server preloaded it

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        GLOO_SOCKET_IFNAME="lo",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
    )
    import deepspeed

    deepspeed.init_distributed(
        "gloo",
        auto_mpi_discovery=False,
        init_method=f"file://{scratch}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
        verbose=False,
    )


def _collect(processes, readers, scratch: Path, timeout: float) -> list[Any]:
    """Drain the pipes while waiting (a large result would otherwise block its rank) until all ranks ended."""
    messages: dict[int, tuple] = {}
    deadline = time.monotonic() + timeout
    open_readers = {reader: rank for rank, reader in enumerate(readers)}
    while open_readers and (left := deadline - time.monotonic()) > 0:
        for reader in wait(list(open_readers), timeout=left):
            rank = open_readers.pop(reader)
            try:
                messages[rank] = reader.recv()
            except EOFError:
                processes[rank].join(1)
                messages[rank] = ("died", f"exit code {processes[rank].exitcode}", "")
            if messages[rank][0] != "ok":
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    hung = sorted(open_readers.values())
    for rank in hung:
        _dump_stacks(processes[rank])
    if hung:
        time.sleep(0.3)
    for rank in hung:
        messages[rank] = ("hung", "did not end in time", "")
    failed = [rank for rank, message in sorted(messages.items()) if message[0] != "ok"]
    if failed:
        raise RankFailure(_story(failed, messages, scratch))
    return [pickle.loads(messages[rank][1]) for rank in range(len(processes))]


def _dump_stacks(process) -> None:
    if process.is_alive():
        os.kill(process.pid, signal.SIGUSR1)


def _story(failed: list[int], messages: dict[int, tuple], scratch: Path) -> str:
    lines = [f"rank {rank} {messages[rank][0]}: {messages[rank][1]}" for rank in failed]
    # A rank that raised tells more than one that was waiting for it.
    first = min(failed, key=lambda rank: ("raised", "died", "hung").index(messages[rank][0]))
    lines.append(messages[first][2])
    log = scratch / f"rank{first}.log"
    if log.exists():
        lines += [f"--- end of the log of rank {first}", log.read_text(errors="replace")[-3000:]]
    return "\n".join(lines)
