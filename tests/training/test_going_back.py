"""--go-back-on-state-change: a run whose memory failed ends as one whose memory did not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.ranks import RankFailure, run_ranks
from matrix.families import MODELS
from matrix.recording import build, command_line
from megatron.ucp.commit import damage_of
from megatron.ucp.verify import verify


def _argv(data: Path, save: Path, *extra: str, **flags) -> list[str]:
    values = {"zero": 1, "iters": 6, "save_interval": 2, "verify_state_every": 1, "hidden_dropout": 0.1} | flags
    return [*command_line(data, save=save, **values), "--go-back-on-state-change", *extra]


def _fit(rank: int, world_size: int, argv: list[str], flips: list[tuple[int, str]]) -> tuple[dict, list[int], dict]:
    """(losses by iteration, iterations as they began, final digests). `flips`: (iteration, when), each happens once."""
    from megatron.checkpoint.state_digest import state_digests
    from megatron.training.going_back import fit_and_go_back
    from megatron.training.saves import Saves

    run = build(argv, rank, world_size)
    begun, left = [], list(flips)

    def flip(iteration: int, when: str) -> None:
        if (iteration, when) in left:
            left.remove((iteration, when))
            if rank == world_size - 1:
                run.live.state.intervals[0].master[1] += 1.0

    after_step = Saves.after_step

    def after(saves, *, is_last):
        flip(run.progress.iteration, "before the save")
        after_step(saves, is_last=is_last)
        flip(run.progress.iteration, "after the save")

    Saves.after_step = after
    progress = fit_and_go_back(run, begun.append)
    assert progress is run.progress and progress.iteration == 6
    losses = {step.iteration: step.loss for step in run.run_log.steps}
    return losses, begun, state_digests(run.live.state)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    def of(cell: str):
        if cell not in known:
            known[cell] = run_ranks(2, _fit, _argv(data, tmp_path_factory.mktemp(cell), **CELLS[cell]), [])[0]
        return known[cell]

    known = {}
    return of


CELLS = {
    "zero1": {},
    "zero3 bf16": {"zero": 3, "bf16": True},
    "tp2": {"tp": 2, "zero": 0},
    "pp2": {"pp": 2},
    "frozen": {"freeze_parameters": "layers.0.*", "bf16": True},
    "experts": {**MODELS["moe"], "moe_expert_parallel_size": 2},
}


@pytest.mark.parametrize("cell", CELLS)
def test_from_the_save_of_before_the_flip(cell: str, undisturbed, data, tmp_path):
    """Two steps are trained twice; all that comes out is as if nothing had happened, dropout too."""
    losses, begun, digests = run_ranks(2, _fit, _argv(data, tmp_path, **CELLS[cell]), [(3, "before the save")])[0]
    assert begun == [1, 2, 3, 4, 3, 4, 5, 6]
    assert (losses, digests) == (undisturbed(cell)[0], undisturbed(cell)[2])


@pytest.mark.parametrize("how", [(), ("--async-save",)], ids=["waits", "behind"])
def test_a_save_that_holds_the_flip_is_passed_over(how: tuple[str, ...], undisturbed, data, tmp_path):
    argv = _argv(data, tmp_path, *how)
    losses, begun, digests = run_ranks(2, _fit, argv, [(4, "before the save")])[0]
    assert begun == [1, 2, 3, 4, 5, 3, 4, 5, 6]
    assert (losses, digests) == (undisturbed("zero1")[0], undisturbed("zero1")[2])
    (kept,) = tmp_path.glob("global_step4.damaged")
    assert "the state changed in memory between step 4 and this save" in damage_of(kept)
    assert verify(tmp_path / "global_step4").findings == () and not damage_of(tmp_path / "global_step4")


@pytest.mark.parametrize("cell", CELLS)
def test_a_save_of_the_same_step_from_before_the_flip_is_taken(cell: str, undisturbed, data, tmp_path):
    """It has the digests of what the step left."""
    losses, begun, digests = run_ranks(2, _fit, _argv(data, tmp_path, **CELLS[cell]), [(4, "after the save")])[0]
    assert begun == [1, 2, 3, 4, 5, 5, 6]
    assert (losses, digests) == (undisturbed(cell)[0], undisturbed(cell)[2])
    assert not list(tmp_path.glob("*damaged*"))


def test_twice_without_a_newer_save(data, tmp_path):
    """The second time is one too many: whatever did it is still there."""
    flips = [(3, "before the save"), (3, "after the save")]
    with pytest.raises(RankFailure, match=r"(?s)StateChangedError: the state changed after step 3"):
        run_ranks(2, _fit, _argv(data, tmp_path), [*flips, (3, "before the save")])
    assert run_ranks(2, _fit, _argv(data, tmp_path / "b"), [(3, "before the save"), (5, "before the save")])[0][1] == [
        *(1, 2, 3, 4, 3, 4, 5, 6, 5, 6)
    ]


def test_nothing_to_go_back_to(data, tmp_path):
    with pytest.raises(RankFailure, match=r"(?s)StateChangedError: the state changed after step 1"):
        run_ranks(2, _fit, _argv(data, tmp_path), [(1, "before the save")])


def test_the_weights_that_a_run_began_with_are_nothing_to_go_back_to(data, tmp_path):
    """A checkpoint of another run is no state of this one: the change stays what ends it."""
    begun_with = tmp_path / "other"
    run_ranks(1, _fit, [*_argv(data, begun_with)], [])
    flags = {"pretrained_checkpoint": begun_with, "save_interval": 6}
    with pytest.raises(RankFailure, match="StateChangedError"):
        run_ranks(2, _fit, _argv(data, tmp_path / "run", **flags), [(3, "after the save")])


def test_a_run_that_stops_leaves_no_flipped_checkpoint_to_resume_from(data, tmp_path):
    """Without the flag: the next start takes the save of before."""
    argv = [word for word in _argv(data, tmp_path) if word != "--go-back-on-state-change"]
    with pytest.raises(RankFailure, match=r"(?s)StateChangedError: the state changed after step 4"):
        run_ranks(2, _fit, argv, [(4, "before the save")])
    assert re.search("the state changed in memory between step 4", damage_of(tmp_path / "global_step4"))
    assert run_ranks(2, _fit, [*argv, "--load", str(tmp_path)], [])[0][1] == [3, 4, 5, 6]
