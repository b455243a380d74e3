"""Both ways with DeepSpeed's own code: its converter reads our saves, its loader reads our universal folders."""

from __future__ import annotations

import json

import pytest
import torch

from harness.ranks import RankFailure, run_ranks
from matrix.cells import Cell, cell, cells
from matrix.families import MODELS
from matrix.recording import build, command_line, train
from matrix.stock import stock_convert
from megatron.ucp.convert import convert

NUM_STEPS = 3
SOURCES = (Cell(tp=2, pp=2, zero=1), Cell(dp=2, zero=2), Cell(tp=2, dp=2, zero=1))
TARGETS = (Cell(zero=1), Cell(dp=2, zero=2), Cell(tp=2, zero=1), Cell(pp=2, zero=1))
OTHERS = cells("kv2-tp4pp1dp1-z2 kv3-tp3pp1dp1-z1 bloom-tp3pp1dp1-z1 moe-tp2pp1dp1-z1 gptmoe-tp2pp2dp1-z1")
"""Fewer key/value heads than ranks, which keep parts of them; gates and ups of 40 features on 3 ranks; ALiBi; experts
cut inside, along dimension 1 and 2, with and without biases."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory, data) -> dict[Cell, dict]:
    made = {}
    for source in (*SOURCES, *OTHERS):
        folder = tmp_path_factory.mktemp(source.name)
        flags = {**MODELS.get(source.model, {}), **source.flags, "iters": NUM_STEPS + 1}
        argv = command_line(data, **flags, save=folder, save_interval=NUM_STEPS, exit_interval=NUM_STEPS)
        curves = run_ranks(source.world_size, train, argv)[0]
        whole = run_ranks(source.world_size, train, command_line(data, **flags))[0]
        native, universal = folder / f"global_step{NUM_STEPS}", folder / f"global_step{NUM_STEPS}_universal"
        convert(native, universal, num_workers=1)
        made[source] = {"native": native, "universal": universal, "curves": curves, "whole": whole}
    return made


@pytest.mark.parametrize("source", (*SOURCES, *OTHERS), ids=lambda it: it.name)
def test_stock_converter_reads_our_save(source: Cell, sources, tmp_path):
    made = sources[source]
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
    from megatron.checkpoint.state_digest import state_digests
    from megatron.engine.steps import train_step

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


LOADED = [(source, target) for source in SOURCES for target in TARGETS]
LOADED += [
    (cell("kv2-tp4pp1dp1-z2"), cell("kv2-tp2pp1dp1-z1")),
    (cell("kv2-tp4pp1dp1-z2"), cell("kv2-tp1pp2dp1-z1")),
    (cell("moe-tp2pp1dp1-z1"), cell("moe-tp2pp1dp1-z1")),
    (cell("moe-tp2pp1dp1-z1"), cell("moe-tp1pp1dp2-z2")),
]


@pytest.mark.parametrize("source, target", LOADED, ids=lambda it: it.name)
def test_stock_loader_resumes_from_our_universal_folder(source: Cell, target: Cell, sources, data, tmp_path):
    made = sources[source]
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"checkpoint": {"load_universal": True}}))
    argv = command_line(data, **MODELS.get(target.model, {}), **target.flags, deepspeed_config=config)
    for digests, steps, counted, loss in run_ranks(target.world_size, _stock_load, argv, str(made["universal"].parent)):
        assert digests == made["curves"].digests
        assert steps == {float(NUM_STEPS)}
        assert counted == (0, NUM_STEPS)
        assert abs(loss - made["whole"].losses[NUM_STEPS + 1]) < 1e-5


STOCK_TOLD: dict[str, tuple[str, str]] = {
    "moe-tp1pp2dp2ep2-z1": ("experts of 2 expert-parallel ranks; convert with tools", "NoneType"),
    "moe-tp1pp1dp2ep2-z2": ("experts of 2 expert-parallel ranks; convert with tools", "consumed 5760 numels out of"),
    "moe-tp1pp1dp4ep2-z3": ("ds_autoep_layers entry is invalid", "zero_to_fp32 does not support"),
}
"""What DeepSpeed's ds_to_universal and zero_to_fp32 end with."""


def _stock_weights(rank: int, world_size: int, folder: str) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    get_fp32_state_dict_from_zero_checkpoint(folder)


@pytest.mark.parametrize("name", STOCK_TOLD)
def test_stock_tools_refuse_dealt_experts(name: str, data, tmp_path):
    """They take the ep ranks' experts for parts of one shard; ZeRO-3's come out mixed up, without a word of their own.
    Ours converts the save."""
    source = cell(name)
    argv = command_line(data, **{**MODELS[source.model], **source.flags, "iters": 1}, save=tmp_path)
    run_ranks(source.world_size, train, argv)
    convert(tmp_path / "global_step1", tmp_path / "ours", num_workers=1)
    with pytest.raises(RankFailure, match=STOCK_TOLD[name][0]):
        run_ranks(1, stock_convert, str(tmp_path / "global_step1"), str(tmp_path / "stock"))
    with pytest.raises(RankFailure, match=STOCK_TOLD[name][1]):
        run_ranks(1, _stock_weights, str(tmp_path))
