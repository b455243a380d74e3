"""The rates are those of the calls that are measured, and nothing is left behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.ucp import disk_rates
from megatron.ucp.commit import remove_left_overs
from megatron.ucp.disk_rates import Rates, measured_rates
from megatron.ucp.errors import NotEnoughSpaceError

SAMPLE = 64 << 20
ROOT = Path(__file__).resolve().parents[2]


def test_measured_and_nothing_left(tmp_path):
    rates = measured_rates(tmp_path, 2, SAMPLE)
    assert all(1e5 < rate < 1e12 for rate in (rates.save, rates.convert, rates.load))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("slow, step, moves", [("save", "save", 1), ("convert", "convert", 2), ("load", "load", 1)])
def test_what_a_step_takes_is_in_its_rate(slow, step, moves, tmp_path, monkeypatch):
    work = getattr(disk_rates._Worker, slow)

    def slower(self) -> None:
        work(self)
        time.sleep(1.0)

    monkeypatch.setattr(disk_rates._Worker, slow, slower)
    assert getattr(measured_rates(tmp_path, 2, SAMPLE), step) <= moves * SAMPLE


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 30, 0, SAMPLE))
    monkeypatch.setattr(disk_rates, "stage", lambda _: pytest.fail("it wrote"))
    with pytest.raises(NotEnoughSpaceError, match="the disk is too full"):
        measured_rates(tmp_path, 2, SAMPLE)


def test_a_disk_that_fails_is_told_and_nothing_left(tmp_path, monkeypatch):
    def fails(path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(disk_rates, "flush", fails)
    with pytest.raises(OSError, match="Input/output error"):
        measured_rates(tmp_path, 2, SAMPLE)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
from megatron.ucp import disk_rates
disk_rates._Worker.convert = lambda self: os._exit(9)
disk_rates.measured_rates(sys.argv[1], 2, 1 << 26)
"""


def test_what_a_killed_one_leaves_is_known_and_removed(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, check=False)
    (left,) = tmp_path.iterdir()
    assert done.returncode == 9 and list(left.rglob("saved.pt"))
    assert remove_left_overs(tmp_path) == [left.name]
    assert list(tmp_path.iterdir()) == []


def test_rates_of_one_bandwidth():
    assert Rates.alike(5e9) == Rates(5e9, 5e9, 5e9)
