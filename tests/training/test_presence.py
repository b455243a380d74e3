"""A rank that stands still or is gone is named by the ranks that wait for it; no group waits longer than the flag says.

Truth: which process the test itself stopped, killed or let fail.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from harness.ranks import run_ranks
from matrix.recording import build, command_line
from megatron.training.presence import Presence

ROOT = Path(__file__).resolve().parents[2]
INTERVAL = 0.2
VICTIM = 2


def _wait_for_victim(rank: int, world_size: int, fault: str) -> tuple[str, str] | None:
    """(kind of the error, its message) on a rank that waited in vain; (log lines of rank 0 are in the message)."""
    import torch
    import torch.distributed as dist

    from megatron.training import presence as module
    from megatron.training.presence import Presence

    lines: list[str] = []
    module.log.warning = lambda text, *args: lines.append(text % args)
    if fault == "failed":
        module._MISSED = 10_000  # who left with an error is known without listening for silence
    group = dist.new_group(list(range(world_size)), timeout=timedelta(seconds=3))
    pair = dist.new_group([1, VICTIM], timeout=timedelta(seconds=1))
    pids = [None] * world_size
    dist.all_gather_object(pids, os.getpid())
    try:
        with Presence.of_world(interval=INTERVAL) as presence:
            for iteration in (1, 2, 3):
                presence.at(iteration)
                dist.all_reduce(torch.ones(1), group=group)
                time.sleep(2 * INTERVAL)
            if rank == VICTIM and fault.startswith("stopped"):
                os.kill(os.getpid(), signal.SIGSTOP)
            if rank == VICTIM and fault == "failed":
                raise ValueError("the victim's own reason")
            if rank == VICTIM and fault == "busy":
                time.sleep(6)
                return None
            dist.all_reduce(torch.ones(1), group=pair if rank == 1 and fault == "stopped, seen by one" else group)
    except Exception as error:
        return type(error).__name__, "\n".join([str(error), *lines])
    finally:
        if rank == 0:
            os.kill(pids[VICTIM], signal.SIGCONT)
    return None


@pytest.mark.parametrize("fault", ["stopped", "stopped, seen by one"])
def test_a_rank_that_stands_still_is_named(fault):
    """Seen by one: rank 1 has told it and left when rank 0's wait ends, and is not the one to look for."""
    outcomes = run_ranks(3, _wait_for_victim, fault, timeout=60)
    for rank in (0, 1):
        kind, text = outcomes[rank]
        assert kind == "LostRankError", text
        assert f"No answer from rank {VICTIM} (host {socket.gethostname()}, process " in text
        assert f"on rank {rank} in iteration 3" in text and text.count("No answer from") == 1
    assert outcomes[0][1].count(f"warning: rank {VICTIM} (host") == 1 or fault != "stopped", outcomes[0][1]


def test_a_rank_that_failed_is_named_with_its_reason():
    outcomes = run_ranks(3, _wait_for_victim, "failed", timeout=60)
    assert outcomes[VICTIM] == ("ValueError", "the victim's own reason")
    for rank in (0, 1):
        kind, text = outcomes[rank]
        assert kind == "LostRankError", text
        assert f"It left with ValueError: the victim's own reason: rank {VICTIM} (host" in text
        assert "No answer from" not in text


def test_a_rank_that_is_busy_is_not_called_missing():
    outcomes = run_ranks(3, _wait_for_victim, "busy", timeout=60)
    for rank in (0, 1):
        kind, text = outcomes[rank]
        assert kind == "LostRankError" and "Every rank still answers" in text and "No answer" not in text, text
        assert "has not answered" not in text


class SlowStore:
    """A store whose answer to the thread comes late, as under load."""

    def __init__(self) -> None:
        self.is_asked, self.may_answer = threading.Event(), threading.Event()

    def set_timeout(self, timeout: timedelta) -> None:
        pass

    def set(self, key: str, value: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            self.is_asked.set()
            assert self.may_answer.wait(30)


def test_whoever_leaves_waits_for_the_thread():
    """Inside the store's C++ at the end of the interpreter it would abort a process that had done all its work."""
    store = SlowStore()
    with Presence(store, rank=1, world_size=2, timeout_minutes=1, interval=0.5) as presence:
        assert store.is_asked.wait(30)
        threading.Timer(0.1, store.may_answer.set).start()
    assert not presence._thread.is_alive()


def test_but_not_forever():
    store = SlowStore()
    with Presence(store, rank=1, world_size=2, timeout_minutes=1, interval=0.1) as presence:
        assert store.is_asked.wait(30)
    assert presence._thread.is_alive()  # a store that is gone answers never
    store.may_answer.set()


def _group_timeouts(rank: int, world_size: int, argv: list[str]) -> list[float]:
    """Seconds of every process group that a built run has, but of the world's, which the harness made."""
    import torch
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    from megatron.training.launch import set_timeout_of_groups

    set_timeout_of_groups(timedelta(minutes=7))
    build(argv, rank, world_size)
    groups = [group for group in distributed_c10d._world.pg_map if group is not dist.group.WORLD]
    return [g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups]


@pytest.mark.parametrize(
    "flags",
    [{"tp": 2, "zero": 2}, {"pp": 2, "zero": 1}, {"ds_sequence_parallel_size": 2, "zero": 3}],
    ids=["tp", "pp", "sp"],
)
def test_every_group_has_the_timeout(flags, data):
    for timeouts in run_ranks(4, _group_timeouts, command_line(data, iters=1, **flags)):
        assert len(timeouts) >= 2 and set(timeouts) == {420.0}


def test_the_flag_reaches_groups_made_later():
    program = """
from datetime import timedelta
from megatron.training.launch import LaunchInfo, init_distributed
init_distributed(LaunchInfo(), "gloo", timeout_minutes=7)
import deepspeed, torch
for make in (torch.distributed.new_group, deepspeed.comm.new_group):
    print(make([0])._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=7))
"""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.stdout.split()[-2:] == ["True", "True"], ran.stdout + ran.stderr


def test_a_torch_without_the_defaults_is_refused(monkeypatch):
    from torch.distributed import distributed_c10d

    from megatron.training.launch import LaunchError, set_timeout_of_groups

    monkeypatch.delattr(distributed_c10d, "default_pg_timeout")
    with pytest.raises(LaunchError, match="default_pg_timeout"):
        set_timeout_of_groups(timedelta(minutes=7))


@pytest.mark.parametrize("killed", [1, 0], ids=["rank-1", "rank-0-with-the-store"])
def test_a_killed_rank_is_a_named_error(killed, data, tmp_path):
    """Two processes as srun starts them: no launcher ends the survivor."""
    survivor = 1 - killed
    flags = command_line(data, zero=1, iters=100_000, log_interval=1, lr_decay_iters=100_000)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ} | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }
    outputs = [tmp_path / f"output{rank}" for rank in (0, 1)]
    processes = []
    try:
        for rank, output in enumerate(outputs):
            with open(output, "wb") as file:
                process = subprocess.Popen(
                    [sys.executable, str(ROOT / "pretrain_gpt.py"), *flags],
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    cwd=tmp_path,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            processes.append(process)
        deadline = time.monotonic() + 120
        while " 3/100000" not in outputs[0].read_text():
            assert time.monotonic() < deadline, outputs[0].read_text()[-3000:]
            time.sleep(0.1)
        processes[killed].kill()
        assert processes[survivor].wait(timeout=90) == 2
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
    text = outputs[survivor].read_text()
    found = re.search(rf"LostRankError: a collective failed on rank {survivor} in iteration (\d+):", text)
    assert found and int(found[1]) > 3, text[-3000:]
    if killed:
        assert f"No answer from rank 1 (host {socket.gethostname()}, process {processes[1].pid})" in text
    else:
        assert "store no longer answers: its process (rank 0, or the launcher" in text, text[-3000:]
    assert "Traceback" not in text, text[-3000:]
