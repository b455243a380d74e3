"""What --keep-last removes, and what it never does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from harness.ranks import run_ranks
from matrix.recording import build, command_line
from megatron.ucp import commit
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
        made.mkdir(parents=True)
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


@pytest.mark.parametrize("flags", [(), ("--async-save",)], ids=["waits", "behind"])
def test_a_run_keeps_its_last(flags: tuple[str, ...], data, tmp_path):
    argv = command_line(data, iters=7, save=tmp_path, save_interval=1, keep_last=2, keep_every=3)
    run_ranks(1, _fit, [*argv, *flags])
    assert _left(tmp_path) == ["3", "6", "7"]
    assert (tmp_path / "latest").read_text() == "global_step7"
