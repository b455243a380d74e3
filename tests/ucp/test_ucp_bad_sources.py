"""Folders that are not one whole save: refused before anything is written, and by the names of the files to blame."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ucp.synthetic import Parameter, make_state, model, write_native
from ucp.test_ucp_deepspeed_compat import info_for

from megatron.ucp.convert import convert
from megatron.ucp.errors import (
    CorruptFileError,
    DigestMismatchError,
    MissingFileError,
    NotACheckpointError,
    SourceError,
    UcpError,
)
from megatron.ucp.file_table import changed_files
from megatron.ucp.manifest import read_manifest, write_manifest
from megatron.ucp.safe_load import load
from megatron.ucp.sources import find_checkpoint, open_source
from megatron.ucp.sources.one_save import disagreements
from megatron.ucp.topology import Topology
from megatron.ucp.torch_file import save_streamed
from megatron.ucp.verify import verify

STATE, OTHER = make_state(model(), seed=21), make_state(model(), seed=22)
DP3 = Topology(dp_size=3)
OPTIMIZER = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
WEIGHTS = {1: "mp_rank_00_model_states.pt", 3: "zero_pp_rank_1_mp_rank_00_model_states.pt"}


def write(folder: Path, zero_stage=1, topology=DP3, state=STATE, with_manifest=False, **options) -> Path:
    info = info_for(topology.tp_size)
    write_native(folder, state, topology, zero_stage, info=info, with_manifest=with_manifest, **options)
    return folder


def mix(folder: Path, other: Path, name: str) -> None:
    """One file of another save under the right name."""
    assert (folder / name).read_bytes() != (other / name).read_bytes()
    shutil.copyfile(other / name, folder / name)


def edited(folder: Path, step: int) -> Path:
    """As if saved at another step."""
    for path in folder.glob("*.pt"):
        content = load(path, mmap=False)
        if "global_steps" in content:
            content["global_steps"] = content["iteration"] = step
        else:
            optimizer = content["optimizer_state_dict"]
            base = optimizer.get("base_optimizer_state") or optimizer["optimizer_state_dict"]
            for state in base["state"].values():
                state["step"] = torch.tensor(float(step))
        save_streamed(content, path)
    return folder


def assert_refused(folder: Path, error: type[UcpError], *names: str) -> str:
    """By conversion and by verify, naming the files, and nothing is left behind."""
    output = folder.parent / "out"
    before = sorted(folder.parent.iterdir())
    with pytest.raises(error) as caught:
        convert(folder, output)
    message = str(caught.value)
    assert all(name in message for name in names), message
    assert sorted(folder.parent.iterdir()) == before
    findings = "\n".join(verify(folder).findings)
    assert all(name in findings for name in names), findings
    return message


@pytest.mark.parametrize("with_manifest", [True, False], ids=["manifest", "foreign"])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_missing_rank(tmp_path, zero_stage, with_manifest):
    """The last rank too, whose absence leaves a folder that looks like one of fewer ranks."""
    folder = write(tmp_path / "n", zero_stage, with_manifest=with_manifest)
    (folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    assert_refused(folder, MissingFileError, "zero_pp_rank_2_mp_rank_00_optim_states.pt")


@pytest.mark.parametrize("with_manifest", [True, False], ids=["manifest", "foreign"])
def test_missing_model_states(tmp_path, with_manifest):
    folder = write(tmp_path / "n", 3, with_manifest=with_manifest)
    (folder / "zero_pp_rank_2_mp_rank_00_model_states.pt").unlink()
    assert_refused(folder, MissingFileError, "zero_pp_rank_2_mp_rank_00_model_states.pt")


@pytest.mark.parametrize("with_manifest", [True, False], ids=["manifest", "foreign"])
def test_truncated_files_are_all_named(tmp_path, with_manifest):
    folder = write(tmp_path / "n", with_manifest=with_manifest)
    names = [OPTIMIZER, "zero_pp_rank_2_mp_rank_00_optim_states.pt"]
    for name in names:
        os.truncate(folder / name, 1000)
    assert_refused(folder, CorruptFileError, *names)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_file_of_another_run_with_a_manifest(tmp_path, zero_stage):
    """Same shapes, same step: only the digest shows it, and the checksums say which file it was."""
    folder, other = (
        write(tmp_path / name, zero_stage, state=state, with_manifest=True)
        for name, state in (("n", STATE), ("other", OTHER))
    )
    mix(folder, other, OPTIMIZER)
    message = assert_refused(folder, DigestMismatchError, OPTIMIZER)
    assert "zero_pp_rank_0" not in message
    assert changed_files(folder, read_manifest(folder)) == [OPTIMIZER]


def test_the_first_copy_that_differs_names_the_changed_file(tmp_path):
    """Tensor-parallel replicas show it before the digest does."""
    folder, other = (
        write(tmp_path / name, topology=Topology(tp_size=2), state=state, with_manifest=True)
        for name, state in (("n", STATE), ("other", OTHER))
    )
    name = "zero_pp_rank_0_mp_rank_01_optim_states.pt"
    mix(folder, other, name)
    assert_refused(folder, UcpError, name)


def test_only_what_was_changed_is_blamed(tmp_path):
    folder = write(tmp_path / "n", with_manifest=True)
    manifest = read_manifest(folder)
    assert changed_files(folder, manifest) == []
    (folder / OPTIMIZER).unlink()
    (folder / WEIGHTS[1]).write_bytes(b"")
    assert changed_files(folder, manifest) == sorted([OPTIMIZER, WEIGHTS[1]])
    with pytest.raises(MissingFileError) as caught:
        open_source(folder)
    assert OPTIMIZER in str(caught.value) and WEIGHTS[1] in str(caught.value)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_file_of_another_world_size(tmp_path, zero_stage):
    folder = write(tmp_path / "n", zero_stage)
    mix(folder, write(tmp_path / "other", zero_stage, Topology(dp_size=2)), OPTIMIZER)
    message = assert_refused(folder, SourceError, f"{OPTIMIZER}: partition_count is [2], in 2 other files [3]")
    assert "zero_pp_rank_0" not in message


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_an_optimizer_file_of_another_step(tmp_path, zero_stage):
    folder = write(tmp_path / "n", zero_stage)
    mix(folder, edited(write(tmp_path / "other", zero_stage), 9), OPTIMIZER)
    assert_refused(folder, SourceError, f"{OPTIMIZER}: the optimizer's step is 9.0, in 2 other files 5.0")


def test_model_states_of_another_step(tmp_path):
    folder = write(tmp_path / "n", 3)
    mix(folder, edited(write(tmp_path / "other", 3), 9), WEIGHTS[3])
    assert_refused(folder, SourceError, f"{WEIGHTS[3]}: global_steps is 9, in 2 other files 5")


@pytest.mark.parametrize("topology", [DP3, Topology(tp_size=2, dp_size=2)], ids=str)
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_model_states_of_another_run(tmp_path, topology, zero_stage):
    """They say the same of themselves; the weights are not the rounded masters."""
    folder = write(tmp_path / "n", zero_stage, topology)
    mix(folder, write(tmp_path / "other", zero_stage, topology, OTHER), WEIGHTS[1])
    assert_refused(folder, SourceError, WEIGHTS[1])


@pytest.mark.parametrize("with_manifest", [True, False], ids=["manifest", "foreign"])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("which", ["optimizer", "weights"])
def test_a_file_of_another_model(tmp_path, which, zero_stage, with_manifest):
    parameters = [*model(), Parameter("layers.0.extra.weight", (11, 7), "whole", "decay", 1)]
    other = tmp_path / "other"
    state = make_state(parameters, seed=23)
    write_native(other, state, DP3, zero_stage, parameters=parameters, with_manifest=with_manifest)
    folder = write(tmp_path / "n", zero_stage, with_manifest=with_manifest)
    name = OPTIMIZER if which == "optimizer" else WEIGHTS[3 if zero_stage == 3 else 1]
    mix(folder, other, name)
    assert_refused(folder, UcpError, name)


def test_two_files_of_one_rank(tmp_path):
    """A bfloat16 run saved into the folder of a float32 one."""
    folder = write(tmp_path / "n")
    shutil.copyfile(folder / OPTIMIZER, folder / f"bf16_{OPTIMIZER}")
    assert_refused(folder, SourceError, OPTIMIZER, f"bf16_{OPTIMIZER}")


def test_a_manifest_without_a_table_of_files_lets_the_files_speak(tmp_path):
    folder = write(tmp_path / "n", with_manifest=True)
    write_manifest(folder, replace(read_manifest(folder), files={}, digests={}, unverified="a test"))
    mix(folder, edited(write(tmp_path / "other"), 9), OPTIMIZER)
    assert_refused(folder, SourceError, f"{OPTIMIZER}: the optimizer's step is 9.0, in 2 other files 5.0")


def test_without_a_majority_all_are_named_by_answer():
    answers = {"a": {"step": 1, "version": "x"}, "b": {"step": 2, "version": "x"}, "c": {"version": "y"}}
    assert disagreements(answers) == ["step: 1 in a; 2 in b", "c: version is y, in 2 other files x"]
    assert disagreements({"a": {"step": 1}, "b": {"other": 2}}) == []


@pytest.mark.parametrize(
    ("names", "tag", "newest"),
    [
        (["checkpoint-90", "checkpoint-500"], "global_step{}", "checkpoint-500"),
        (["checkpoint_2", "checkpoint_10"], "pytorch_model", "checkpoint_10"),
        (["step_5"], "pytorch_model", "step_5"),
        (["checkpoint-1", "mine"], "global_step{}", None),
        (["a"], "global_step{}", None),
    ],
)
def test_a_root_of_run_folders_is_looked_into(names, tag, newest, tmp_path):
    for name in names:
        folder = tmp_path / name / tag.format(name.partition("-")[2])
        write_native(folder, STATE, Topology(), 1)
        (tmp_path / name / "latest").write_text(folder.name)
    (tmp_path / "runs").mkdir()  # TensorBoard's
    if newest is None:
        with pytest.raises(NotACheckpointError, match=f"give one of the checkpoints inside: .*{names[0]}/"):
            find_checkpoint(tmp_path)
    else:
        assert find_checkpoint(tmp_path).parent.name == newest
        assert open_source(tmp_path).manifest.iteration == 5
