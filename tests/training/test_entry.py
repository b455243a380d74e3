"""The entry point under each launcher, as a user starts it: the same losses, and the same files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from matrix.recording import command_line, write_dataset

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "python": ([sys.executable], {}),
    "torchrun": ([str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"], {"tp": 2}),
    "deepspeed": (
        [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_addr", "127.0.0.1", "--master_port", "{port}"],
        {"pp": 2, "zero": 1},
    ),
}


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _train(launcher: str, data: Path, folder: Path) -> dict[int, float]:
    command, cell = LAUNCHERS[launcher]
    command = [part.format(port=_free_port()) for part in command]
    flags = command_line(data, **cell, iters=3, save=folder / "save", tensorboard_dir=folder / "events", log_interval=1)
    # A fresh environment: the harness of other tests leaves ranks and addresses in this process's.
    environment = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, str(ROOT / "pretrain_gpt.py"), *flags],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "iteration 3/3 | samples 24 | loss" in done.stdout
    assert (folder / "save" / "latest").read_text() == "global_step3"
    assert (folder / "save" / "latest_checkpointed_iteration.txt").read_text() == "3"
    events = EventAccumulator(str(folder / "events"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("lm-loss-training/lm loss")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    data = write_dataset(folder / "entry_text_document")
    return data, _train("python", data, folder)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launchers_train_the_same(launcher: str, plain, tmp_path):
    data, reference = plain
    losses = _train(launcher, data, tmp_path)
    assert sorted(losses) == [1, 2, 3]
    assert losses == pytest.approx(reference, abs=2e-6)
