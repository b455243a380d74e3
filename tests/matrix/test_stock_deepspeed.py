"""Both ways with DeepSpeed's own code: its converter reads our saves, its loader reads our universal folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from harness.ranks import run_ranks
from matrix.cells import Cell
from matrix.recording import build, command_line, train, write_dataset
from matrix.stock import stock_convert
from megatron.ucp.convert import convert

NUM_STEPS = 3
SOURCES = (Cell(tp=2, pp=2, zero=1), Cell(dp=2, zero=2), Cell(tp=2, dp=2, zero=1))
TARGETS = (Cell(zero=1), Cell(dp=2, zero=2), Cell(tp=2, zero=1), Cell(pp=2, zero=1))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "matrix_text_document")


@pytest.fixture(scope="module")
def sources(tmp_path_factory, data) -> dict[Cell, dict]:
    made = {}
    for cell in SOURCES:
        folder = tmp_path_factory.mktemp(cell.name)
        argv = command_line(
            data, **cell.flags, iters=NUM_STEPS + 1, save=folder, save_interval=NUM_STEPS, exit_interval=NUM_STEPS
        )
        curves = run_ranks(cell.world_size, train, argv)[0]
        whole = run_ranks(cell.world_size, train, command_line(data, **cell.flags, iters=NUM_STEPS + 1))[0]
        native, universal = folder / f"global_step{NUM_STEPS}", folder / f"global_step{NUM_STEPS}_universal"
        convert(native, universal, num_workers=1)
        made[cell] = {"native": native, "universal": universal, "curves": curves, "whole": whole}
    return made


@pytest.mark.parametrize("cell", SOURCES, ids=lambda cell: cell.name)
def teststock_converter_reads_our_save(cell: Cell, sources, tmp_path):
    made = sources[cell]
    output = tmp_path / "stock_universal"
    run_ranks(1, stock_convert, str(made["native"]), str(output))
    names = sorted(path.name for path in (output / "zero").iterdir() if path.is_dir())
    assert names == sorted(made["curves"].digests)
    for name in names:
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            theirs, ours = (
                torch.load(folder / "zero" / name / f"{state}.pt", weights_only=False)["param"]
                for folder in (output, made["universal"])
            )
            assert torch.equal(theirs, ours), f"{name} {state}"


def _stock_load(rank: int, world_size: int, argv: list[str], folder: str):
    from megatron.training.engine import train_step
    from megatron.training.state_digest import state_digests

    run = build(argv, rank, world_size)
    state = run.live.state
    state.make_states()
    before, fresh = run.live.engine.global_steps, state_digests(state)
    run.live.engine.load_checkpoint(folder)
    assert all(state_digests(state)[name] != digests for name, digests in fresh.items())
    found = (
        state_digests(state),
        {state.step_of(i.flat) for i in state.intervals},
        (before, run.live.engine.global_steps),
    )
    return *found, train_step(run.live.engine, run.batches.train(NUM_STEPS * 8))


@pytest.mark.parametrize("target", TARGETS, ids=lambda cell: f"to-{cell.name}")
@pytest.mark.parametrize("source", SOURCES, ids=lambda cell: cell.name)
def test_stock_loader_resumes_from_our_universal_folder(source: Cell, target: Cell, sources, data, tmp_path):
    made = sources[source]
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"checkpoint": {"load_universal": True}}))
    argv = command_line(data, **target.flags, deepspeed_config=config)
    for digests, steps, counted, loss in run_ranks(target.world_size, _stock_load, argv, str(made["universal"].parent)):
        assert digests == made["curves"].digests
        assert steps == {float(NUM_STEPS)}
        assert counted == (0, NUM_STEPS)
        assert abs(loss - made["whole"].losses[NUM_STEPS + 1]) < 1e-5
