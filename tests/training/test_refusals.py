"""Bad input ends a run with a named error that says what to do, on every rank, before anything is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.pt_files import save_again
from harness.ranks import run_ranks
from matrix.recording import build, command_line, train, write_dataset
from megatron.ucp.commit import checksum_file
from megatron.ucp.manifest import read_manifest, write_manifest

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "refusals_text_document")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, data) -> Path:
    """A run folder with one checkpoint, of two data-parallel ranks."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, train, command_line(data, zero=1, iters=NUM_STEPS, save=folder))
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def _outcome(rank: int, world_size: int, argv: list[str]) -> str:
    """The error of building the run; "built" without one."""
    try:
        build(argv, rank, world_size)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "built"


def _refused(argv: list[str], error: str, *told: str, world_size: int = 1) -> None:
    for outcome in run_ranks(world_size, _outcome, argv):
        assert outcome.startswith(error + ":"), outcome
        for text in told:
            assert text in outcome


def test_the_checkpoint_itself_is_taken(data, saved):
    """What follows is refused for its fault, not for everything."""
    assert run_ranks(2, _outcome, command_line(data, zero=1, iters=4, load=saved)) == ["built", "built"]


OTHER_MODELS = {
    "layers": (
        {"num_layers": 2},
        "model.num_layers: 4 in the Source, 2 here",
        "parameters only the Source has: layers.2",
    ),
    "width": ({"hidden_size": 64}, "model.hidden_size: 32 in the Source, 64 here", "final_norm.bias: shape (32,)"),
    "vocabulary": (
        {"vocab_size": 120},
        "model.vocab_size: 101 in the Source, 121 here",
        "word_embeddings.weight: shape",
    ),
    "GELU": ({"exact_gelu": True}, "model.exact_gelu: False in the Source, True here"),
    "untied": ({"untie_embeddings_and_output_weights": True}, "parameters the Source lacks: lm_head.weight"),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_checkpoint_of_another_model(case: str, data, saved):
    flags, *told = OTHER_MODELS[case]
    argv = command_line(data, zero=1, iters=4, load=saved, **flags)
    _refused(argv, "SourceMismatchError", "nothing was loaded", *told, world_size=2)


def test_checkpoint_of_an_exact_gelu(data, tmp_path):
    """Its ucp.json says so; that of a GELU by tanh says nothing, as before there was another."""
    flags = {"exact_gelu": True, "iters": 1, "save": tmp_path / "run", "save_interval": 1}
    run_ranks(1, train, command_line(data, **flags))
    argv = command_line(data, iters=2, load=tmp_path / "run")
    _refused(argv, "SourceMismatchError", "model.exact_gelu: True in the Source, False here")
    assert run_ranks(1, _outcome, [*argv, "--exact-gelu"]) == ["built"]


def test_another_optimizer(data, saved):
    argv = command_line(data, zero=1, iters=4, load=saved, optimizer="sgd")
    _refused(argv, "SourceMismatchError", "['momentum_buffer'] are needed", "--no-load-optim")
    assert run_ranks(1, _outcome, [*argv, "--no-load-optim", "--no-load-lr-state"]) == ["built"]


def test_another_schedule(data, saved):
    argv = command_line(data, zero=1, iters=4, load=saved, lr=5e-3)
    _refused(argv, "SourceMismatchError", "max_lr: saved 0.01, now 0.005", "--override-opt_param-scheduler")


def test_missing_shard_file(data, copy):
    """One rank's file is not there: all ranks say so, none waits."""
    (copy / f"global_step{NUM_STEPS}" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    argv = command_line(data, zero=1, iters=4, load=copy)
    _refused(
        argv,
        "DamagedCheckpointError",
        "failed on 2 of 2 ranks",
        "zero_pp_rank_1_mp_rank_00_optim_states.pt",
        world_size=2,
    )


def test_truncated_shard_file(data, copy):
    path = copy / f"global_step{NUM_STEPS}" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    os.truncate(path, path.stat().st_size // 2)
    _refused(command_line(data, iters=4, load=copy), "DamagedCheckpointError", "CorruptFileError", path.name)


def test_flipped_bits_are_named(data, copy):
    path = copy / f"global_step{NUM_STEPS}" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(path, weights_only=False)
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].data[7] += 1e-3
    save_again(content, path)
    told = "1 digests differ", "(fp32)", f"Files changed since they were written: {path.name}: copy"
    _refused(command_line(data, zero=1, iters=4, load=copy), "DamagedCheckpointError", *told, world_size=2)


def test_uncommitted_checkpoint(data, copy):
    (copy / f"global_step{NUM_STEPS}" / "ucp.json").unlink()
    _refused(command_line(data, iters=4, load=copy), "NotACheckpointError", "never committed")


def test_malicious_checkpoint_runs_nothing(data, copy):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {copy}/exploded",)

    path = copy / f"global_step{NUM_STEPS}" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(path, weights_only=False)
    torch.save({**content, "extra": Bomb()}, path)
    # Whoever means harm writes the table of files too.
    manifest = read_manifest(path.parent)
    write_manifest(path.parent, replace(manifest, files={**manifest.files, path.name: checksum_file(path)}))
    _refused(command_line(data, iters=4, load=copy), "DamagedCheckpointError", "UnsafePickleError")
    assert not (copy / "exploded").exists()


def test_nothing_to_load(data, saved, tmp_path):
    argv = command_line(data, iters=4, load=tmp_path)
    assert run_ranks(1, _outcome, argv) == ["built"]  # as Megatron: an empty folder is a fresh start, and said so
    _refused([*argv, "--exit-on-missing-checkpoint"], "ResumeError", "no checkpoint in")
    argv = command_line(data, iters=4, load=saved, universal_checkpoint=True)
    _refused(argv, "ResumeError", "no latest_universal", "Convert first with tools/ds_to_universal.py")


def test_missing_tag(data, saved):
    _refused(command_line(data, iters=4, load=saved, load_tag="global_step9"), "NotACheckpointError", "global_step9")


def test_finetune_takes_weights_only(data, saved):
    """Weights of the Source, everything else fresh: iteration 0, no moments."""
    argv = command_line(data, zero=1, iters=4, load=saved, finetune=True)
    for iteration, steps, moment, digests in run_ranks(2, _finetuned, argv):
        assert (iteration, steps, moment) == (0, {0.0}, 0.0)
        manifest = json.loads((saved / f"global_step{NUM_STEPS}" / "ucp.json").read_text())
        assert digests == {name: states["fp32"] for name, states in manifest["digests"].items()}


def _finetuned(rank: int, world_size: int, argv: list[str]):
    from megatron.checkpoint.state_digest import state_digests

    run = build(argv, rank, world_size)
    state = run.live.state
    state.make_states()
    moments = [float(i.state(state.base, "exp_avg").abs().max()) for i in state.intervals]
    digests = {name: states["fp32"] for name, states in state_digests(state).items()}
    return run.progress.iteration, {state.step_of(i.flat) for i in state.intervals}, max(moments), digests


VOCABULARY = {"vocab_size": 90}


def test_data_of_another_vocabulary(data):
    _refused(command_line(data, iters=4, **VOCABULARY), "VocabularyMismatchError", "another vocabulary", "what to do")


def test_truncated_dataset(data, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{data}{suffix}", tmp_path / f"cut{suffix}")
    os.truncate(tmp_path / "cut.bin", os.path.getsize(tmp_path / "cut.bin") - 100)
    _refused(command_line(tmp_path / "cut", iters=4), "CorruptDatasetError", "cut.bin")


COMMANDS = {
    "unknown-flag": (["--tensor-model-paralel-size", "2"], "--tensor-model-parallel-size"),
    "indivisible-batch": (["--global-batch-size", "7", "--micro-batch-size", "2"], "--global-batch-size"),
    "world-size": (["--tensor-model-parallel-size", "2"], "the number of ranks is not a multiple of tp x pp x sp"),
    "missing-data": (["--data-path", "no/such/prefix"], "no/such/prefix"),
    "experts": (["--num-experts", "4", "--topk", "9"], "more experts than there are"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_ends_with_the_message_alone(case: str, data, tmp_path):
    flags, told = COMMANDS[case]
    argv = command_line(data, iters=4, save=tmp_path / "save", tensorboard_dir=tmp_path / "events")
    environment = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    done = subprocess.run(
        [sys.executable, str(ROOT / "pretrain_gpt.py"), *argv, *flags],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert told in done.stderr and "ConfigError" in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())
