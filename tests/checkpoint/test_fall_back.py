"""A damaged newest checkpoint does not end a night: all ranks go on from the next whole one, and nothing is removed."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from harness.ranks import RankFailure, run_ranks
from matrix.recording import build, command_line
from megatron.ucp.commit import DAMAGE_MARK
from megatron.ucp.verify import verify

NEWEST = "global_step6"


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory) -> Path:
    """Checkpoints of iterations 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, _fit, command_line(data, zero=1, iters=6, save=folder, save_interval=2))
    return folder


def _fit(rank: int, world_size: int, argv: list[str]) -> tuple[int, dict, str]:
    """(iteration it went on from, losses, what was logged)."""
    import io

    from megatron.training.loop import fit

    heard = logging.StreamHandler(io.StringIO())
    logging.getLogger("megatron").addHandler(heard)
    logging.getLogger("megatron").setLevel(logging.INFO)
    run = build(argv, rank, world_size)
    begun = run.progress.iteration
    fit(run)
    return begun, {step.iteration: step.loss for step in run.run_log.steps}, heard.stream.getvalue()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def _optimizer_file(folder: Path) -> Path:
    return folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"


DAMAGES = {
    "a byte of a moment": lambda folder: _flip(_optimizer_file(folder)),
    "a file cut short": lambda folder: _optimizer_file(folder).write_bytes(_optimizer_file(folder).read_bytes()[:-900]),
    "a file gone": lambda folder: _optimizer_file(folder).unlink(),
    "the random streams": lambda folder: _flip(folder / "rng_state.safetensors"),
    "ucp.json": lambda folder: (folder / "ucp.json").write_text('{"format_version": 2'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_goes_on_from_the_next_whole_one(damage: str, saved, data, tmp_path):
    folder, alone = tmp_path / "run", tmp_path / "alone"
    shutil.copytree(saved, folder)
    DAMAGES[damage](folder / NEWEST)
    before = _bytes(folder / NEWEST)
    argv = command_line(data, zero=1, iters=8, load=folder, save=folder, save_interval=6)
    begun, losses, told = run_ranks(2, _fit, argv)[0]
    assert begun == 4 and f"{NEWEST}" in told and "damaged" in told
    # The same as from a folder in which the damaged one has never been.
    shutil.copytree(saved, alone)
    shutil.rmtree(alone / NEWEST)
    (alone / "latest").write_text("global_step4")
    expected = run_ranks(2, _fit, command_line(data, zero=1, iters=8, load=alone))[0]
    assert (4, losses) == expected[:2]
    # The new save of that iteration took its name; what was damaged is kept as it was found.
    assert verify(folder / NEWEST).findings == ()
    kept = _bytes(folder / f"{NEWEST}.damaged")
    assert kept.pop(DAMAGE_MARK)
    assert kept == before


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_another_topology_falls_back_too_and_the_next_start_goes_there_at_once(saved, data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    for name in (NEWEST, "global_step4"):
        DAMAGES["a byte of a moment"](folder / name)
    argv = command_line(data, tp=2, iters=7, load=folder)
    begun, losses, _ = run_ranks(2, _fit, argv)[0]
    assert begun == 2
    again, same, told = run_ranks(2, _fit, argv)[0]
    assert (again, same) == (2, losses) and "loading" not in told
    assert f"latest names {NEWEST}, which is damaged (" in told and "global_step4 is passed over" in told
    # A mark is taken away by whoever has mended the folder.
    shutil.copy(_optimizer_file(saved / NEWEST), _optimizer_file(folder / NEWEST))
    (folder / NEWEST / DAMAGE_MARK).unlink()
    assert run_ranks(2, _fit, argv)[0][0] == 6


@pytest.mark.parametrize("flag", [["--load-strict"], ["--load-tag", NEWEST]], ids=["strict", "tag"])
def test_whoever_asks_for_it_is_told(flag: list[str], saved, data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    DAMAGES["a byte of a moment"](folder / NEWEST)
    with pytest.raises(RankFailure, match="DamagedCheckpointError"):
        run_ranks(2, _fit, [*command_line(data, zero=1, iters=7, load=folder), *flag])
    assert not (folder / NEWEST / DAMAGE_MARK).exists()


def test_where_nothing_is_whole_nothing_is_begun_anew(saved, data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    for path in folder.glob("global_step*"):
        DAMAGES["a byte of a moment"](path)
    argv = command_line(data, zero=1, iters=7, load=folder, save=folder)
    for _ in range(2):
        with pytest.raises(RankFailure, match=r"DamagedCheckpointError: .*global_step2"):
            run_ranks(2, _fit, argv)
    assert not (folder / "global_step2" / DAMAGE_MARK).exists()  # there is nothing to go to instead
    assert (folder / "latest").read_text() == NEWEST


def test_a_lost_pointer_does_not_make_a_damaged_one_a_fresh_start(saved, data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved / NEWEST, folder / NEWEST)
    DAMAGES["a byte of a moment"](folder / NEWEST)
    argv = command_line(data, zero=1, iters=7, load=folder)
    with pytest.raises(RankFailure, match="DamagedCheckpointError"):
        run_ranks(2, _fit, argv)
    (folder / NEWEST / DAMAGE_MARK).write_text("by another run\n")
    with pytest.raises(RankFailure, match=r"ResumeError: no checkpoint in .* is whole.*by another run"):
        run_ranks(2, _fit, argv)


def test_a_model_that_does_not_fit_is_no_damage(saved, data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    with pytest.raises(RankFailure, match="SourceMismatchError"):
        run_ranks(2, _fit, command_line(data, zero=1, iters=7, load=folder, hidden_size=40))
    assert not list(folder.glob(f"*/{DAMAGE_MARK}"))
