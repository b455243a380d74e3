"""The rates are those of the calls that are measured, and nothing is left behind."""

from __future__ import annotations

import shutil
import time

import pytest

from megatron.ucp import disk_rates
from megatron.ucp.disk_rates import Rates, measured_rates
from megatron.ucp.errors import NotEnoughSpaceError

SAMPLE = 64 << 20


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
    monkeypatch.setattr(disk_rates.tempfile, "mkdtemp", lambda **_: pytest.fail("it wrote"))
    with pytest.raises(NotEnoughSpaceError, match="the disk is too full"):
        measured_rates(tmp_path, 2, SAMPLE)


def test_a_disk_that_fails_is_told_and_nothing_left(tmp_path, monkeypatch):
    def fails(path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(disk_rates, "flush", fails)
    with pytest.raises(OSError, match="Input/output error"):
        measured_rates(tmp_path, 2, SAMPLE)
    assert list(tmp_path.iterdir()) == []


def test_rates_of_one_bandwidth():
    assert Rates.alike(5e9) == Rates(5e9, 5e9, 5e9)
