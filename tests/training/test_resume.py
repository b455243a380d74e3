"""choose_resume is a table: every row is what a user did, and what must happen, with the reason told."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron.training.resume import (
    Found,
    FoundCheckpoints,
    ResumeError,
    Wanted,
    choose_resume,
    find_checkpoints,
)
from megatron.ucp.errors import NotACheckpointError
from megatron.ucp.manifest import Manifest, write_manifest
from megatron.ucp.topology import Topology

TP2, DP2 = Topology(tp_size=2), Topology(dp_size=2)
NATIVE = Found(Path("run/global_step100"), "native", 100, TP2, 1)
UNIVERSAL = Found(Path("run/global_step100_universal"), "universal", 100, TP2, 1)
SAME = Wanted(TP2, 1)

CASES = {
    "no-load": (None, SAME, "fresh", "no --load"),
    "empty-folder": (FoundCheckpoints(Path("run")), SAME, "fresh", "nothing is saved"),
    "same-topology": (FoundCheckpoints(Path("run"), NATIVE), SAME, "native", "same topology"),
    "other-topology": (FoundCheckpoints(Path("run"), NATIVE), Wanted(DP2, 1), "direct", "tp1 pp1 dp2 ZeRO-1"),
    "other-stage": (FoundCheckpoints(Path("run"), NATIVE), Wanted(TP2, 2), "direct", "topology changed"),
    "both-there": (FoundCheckpoints(Path("run"), NATIVE, UNIVERSAL), SAME, "native", "global_step100 "),
    "both-there-universal-asked": (
        FoundCheckpoints(Path("run"), NATIVE, UNIVERSAL),
        replace(SAME, use_universal=True),
        "universal",
        "asked for",
    ),
    "only-universal": (FoundCheckpoints(Path("run"), None, UNIVERSAL), SAME, "universal", "only one there"),
}


@pytest.mark.parametrize("case", CASES)
def test_choice(case):
    found, wanted, kind, reason = CASES[case]
    plan = choose_resume(found, wanted)
    assert plan.kind == kind
    assert reason in plan.reason
    assert plan.is_fresh == (kind == "fresh")


def test_universal_asked_for_but_not_converted_says_what_to_do():
    with pytest.raises(ResumeError, match="no latest_universal .*global_step100.*ds_to_universal"):
        choose_resume(FoundCheckpoints(Path("run"), NATIVE), replace(SAME, use_universal=True))


def test_missing_checkpoint_ends_the_run_when_asked_to():
    with pytest.raises(ResumeError, match="exit-on-missing-checkpoint"):
        choose_resume(FoundCheckpoints(Path("run")), replace(SAME, exit_on_missing_checkpoint=True))


def _save(folder: Path, kind: str = "native", iteration: int = 7) -> Path:
    folder.mkdir(parents=True)
    saved = Manifest(kind="native", topology=TP2, parameters={}, common={"iteration": iteration})
    source = {"folder": "n", "kind": "native", "topology": TP2.to_json(), "zero_stage": 0, "is_pipelined": False}
    is_native = kind == "native"
    write_manifest(folder, saved if is_native else replace(saved, kind=kind, topology=Topology(), source=source))
    return folder


def test_find_follows_the_pointers(tmp_path):
    _save(tmp_path / "global_step7")
    _save(tmp_path / "global_step7_universal", "universal")
    # No pointer: not a checkpoint to resume from, but not passed over in silence either.
    found = find_checkpoints(tmp_path)
    assert found == FoundCheckpoints(tmp_path, no_pointer_to=("global_step7", "global_step7_universal"))
    assert "--load-tag to resume from one of global_step7, " in choose_resume(found, SAME).reason
    (tmp_path / "latest").write_text("global_step7")
    (tmp_path / "latest_universal").write_text("global_step7_universal")
    found = find_checkpoints(tmp_path)
    assert (found.native.iteration, found.native.topology) == (7, TP2)
    assert found.universal.folder.name == "global_step7_universal"


def test_find_takes_a_checkpoint_folder_itself_and_a_tag(tmp_path):
    folder = _save(tmp_path / "global_step7")
    assert find_checkpoints(folder).native.folder == folder
    assert find_checkpoints(tmp_path, "global_step7").native.folder == folder
    with pytest.raises(NotACheckpointError, match=r"(?s)--load-tag global_step8.*found: global_step7"):
        find_checkpoints(tmp_path, "global_step8")


def test_pointer_to_an_uncommitted_folder_is_refused(tmp_path):
    (tmp_path / "global_step9").mkdir()
    (tmp_path / "global_step9" / "mp_rank_00_model_states.pt").write_bytes(b"half")
    (tmp_path / "latest").write_text("global_step9")
    with pytest.raises(NotACheckpointError, match="never committed"):
        find_checkpoints(tmp_path)


@pytest.mark.parametrize(
    "name", ["mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "nothing"]
)
def test_an_uncommitted_folder_given_as_load_is_no_empty_run_folder(name, tmp_path):
    """Starting fresh from what the user took for a checkpoint would be the worst answer."""
    folder = tmp_path / ("global_step9.tmp" if name == "nothing" else "global_step9")
    folder.mkdir()
    (folder / name).write_bytes(b"half")
    with pytest.raises(NotACheckpointError, match="never committed"):
        find_checkpoints(folder)


def test_a_replacing_save_that_died_between_its_renames_is_told(tmp_path):
    _save(tmp_path / "global_step7.replaced")
    (tmp_path / "latest").write_text("global_step7")
    with pytest.raises(NotACheckpointError, match="rename global_step7.replaced, which is whole, to global_step7"):
        find_checkpoints(tmp_path)
