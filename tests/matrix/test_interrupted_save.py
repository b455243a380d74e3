"""A save that dies at any moment leaves the checkpoint before it, whole and pointed to; the next save succeeds."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from harness.ranks import RankFailure, run_ranks
from matrix.recording import build, command_line, train, write_dataset
from megatron.training.resume import find_checkpoints
from megatron.ucp.verify import verify

MOMENTS = ("before-files", "after-files", "before-manifest", "before-rename", "before-pointer")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "matrix_text_document")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _train_and_die(rank: int, world_size: int, argv: list[str], moment: str, at_iteration: int) -> None:
    """Two saves; rank 0 is killed within the second, at the moment named."""
    from megatron.training import saving
    from megatron.training.loop import fit

    run = build(argv, rank, world_size)
    due = lambda: rank == 0 and run.progress.iteration == at_iteration  # noqa: E731
    engine_save, write, commit = run.live.engine.save_checkpoint, saving.write_manifest, saving.commit.commit

    def save_checkpoint(*args, **kwargs):
        if due() and moment == "before-files":
            _die()
        done = engine_save(*args, **kwargs)
        if due() and moment == "after-files":
            _die()
        return done

    def write_manifest(*args, **kwargs):
        if due() and moment == "before-manifest":
            _die()
        return write(*args, **kwargs)

    def commit_folder(*args, **kwargs):
        if due() and moment == "before-rename":
            _die()
        done = commit(*args, **kwargs)
        if due() and moment == "before-pointer":
            _die()
        return done

    run.live.engine.save_checkpoint = save_checkpoint
    saving.write_manifest = write_manifest
    saving.commit.commit = commit_folder
    fit(run)


@pytest.mark.parametrize("moment", MOMENTS)
def test_death_in_a_save(moment: str, data, tmp_path):
    argv = command_line(data, zero=1, iters=4, save=tmp_path, save_interval=2)
    with pytest.raises(RankFailure, match="rank 0 died"):
        run_ranks(2, _train_and_die, argv, moment, 4)
    assert (tmp_path / "latest").read_text() == "global_step2"
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
    found = find_checkpoints(tmp_path).native
    assert found.iteration == 2
    assert verify(found.folder).is_sound
    # Whole or not there: a folder under its final name is a checkpoint.
    assert all(verify(path).is_sound for path in tmp_path.glob("global_step*") if not path.name.endswith(".tmp"))

    resumed = run_ranks(2, train, [*argv, "--load", str(tmp_path)])[0]
    assert sorted(resumed.losses) == [3, 4]
    assert (tmp_path / "latest").read_text() == "global_step4"
    assert verify(tmp_path / "global_step4").is_sound
    assert not list(tmp_path.glob("*.tmp"))


def _fail_on_one_rank(rank: int, world_size: int, argv: list[str]) -> str:
    from megatron.training.loop import fit

    run = build(argv, rank, world_size)
    write = run.live.engine.checkpoint_engine.save

    def fail(*args, **kwargs):
        if rank == 1 and run.progress.iteration == 4:
            raise OSError("planted: no space left on device")
        return write(*args, **kwargs)

    # Inside DeepSpeed's save, between its barriers: where a full disk would strike.
    run.live.engine.checkpoint_engine.save = fail
    try:
        fit(run)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_error_on_one_rank_is_told_on_all(data, tmp_path):
    argv = command_line(data, zero=1, iters=4, save=tmp_path, save_interval=2)
    for told in run_ranks(2, _fail_on_one_rank, argv):
        assert told.startswith("CheckpointError: saving ")
        assert "failed on 1 of 2 ranks" in told
        assert "ranks [1]: OSError: planted: no space left on device" in told
    assert find_checkpoints(tmp_path).native.iteration == 2


def _diverge(rank: int, world_size: int, argv: list[str], name: str) -> str:
    """One rank's copy of a parameter that must be equal everywhere is changed; then a save."""
    from megatron.training.saving import save

    run = build(argv, rank, world_size)
    if rank == world_size - 1:
        changed = [i for i in run.live.state.intervals if i.name == name]
        assert changed
        changed[0].master[0] += 1e-6
    try:
        save(run.live, Path(argv[argv.index("--save") + 1]), run.progress)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    "world_size, flags, name",
    [
        (2, {"tp": 2, "zero": 1}, "layers.1.input_norm.weight"),
        (2, {"tp": 2, "zero": 0}, "final_norm.bias"),
        (2, {"pp": 2, "zero": 1}, "embedding.word_embeddings.weight"),
        (2, {"zero": 0}, "layers.0.mlp.dense_h_to_4h.weight"),
    ],
    ids=["tp-replica", "tp-replica-zero0", "tied-copy", "zero0-dp-replica"],
)
def test_copies_that_drifted_apart_are_not_saved(world_size: int, flags: dict, name: str, data, tmp_path):
    argv = command_line(data, **flags, save=tmp_path)
    for told in run_ranks(world_size, _diverge, argv, name):
        assert told.startswith("DivergedCopiesError") and name in told and "(fp32)" in told
    assert not any(tmp_path.iterdir())
