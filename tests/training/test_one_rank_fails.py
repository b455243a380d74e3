"""What is wrong on one rank only ends them all, with its message, instead of leaving the others waiting.

Faults as another node would have them: a file that only this rank does not see, or sees broken. And what is wrong on
every rank is told once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.ranks import run_ranks
from matrix.recording import build, command_line, train, write_dataset

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 2
VICTIM = 1


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "one_rank_text_document")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, data) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, train, command_line(data, zero=1, iters=NUM_STEPS, save=folder))
    return folder


def _hide(part: str) -> None:
    """This rank finds no file whose name contains `part`, nor lists it in a folder."""
    import torch

    from megatron.ucp import ordinary_file, torch_file

    def refusing(action):
        def call(path, *args, **kwargs):
            if part in str(path):
                raise FileNotFoundError(2, "No such file or directory", str(path))
            return action(path, *args, **kwargs)

        return call

    torch.load = refusing(torch.load)
    os.lstat = refusing(os.lstat)
    torch_file.open_output = refusing(torch_file.open_output)
    ordinary_file.read_ordinary = refusing(ordinary_file.read_ordinary)
    iterdir, is_file = Path.iterdir, Path.is_file
    Path.iterdir = lambda folder: (path for path in iterdir(folder) if part not in path.name)
    Path.is_file = lambda path: part not in path.name and is_file(path)


def _outcome(rank: int, world_size: int, argv: list[str], hidden: str | None):
    """(error, whether another rank tells it, elements of the weights that changed)."""
    import torch

    from megatron.parallel.rank_errors import REPORTED_ELSEWHERE
    from megatron.training import build as building

    if rank == VICTIM and hidden is not None:
        _hide(hidden)
    weights = []
    load = building.load

    def load_and_compare(live, *args):
        before = [param.detach().clone() for param in live.engine.module.parameters()]
        try:
            return load(live, *args)
        finally:
            after = live.engine.module.parameters()
            weights.append(sum(int((a != b).sum()) for a, b in zip(before, after, strict=True)))

    building.load = load_and_compare
    try:
        build(argv, rank, world_size)
    except Exception as error:
        # Every rank is here, or this would be a hang.
        torch.distributed.barrier()
        return f"{type(error).__name__}: {error}", getattr(error, REPORTED_ELSEWHERE, None), weights
    return "built", None, weights


def test_without_a_fault_it_loads(data, saved):
    outcomes = run_ranks(2, _outcome, command_line(data, zero=1, iters=4, load=saved), None)
    assert [told for told, _, _ in outcomes] == ["built", "built"]
    assert any(changed[0] > 0 for _, _, changed in outcomes), "the load must have changed weights"


HIDDEN = {"shard": "zero_pp_rank_1_mp_rank_00_optim_states.pt", "manifest": "ucp.json", "random-streams": "rng_state"}


@pytest.mark.parametrize("case", HIDDEN)
def test_checkpoint_file_missing_on_one_rank(case: str, data, saved, tmp_path):
    argv = command_line(data, zero=1, iters=4, load=saved, save=tmp_path / "save", tensorboard_dir=tmp_path / "events")
    outcomes = run_ranks(2, _outcome, argv, HIDDEN[case])
    for rank, (told, is_reported_elsewhere, changed) in enumerate(outcomes):
        assert told.startswith("CheckpointError:") and HIDDEN[case] in told
        assert ("ranks [1]: none" if case == "manifest" else "failed on 1 of 2 ranks\nranks [1]: ") in told
        assert is_reported_elsewhere == (rank != 0), "one rank tells"
        if case != "random-streams":
            assert changed == [], "refused when it was opened, before the model was built"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_dataset_missing_on_one_rank(suffix: str, data, tmp_path):
    argv = command_line(data, zero=1, iters=4, tensorboard_dir=tmp_path / "events")
    first, second = run_ranks(2, _outcome_without_dataset, argv, suffix)
    assert second[0].startswith("MissingDatasetError:") and not second[1]
    assert first[0].startswith("OtherRankError: reading the dataset failed on 1 of 2 ranks\nrank 1: MissingDataset")
    assert first[1] is True
    assert not any(tmp_path.iterdir())


def _outcome_without_dataset(rank: int, world_size: int, argv: list[str], suffix: str):
    """The files go after the command line was checked, on this rank's machine."""
    from megatron.training import build as building

    batches = building.Batches

    def without(config, *args, **kwargs):
        if rank == VICTIM:
            is_file, exists = Path.is_file, Path.exists
            Path.is_file = lambda path: path.suffix != suffix and is_file(path)
            Path.exists = lambda path: path.suffix != suffix and exists(path)
        return batches(config, *args, **kwargs)

    building.Batches = without
    return _outcome(rank, world_size, argv, None)


def test_tensorboard_folder_that_cannot_be_made(data, tmp_path):
    """Only rank 0 opens it."""
    (tmp_path / "file").write_text("in the way")
    argv = command_line(data, zero=1, iters=4, tensorboard_dir=tmp_path / "file" / "events")
    first, second = run_ranks(2, _outcome, argv, None)
    assert "file" in first[0] and "Error" in first[0]
    assert second[0].startswith("OtherRankError: opening --tensorboard-dir")


def test_another_model_leaves_the_engine_as_it_was(data, saved):
    argv = command_line(data, zero=1, iters=4, load=saved, num_layers=6)
    for rank, (told, is_reported_elsewhere, changed) in enumerate(run_ranks(2, _outcome, argv, None)):
        assert told.startswith("SourceMismatchError:") and "parameters the Source lacks: layers.4." in told
        assert changed == [0]
        assert is_reported_elsewhere == (rank != 0)


def test_a_checkpoint_folder_given_directly(data, saved, tmp_path):
    """Committed: it is loaded. Not committed: refused, where once it was taken for an empty run folder."""
    folder = Path(shutil.copytree(saved / f"global_step{NUM_STEPS}", tmp_path / "there"))
    assert run_ranks(1, _outcome, command_line(data, iters=4, load=folder), None)[0][0] == "built"
    (folder / "ucp.json").unlink()
    told = run_ranks(1, _outcome, command_line(data, iters=4, load=folder), None)[0][0]
    assert told.startswith("NotACheckpointError:") and "never committed" in told


def _pretrain(rank: int, argv: list[str]) -> subprocess.Popen:
    environment = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    environment |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *argv]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_every_rank_has_is_told_once(data):
    argv = command_line(data, iters=4, global_batch_size=7, micro_batch=2)
    processes = [_pretrain(rank, argv) for rank in range(2)]
    told = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "ConfigError" in told[0] and told[1] == ""
