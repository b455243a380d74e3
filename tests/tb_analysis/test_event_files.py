"""Event files that are not what a run wrote: told, never a shorter curve or a wait."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from tb_analysis.errors import NoRunsError, RunFileError
from tb_analysis.event_files import find_run_folders, read_curve

STEPS = 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step in range(STEPS):
            writer.add_scalar("loss", 1 / (step + 1), step)
    return next((tmp_path / "run").iterdir())


def test_every_flipped_bit_is_told(file: Path):
    raw, rng = file.read_bytes(), random.Random(0)
    for _ in range(150):
        flipped = bytearray(raw)
        flipped[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        with pytest.raises(RunFileError, match="damaged at byte"):
            read_curve(file.parent, "loss")


@pytest.mark.parametrize("size", [1, 11, 12, 30])
def test_a_file_that_ends_within_a_record_is_of_a_killed_run(file: Path, size: int):
    file.write_bytes(file.read_bytes()[:-size])
    assert read_curve(file.parent, "loss").steps.tolist() == list(range(STEPS - 1))


def test_zeros_at_the_end_are_of_a_machine_that_lost_its_power(file: Path):
    file.write_bytes(file.read_bytes() + bytes(4096))
    assert len(read_curve(file.parent, "loss")) == STEPS


def test_a_fifo_or_a_device_called_like_an_event_file_is_not_waited_for(file: Path, tmp_path: Path):
    os.mkfifo(file.parent / "events.out.tfevents.1")
    os.symlink("/dev/zero", file.parent / "events.out.tfevents.2")
    assert len(read_curve(file.parent, "loss")) == STEPS
    (tmp_path / "other").mkdir()
    os.mkfifo(tmp_path / "other/events.out.tfevents.1")
    with pytest.raises(NoRunsError, match="no event file"):
        find_run_folders(tmp_path / "other")
    assert find_run_folders(tmp_path) == [file.parent]


def test_records_that_are_no_events_are_told(file: Path, tmp_path: Path):
    from tensorboard.summary.writer.record_writer import RecordWriter

    with open(file, "wb") as stream:
        RecordWriter(stream).write(b"\xff" * 40)
    with pytest.raises(RunFileError, match="no event file"):
        read_curve(file.parent, "loss")
