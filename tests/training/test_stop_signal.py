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


def _started(data: Path, folder: Path, start: list[str], **flags) -> subprocess.Popen:
    """A run without an end, its output in `folder`/output, of a session of its own."""
    line = command_line(
        data, iters=100_000, save=folder / "save", log_interval=1, lr_decay_iters=100_000,
        **{"save_interval": 100_000, **flags},
    )  # fmt: skip
    environment = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with open(folder / "output", "wb") as output:
        command = [*start, str(ROOT / "pretrain_gpt.py"), *line]
        return subprocess.Popen(
            command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def test_a_run_that_cannot_end_in_time_is_stopped_where_it_stands(data, tmp_path):
    """Rank 1 stands still, so rank 0 waits in a collective, where Python runs no handler of a signal."""
    process = _started(data, tmp_path, TORCHRUN, exit_signal_handler=True, exit_signal_grace=3)
    try:
        _wait_for(tmp_path / "output", " 3/100000", process)
        ranks = {child.environ()["RANK"]: child for child in psutil.Process(process.pid).children() if _is_rank(child)}
        ranks["1"].suspend()
        time.sleep(0.5)
        sent = time.monotonic()
        ranks["0"].send_signal(signal.SIGTERM)
        gone, _ = psutil.wait_procs([ranks["0"]], timeout=120)  # a collective waits ten minutes
        assert gone and time.monotonic() - sent >= 3
        ranks["1"].kill()
        process.wait(timeout=90)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    text = (tmp_path / "output").read_text()
    assert "SIGTERM came 3 s ago and the run has not saved and ended" in text, text[-3000:]
    assert "143" in text and not (tmp_path / "save/latest").exists()


def _is_rank(process: psutil.Process) -> bool:
    return "pretrain_gpt.py" in " ".join(process.cmdline())


def test_a_run_that_ends_in_time_is_not_disturbed(data, tmp_path):
    process = _started(data, tmp_path, PYTHON, exit_signal_handler=True, exit_signal_grace=60)
    try:
        _wait_for(tmp_path / "output", " 3/100000", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=90) == 0
    finally:
        process.kill()
    assert (tmp_path / "save/latest").exists()


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
