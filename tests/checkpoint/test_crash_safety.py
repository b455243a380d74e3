"""A save that dies, at any point, leaves the checkpoint before it as it was; and the next save succeeds.

Two ranks train, save at iteration 2, and save again at iteration 3; that second save is killed or broken at one of
its points. What then lies in the folder is opened by fresh processes, as a user's next start would.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from pathlib import Path

import pytest

from harness.ranks import RankFailure, run_ranks
from matrix.recording import build, command_line
from megatron.ucp.errors import NotACheckpointError
from megatron.ucp.verify import verify

FIRST, SECOND = "global_step2", "global_step3"


def _die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def _after(action, then):
    def both(*args, **kwargs):
        result = action(*args, **kwargs)
        then()
        return result

    return both


def _plant(point: str, engine) -> None:
    """Replace one step of the save by one that dies."""
    from megatron.checkpoint import saving
    from megatron.ucp import commit

    if point == "before-deepspeed":
        engine.save_checkpoint = _die
    elif point == "after-deepspeed":
        engine.save_checkpoint = _after(engine.save_checkpoint, _die)
    elif point == "before-manifest":
        saving.write_manifest = _die
    elif point == "after-manifest":
        saving.write_manifest = _after(saving.write_manifest, _die)
    elif point == "before-pointer":
        commit.point_to = _die
    elif point == "between-the-renames":
        rename = os.rename
        os.rename = lambda old, new: (rename(old, new), str(new).endswith(".replaced") and _die())
    else:
        raise ValueError(point)


def _train_then_break(rank: int, world_size: int, argv: list[str], save: str, point: str, victim: int, again: bool):
    """Save at 2; then at 3 (or at 2 again) with a fault planted on one rank."""
    from megatron.checkpoint import saving
    from megatron.training.loop import fit

    run = build(argv, rank, world_size)
    progress = fit(run)
    if not again:
        progress.iteration += 1
    if rank == victim:
        _plant(point, run.live.engine)
    saving.save(run.live, Path(save), progress)


def _resume_and_save(rank: int, world_size: int, argv: list[str]):
    from megatron.training.loop import fit

    run = build(argv, rank, world_size)
    resumed_at = run.progress.iteration
    fit(run)
    return resumed_at


def _argv(data: Path, save: Path, iters: int, **flags) -> list[str]:
    return command_line(data, zero=1, iters=iters, save=save, **flags)


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


POINTS = {
    # On which rank, and the one checkpoint that must then be resumed from.
    "before-deepspeed": (1, FIRST),
    "after-deepspeed": (1, FIRST),
    "before-manifest": (0, FIRST),
    "after-manifest": (0, FIRST),
    "before-pointer": (0, FIRST),
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_save(point: str, data, tmp_path):
    victim, resumed_from = POINTS[point]
    argv = _argv(data, tmp_path, 2)
    with pytest.raises(RankFailure, match=f"rank {victim} died: exit code -9"):
        run_ranks(2, _train_then_break, argv, str(tmp_path), point, victim, False)
    assert (tmp_path / "latest").read_text() == resumed_from
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert verify(tmp_path / FIRST).findings == ()
    is_staged = (tmp_path / f"{SECOND}.tmp").is_dir()
    assert is_staged == (point != "before-pointer") and (tmp_path / SECOND).is_dir() == (not is_staged)
    if is_staged:
        outcome = run_ranks(2, _outcome, _argv(data, tmp_path, 3, load=tmp_path / f"{SECOND}.tmp"))
        assert all("NotACheckpointError" in told for told in outcome), outcome
        with pytest.raises(NotACheckpointError):  # and the check of whole folders below does see a broken one
            verify(tmp_path / f"{SECOND}.tmp", num_workers=1)
    # The next start resumes from the one before, and the next save takes the same name.
    assert run_ranks(2, _resume_and_save, _argv(data, tmp_path, 3, load=tmp_path)) == [2, 2]
    assert (tmp_path / "latest").read_text() == SECOND
    assert verify(tmp_path / SECOND).findings == ()
    assert not (tmp_path / f"{SECOND}.tmp").exists()


def _outcome(rank: int, world_size: int, argv: list[str]) -> str:
    try:
        build(argv, rank, world_size)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "built"


def test_saving_twice_at_one_iteration_replaces(data, tmp_path):
    run_ranks(2, _resume_and_save, _argv(data, tmp_path, 2))
    before = json.loads((tmp_path / FIRST / "ucp.json").read_text())
    run_ranks(2, _resume_and_save, _argv(data, tmp_path, 2, seed=7))
    after = json.loads((tmp_path / FIRST / "ucp.json").read_text())
    assert before["digests"] != after["digests"]
    assert verify(tmp_path / FIRST).findings == ()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [FIRST]


def test_killed_between_the_renames_of_a_replacing_save(data, tmp_path):
    """The only moment without a checkpoint of that name: the old one is aside, whole, and the next run that owns the
    folder gives it its name back. One that only reads from there is told."""
    argv = _argv(data, tmp_path, 2)
    with pytest.raises(RankFailure, match="rank 0 died"):
        run_ranks(2, _train_then_break, argv, str(tmp_path), "between-the-renames", 0, True)
    assert not (tmp_path / FIRST).exists()
    argv = _argv(data, tmp_path, 3, load=tmp_path)
    elsewhere = _argv(data, tmp_path / "elsewhere", 3, load=tmp_path)
    for told in run_ranks(2, _outcome, elsewhere):
        assert told.startswith("NotACheckpointError:") and f"rename {FIRST}.replaced" in told, told
    assert run_ranks(2, _outcome, argv) == ["built", "built"]
    assert not (tmp_path / f"{FIRST}.replaced").exists()
    assert verify(tmp_path / FIRST).findings == ()
    assert run_ranks(2, _resume_and_save, argv) == [2, 2]


@pytest.mark.parametrize("is_behind", [False, True], ids=["waits", "behind"])
def test_a_disk_without_room_is_told_before_anything_is_written(is_behind: bool, data, tmp_path):
    argv = _argv(data, tmp_path, 2)
    for told, written in run_ranks(2, _save_where_there_is_no_room, argv, str(tmp_path), is_behind):
        assert "NotEnoughSpaceError: the disk is too full" in told and "0 MiB free" in told
        assert not [name for name in written if name.endswith(".pt")]
    assert (tmp_path / "latest").read_text() == FIRST


def _save_where_there_is_no_room(rank: int, world_size: int, argv: list[str], save: str, is_behind: bool):
    from collections import namedtuple

    from megatron.checkpoint import saving
    from megatron.checkpoint.background import BackgroundSaves
    from megatron.training.loop import fit
    from megatron.ucp import disk

    run = build(argv, rank, world_size)
    progress = fit(run)
    progress.iteration += 1
    disk.shutil.disk_usage = lambda path: namedtuple("usage", "total used free")(10**6, 10**6 - 1000, 1000)
    try:
        if is_behind:
            with BackgroundSaves(run.live) as saves:
                saves.begin(Path(save), progress)
        else:
            saving.save(run.live, Path(save), progress)
    except Exception as error:
        return str(error), sorted(path.name for path in Path(save, f"{SECOND}.tmp").iterdir())
    return "saved", []


def _save_with_broken_disk(rank: int, world_size: int, argv: list[str], save: str, what: str, victim: int):
    """What each rank hears of a disk error on `victim`, and of the save after it."""
    import safetensors.torch
    import torch

    from megatron.checkpoint import saving
    from megatron.training.loop import fit
    from megatron.ucp import commit, save_job

    run = build(argv, rank, world_size)
    progress = fit(run)
    progress.iteration += 1

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    owner, name = {
        "limit": (commit, "stage"),
        "files": (save_job, "write_archive"),
        "streams": (safetensors.torch, "save"),
        "checksums": (commit, "checksum_file"),
        "flush": (commit, "flush"),
        "staging": (commit, "stage"),
        "nothing": (commit, "stage"),
    }[what]
    works = getattr(owner, name)
    if rank == victim and what == "limit":  # the system itself refuses, as on a full disk: no planted error
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
    elif rank == victim and what != "nothing":
        setattr(owner, name, fail)
    try:
        saving.save(run.live, Path(save), progress)
        told = "saved"
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    setattr(owner, name, works)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    latest = Path(save, "latest").read_text()
    torch.distributed.barrier()
    saving.save(run.live, Path(save), progress)
    return told, latest


BROKEN = {"limit": 1, "files": 1, "streams": 0, "checksums": 0, "flush": 0, "staging": 0}


@pytest.mark.parametrize("what", [*BROKEN, "nothing"])
@pytest.mark.parametrize("cell", [{"zero": 1}, {"pp": 2}], ids=["dp2-zero1", "pp2-zero0"])
def test_disk_error_on_one_rank(what: str, cell: dict, data, tmp_path):
    """CheckpointError on both ranks, no hang, the checkpoint before untouched; and once there is room, it saves."""
    argv = command_line(data, iters=2, save=tmp_path, **cell)
    outcomes = run_ranks(2, _save_with_broken_disk, argv, str(tmp_path), what, BROKEN.get(what, 0))
    for told, latest in outcomes:
        if what == "nothing":
            assert (told, latest) == ("saved", SECOND)
            continue
        reason = "cannot write: File too large" if what == "limit" else "No space left on device"
        assert told.startswith("CheckpointError:") and reason in told
        assert latest == FIRST
    assert verify(tmp_path / FIRST).findings == ()
    assert verify(tmp_path / SECOND).findings == ()
    assert (tmp_path / "latest").read_text() == SECOND
