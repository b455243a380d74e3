"""What --keep-last removes, and what it never does."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import pytest

from harness.ranks import run_ranks
from matrix.recording import build, command_line
from megatron.ucp import commit, retention
from megatron.ucp.manifest import read_manifest, write_manifest
from megatron.ucp.retention import Keep


@pytest.fixture(scope="module")
def one(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    run_ranks(1, _fit, command_line(data, iters=1, save=folder, save_interval=1))
    return folder / "global_step1"


def _fit(rank: int, world_size: int, argv: list[str]) -> None:
    from megatron.training.loop import fit

    fit(build(argv, rank, world_size))


def _run_folder(one: Path, folder: Path, *iterations: int, latest: int | None = None) -> Path:
    manifest = read_manifest(one)
    for iteration in iterations:
        made = folder / f"global_step{iteration}"
        made.mkdir(parents=True, exist_ok=True)
        write_manifest(made, dataclasses.replace(manifest, common={**manifest.common, "iteration": iteration}))
    (folder / "latest").write_text(f"global_step{latest or max(iterations)}")
    return folder


def _left(folder: Path) -> list[str]:
    return sorted(path.name.removeprefix("global_step") for path in folder.iterdir() if path.is_dir())


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (Keep(), ["1", "2", "3", "4", "5"]),
        (Keep(last=1), ["5"]),
        (Keep(last=2), ["4", "5"]),
        (Keep(last=1, every=2), ["2", "4", "5"]),
        (Keep(last=9), ["1", "2", "3", "4", "5"]),
        (Keep(every=2), ["1", "2", "3", "4", "5"]),
    ],
    ids=str,
)
def test_what_stays(keep: Keep, left: list[str], one, tmp_path):
    folder = _run_folder(one, tmp_path, 1, 2, 3, 4, 5)
    removed = keep.thin_out(folder, newest=5)
    assert _left(folder) == left
    assert len(removed) == 5 - len(left)


def test_what_is_never_removed(one, tmp_path):
    folder = _run_folder(one, tmp_path, *range(1, 11), latest=2)
    commit.mark_damaged(folder / "global_step3", "a test")
    (folder / "global_step4" / "ucp.json").write_text("{}")  # says of itself nothing that can be believed
    (folder / "global_step5" / "ucp.json").unlink()
    (folder / "global_step6").rename(folder / "mine")
    (folder / "global_step6").symlink_to(folder / "mine")
    (folder / "latest_universal").write_text("global_step7")
    assert Keep(last=1).thin_out(folder, newest=9) == ["global_step1", "global_step8"]
    assert _left(folder) == ["10", "2", "3", "4", "5", "6", "7", "9", "mine"]


def test_one_that_cannot_be_removed_is_told(one, tmp_path, monkeypatch):
    folder = _run_folder(one, tmp_path, 1, 2)
    monkeypatch.setattr(commit.shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError("busy")))
    (told,) = Keep(last=1).thin_out(folder, newest=2)
    assert told == "not global_step1, which could not be removed: busy"


def _copies(one: Path, folder: Path, *iterations: int) -> Path:
    """With all of their files."""
    for iteration in iterations:
        shutil.copytree(one, folder / f"global_step{iteration}")
    return _run_folder(one, folder, *iterations)


def _spoil(checkpoint: Path) -> None:
    file = max(checkpoint.rglob("*.pt"), key=lambda path: path.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize(
    ("spoilt", "left", "damaged"),
    [
        ([], ["5"], []),
        ([1, 2, 3, 4], ["5"], []),
        ([5], ["4", "5"], [5]),
        ([4, 5], ["3", "4", "5"], [4, 5]),
        ([1, 2, 3, 4, 5], ["1", "2", "3", "4", "5"], [1, 2, 3, 4, 5]),
    ],
    ids=str,
)
def test_the_newest_that_reads_back_right_stays(spoilt, left, damaged, one, tmp_path):
    folder = _copies(one, tmp_path, 1, 2, 3, 4, 5)
    for iteration in spoilt:
        _spoil(folder / f"global_step{iteration}")
    told = Keep(last=1, newest_verified=True).thin_out(folder, newest=5)
    assert _left(folder) == left
    assert [i for i in range(1, 6) if commit.damage_of(folder / f"global_step{i}")] == damaged
    assert [line for line in told if "is not what was saved" in line] == told[: len(damaged)]


def test_one_that_cannot_be_read_just_now_is_not_called_damaged(one, tmp_path, monkeypatch):
    """And is not taken for verified: the one before stays too."""
    folder = _copies(one, tmp_path, 1, 2, 3)
    faults = retention.file_faults

    def too_many_open_files(checkpoint, *others):
        if checkpoint.name == "global_step3":
            raise OSError(errno.EMFILE, "Too many open files")
        return faults(checkpoint, *others)

    monkeypatch.setattr(retention, "file_faults", too_many_open_files)
    told = Keep(last=1, newest_verified=True).thin_out(folder, newest=3)
    assert _left(folder) == ["2", "3"] and not commit.damage_of(folder / "global_step3")
    assert "could not be read back" in told[0] and told[1:] == ["global_step1"]


def test_nothing_is_read_where_nothing_is_to_be_removed(one, tmp_path):
    folder = _copies(one, tmp_path, 1, 2)
    _spoil(folder / "global_step2")
    assert Keep(last=2, newest_verified=True).thin_out(folder, newest=2) == []
    assert not commit.damage_of(folder / "global_step2")


def test_the_disk_is_asked(one, tmp_path, monkeypatch):
    folder = _copies(one, tmp_path, 1, 2)
    dropped = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda handle, *what: dropped.append((os.readlink(f"/proc/self/fd/{handle}"), what))
    )
    Keep(last=1, newest_verified=True).thin_out(folder, newest=2)
    files = {str(folder / "global_step2" / name) for name in read_manifest(folder / "global_step2").files}
    assert {path for path, _ in dropped} == files and {what for _, what in dropped} == {(0, 0, os.POSIX_FADV_DONTNEED)}


@pytest.mark.parametrize("flags", [(), ("--async-save",)], ids=["waits", "behind"])
def test_a_run_whose_newest_save_went_wrong_keeps_the_one_before(flags: tuple[str, ...], data, tmp_path):
    """And the same command goes on from that one."""
    argv = command_line(data, iters=4, save=tmp_path, save_interval=1, keep_last=1, keep_newest_verified=True)
    run_ranks(1, _fit_and_spoil, [*argv, *flags], 4)
    assert _left(tmp_path) == ["3", "4"] and "read back after a save" in commit.damage_of(tmp_path / "global_step4")
    (reached,) = run_ranks(1, _started_at, [*argv, "--load", str(tmp_path)])
    assert reached == 3


def _fit_and_spoil(rank: int, world_size: int, argv: list[str], iteration: int) -> None:
    """In this process, and in the one that writes saves, which imports what it is told to."""
    from megatron.training.loop import fit
    from megatron.ucp import save_worker

    save_worker._START = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parents[1])!r}, sys.argv[1]]; "
        + (f"from ucp.test_ucp_retention import _spoil_before_thinning; _spoil_before_thinning({iteration}); ")
        + save_worker._START.split("; ", 2)[2]
    )
    _spoil_before_thinning(iteration)
    fit(build(argv, rank, world_size))


def _spoil_before_thinning(iteration: int) -> None:
    thin_out = Keep.thin_out

    def spoil_and_thin_out(keep, run_folder, newest):
        if newest == iteration:
            _spoil(run_folder / f"global_step{iteration}")
        return thin_out(keep, run_folder, newest)

    Keep.thin_out = spoil_and_thin_out


def _started_at(rank: int, world_size: int, argv: list[str]) -> int:
    return build(argv, rank, world_size).progress.iteration


@pytest.mark.parametrize("flags", [(), ("--async-save",)], ids=["waits", "behind"])
def test_a_run_keeps_its_last(flags: tuple[str, ...], data, tmp_path):
    argv = command_line(data, iters=7, save=tmp_path, save_interval=1, keep_last=2, keep_every=3)
    run_ranks(1, _fit, [*argv, *flags])
    assert _left(tmp_path) == ["3", "6", "7"]
    assert (tmp_path / "latest").read_text() == "global_step7"
