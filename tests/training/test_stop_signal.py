"""A signal to the launcher, the process group or every process, with data-loader workers: the run saves and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from matrix.recording import command_line

ROOT = Path(__file__).resolve().parents[2]
PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "{port}"]


def to_launcher(process: psutil.Process, number: int) -> None:
    process.send_signal(number)


def to_group(process: psutil.Process, number: int) -> None:
    os.killpg(process.pid, number)


def to_everyone(process: psutil.Process, number: int) -> None:
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(number)


CASES = {
    "python, group, twice": (PYTHON, "SIGTERM", to_group, 2),
    "python, USR1, everyone": (PYTHON, "SIGUSR1", to_everyone, 1),
    "python, INT, group, twice": (PYTHON, "SIGINT", to_group, 2),
    "torchrun": (TORCHRUN, "SIGTERM", to_launcher, 1),
    "torchrun, everyone, twice": (TORCHRUN, "SIGTERM", to_everyone, 2),
    "deepspeed, group": (DEEPSPEED, "SIGTERM", to_group, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_the_run_saves_and_ends(case, data, tmp_path):
    start, name, send, times = CASES[case]
    flags = command_line(
        data,
        iters=100_000,
        save=tmp_path / "save",
        save_interval=100_000,
        num_workers=2,
        log_interval=1,
        exit_signal_handler=True,
        exit_signal=name,
        lr_decay_iters=100_000,
    )
    environment = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    output = tmp_path / "output"
    with open(output, "wb") as file:
        process = subprocess.Popen(
            [*(word.format(port=_free_port()) for word in start), str(ROOT / "pretrain_gpt.py"), *flags],
            env=environment,
            cwd=tmp_path,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_for(output, " 3/100000", process)
        for _ in range(times):
            send(psutil.Process(process.pid), signal.Signals[name])
            time.sleep(0.05)
        process.wait(timeout=90)
        deadline = time.monotonic() + 60  # a launcher may leave before its ranks
        while "stopping at iteration" not in output.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    text = output.read_text()
    assert f": {name}" in text and "stopping at iteration" in text, text[-3000:]
    assert "exited unexpectedly" not in text and "Traceback" not in text.partition("stopping at")[0], text[-3000:]
    step = (tmp_path / "save/latest").read_text()
    assert (tmp_path / "save" / step / "ucp.json").is_file() and int(step.removeprefix("global_step")) < 100_000
    if start is PYTHON:  # what a launcher makes of its own end is its own
        assert process.returncode == 0, text[-3000:]


def _free_port() -> int:
    """Two of these tests may run at a time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(output: Path, text: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while text not in output.read_text():
        assert process.poll() is None and time.monotonic() < deadline, output.read_text()[-3000:]
        time.sleep(0.1)
