"""choose_resume is a table: every row is what a user did, and what must happen, with the reason told."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from ucp.synthetic import make_state, model, write_native

from megatron.checkpoint.resume import ResumeError, Wanted, choose_resume
from megatron.ucp.errors import NotACheckpointError
from megatron.ucp.manifest import Manifest, read_manifest, write_manifest
from megatron.ucp.run_folder import Found, FoundCheckpoints, find_checkpoints
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


# -- a lost pointer ----------------------------------------------------------------------------------------------------


def _lose(run: Path, how: str) -> None:
    pointer = run / "latest"
    if how == "a folder":
        pointer.mkdir()
    elif how == "a FIFO":
        os.mkfifo(pointer)
    elif how == "a link to nowhere":
        pointer.symlink_to(run / "gone")
    elif how != "missing":
        pointer.write_bytes(
            {
                "empty": b"",
                "binary": b"\x00\xff\xfe" * 40,
                "overlong": b"a" * 100_000,
                "naming nothing": b"global_step999",
                "leading out": b"../elsewhere",
            }[how]
        )


LOST = (
    "missing",
    "a folder",
    "a FIFO",
    "a link to nowhere",
    "empty",
    "binary",
    "overlong",
    "naming nothing",
    "leading out",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A complete save, to be copied."""
    folder = tmp_path_factory.mktemp("whole") / "global_step5"
    parameters = model(num_layers=1)[:3]
    write_native(folder, make_state(parameters), TP2, 1, parameters=parameters)
    return folder


def _whole(whole: Path, folder: Path, iteration: int) -> Path:
    shutil.copytree(whole, folder)
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, common={**manifest.common, "iteration": iteration}))
    return folder


@pytest.mark.parametrize("how", LOST)
def test_a_lost_pointer_leads_to_the_newest_whole_checkpoint(how, whole, tmp_path):
    for iteration in (7, 70, 9, 80):
        _whole(whole, tmp_path / f"global_step{iteration}", iteration)
    next((tmp_path / "global_step80").glob("*optim_states.pt")).write_bytes(b"cut off")
    (tmp_path / "global_step85").mkdir()  # never committed
    (_save(tmp_path / "global_step90", iteration=90) / "ucp.json").write_text("{")
    _lose(tmp_path, how)
    found = find_checkpoints(tmp_path)
    plan = choose_resume(found, SAME)
    assert plan.folder == tmp_path / "global_step70"
    assert any("latest" in note for note in plan.notes)
    assert any("global_step90 is passed over" in note and "JSON" in note for note in plan.notes)
    assert any("global_step80 is passed over" in note and "optim_states.pt: 7 bytes" in note for note in plan.notes)
    with pytest.raises(ResumeError, match="--load-strict .*latest.*global_step90"):
        choose_resume(found, replace(SAME, load_strict=True))


@pytest.mark.parametrize("how", LOST)
def test_from_scratch_only_where_nothing_is_whole(how, tmp_path):
    _lose(tmp_path, how)
    found = find_checkpoints(tmp_path)
    plan = choose_resume(found, SAME)
    assert plan.is_fresh and bool(plan.notes) == (how != "missing")
    with pytest.raises(ResumeError, match="no checkpoint in"):
        choose_resume(found, replace(SAME, exit_on_missing_checkpoint=True))


def test_a_lost_pointer_to_universal_folders(tmp_path):
    _save(tmp_path / "global_step7")
    (tmp_path / "latest").write_text("global_step7")
    for iteration in (6, 7):
        _save(tmp_path / f"global_step{iteration}_universal", "universal", iteration)
    assert find_checkpoints(tmp_path).lost == ()  # nobody asked for it
    found = find_checkpoints(tmp_path, only_universal=True)
    assert found.universal.folder.name == "global_step7_universal" and "no latest_universal" in found.lost[0]
