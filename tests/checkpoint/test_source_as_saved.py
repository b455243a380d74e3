"""What a resume uses is what was saved, by one run, in one save: or it is told and nothing goes on."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from harness.ranks import RankFailure, run_ranks
from matrix.recording import build, command_line, train
from megatron.ucp.convert import convert

STEPS = 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory, data) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(1, train, command_line(data, zero=1, iters=STEPS, save=folder))
    return folder


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def _flags(data: Path, load: Path, **flags) -> list[str]:
    return command_line(data, zero=1, iters=4, load=load, **flags)


def _told(rank: int, world_size: int, argv: list[str]) -> str:
    """The log of a build."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    build(argv, rank, world_size)
    return "\n".join(lines)


def test_a_flipped_bit_of_the_random_streams_is_not_loaded(run, data):
    path = run / f"global_step{STEPS}/rng_state.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1  # among the numbers, so that the file can still be read
    path.write_bytes(raw)
    with pytest.raises(RankFailure, match="rng_state.safetensors: checksum .* was written"):
        run_ranks(1, _told, _flags(data, run, load_strict=True))
    assert "loaded" in run_ranks(1, _told, _flags(data, run, no_load_rng=True))[0]


def _load_while_it_is_replaced(rank: int, world_size: int, argv: list[str], folder: str, other: str, step: str) -> None:
    from megatron.checkpoint import loading

    real = getattr(loading, step)

    def replaced(*args, **kwargs):
        os.rename(folder, folder + ".aside")
        os.rename(other, folder)
        return real(*args, **kwargs)

    setattr(loading, step, replaced)
    build(argv, rank, world_size)


@pytest.mark.parametrize("step", ["place", "restore_counters"])
def test_a_save_that_replaces_the_folder_meanwhile_is_told(step, run, data, tmp_path):
    folder, other = run / f"global_step{STEPS}", tmp_path / "other"
    shutil.copytree(folder, other)  # even the same state: another save's files need not be
    argv = _flags(data, run)
    with pytest.raises(RankFailure, match="ChangedWhileReadError.*replaced or changed while it was read"):
        run_ranks(1, _load_while_it_is_replaced, argv, str(folder), str(other), step)


def test_an_unverified_source_is_told(run, data, tmp_path):
    folder = run / f"global_step{STEPS}"
    (folder / "ucp.json").unlink()
    convert(folder, run / "u")
    told = run_ranks(1, _told, _flags(data, run, universal_checkpoint=True, override_opt_param_scheduler=True))[0]
    assert "unverified (converted from" in told and "not what was once saved" in told


def test_a_proven_source_is_not_called_unverified(run, data):
    told = run_ranks(1, _told, _flags(data, run))[0]
    assert "unverified" not in told and "equals the one at save" in told


def test_two_runs_do_not_share_a_folder(data, tmp_path):
    argv = command_line(data, zero=1, iters=1, save=tmp_path / "save")
    (tmp_path / "save").mkdir()
    first = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mark = f'{{"host": "{socket.gethostname()}", "pid": {first.pid}}}'
    (tmp_path / "save/.owner").write_text(mark)
    try:
        with pytest.raises(RankFailure, match=f"(?s)another process owns this folder.*pid {first.pid}"):
            run_ranks(1, train, argv)
        assert [path.name for path in (tmp_path / "save").iterdir()] == [".owner"]
    finally:
        first.kill()
        first.wait()
    run_ranks(1, train, argv)  # a dead one does not block
    assert (tmp_path / "save/latest").read_text() == "global_step1"
