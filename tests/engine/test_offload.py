"""CPU offload of the optimizer and of ZeRO-3's parameters: the same trajectory, and any-to-any with runs without it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.ranks import run_ranks
from matrix.cells import Cell
from matrix.recording import build, command_line, train
from matrix.taking import take_all
from megatron.ucp.convert import convert

NUM_STEPS = 3
OPTIMIZER = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
PARAMETERS = {"offload_param": {"device": "cpu", "pin_memory": True}}


@dataclass(frozen=True)
class Case:
    cell: Cell
    zero: dict
    """zero_optimization of the DeepSpeed JSON."""
    is_bf16: bool = False


CASES = {
    "zero2-tp2": Case(Cell(tp=2, dp=2, zero=2), OPTIMIZER),
    "zero3": Case(Cell(dp=2, zero=3), OPTIMIZER),
    "zero3-parameters-too": Case(Cell(dp=2, zero=3), OPTIMIZER | PARAMETERS | {"sub_group_size": 5000}),
    "zero1-bf16": Case(Cell(dp=2, zero=1), OPTIMIZER, is_bf16=True),
    "zero3-bf16-parameters-only": Case(
        Cell(tp=2, dp=2, zero=3), PARAMETERS | {"stage3_param_persistence_threshold": 0}, is_bf16=True
    ),
}
WITHOUT = {False: (Cell(), Cell(dp=2, zero=1), Cell(dp=2, zero=3)), True: (Cell(zero=1), Cell(dp=2, zero=3))}
"""Cells without offload, by precision; the first is the reference."""


@pytest.fixture(scope="module")
def line(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("json")

    def line_of(case: Case, **flags) -> list[str]:
        config = folder / f"{abs(hash(json.dumps(case.zero)))}.json"
        config.write_text(json.dumps({"zero_optimization": case.zero}))
        flags = {"iters": NUM_STEPS + 2, "num_layers": 2, **flags}
        return command_line(data, **case.cell.flags, deepspeed_config=config, bf16=case.is_bf16, **flags)

    return line_of


@pytest.fixture(scope="module")
def references(line, tmp_path_factory) -> dict[bool, dict]:
    """By precision: the first cell without offload, saved, and its whole run."""
    made = {}
    for is_bf16, cells in WITHOUT.items():
        case = Case(cells[0], {}, is_bf16)
        whole = run_ranks(case.cell.world_size, train, line(case))[0]
        made[is_bf16] = {"whole": whole, **_saved(case, line, tmp_path_factory.mktemp("reference"))}
    return made


def _saved(case: Case, line, folder: Path) -> dict:
    argv = line(case, exit_interval=NUM_STEPS, save=folder)
    curves = run_ranks(case.cell.world_size, train, argv)[0]
    native, universal = folder / f"global_step{NUM_STEPS}", folder / f"global_step{NUM_STEPS}_universal"
    convert(native, universal, num_workers=1)
    return {"direct": str(native), "universal": str(universal), "curves": curves}


@pytest.fixture(scope="module")
def sources(line, tmp_path_factory) -> dict[str, dict]:
    return {name: _saved(case, line, tmp_path_factory.mktemp(name)) for name, case in CASES.items()}


def _near(losses: dict, whole: dict, is_bf16: bool) -> bool:
    # bf16 rounds to 8 bits what another order of sums has changed.
    return all(abs(loss - whole[step]) <= (2e-2 if is_bf16 else 2e-6) for step, loss in losses.items())


@pytest.mark.parametrize("name", CASES)
def test_trains_as_without_offload(name: str, sources, references):
    case, curves = CASES[name], sources[name]["curves"]
    whole = references[case.is_bf16]["whole"]
    assert sorted(curves.losses) == [1, 2, 3]
    assert _near(curves.losses, whole.losses, case.is_bf16)


@pytest.mark.parametrize("name", ["zero1-bf16", "zero2-tp2", "zero3-parameters-too"])
def test_resumes_natively_to_the_bit(name: str, sources, line):
    """Its own save, with DeepSpeed's buffers beside the masters, goes on as if nothing had been."""
    case = CASES[name]
    whole = run_ranks(case.cell.world_size, train, line(case))[0]
    second = run_ranks(case.cell.world_size, train, line(case, load=sources[name]["direct"]))[0]
    assert sorted(second.losses) == [NUM_STEPS + 1, NUM_STEPS + 2]
    assert second.losses == {step: whole.losses[step] for step in second.losses}
    assert second.grad_norms == {step: whole.grad_norms[step] for step in second.grad_norms}
    assert second.digests == whole.digests


@pytest.mark.parametrize("name", CASES)
def test_as_target(name: str, sources, references, line):
    """Of a run without offload, and of every other with it; the last goes on as the run that never stopped."""
    case = CASES[name]
    others = [made for other, made in sources.items() if CASES[other].is_bf16 == case.is_bf16 and other != name]
    makers = [*others, references[case.is_bf16]]
    plans = [(kind, made[kind]) for made in makers for kind in ("direct", "universal")]
    whole = references[case.is_bf16]["whole"]
    for taken in run_ranks(case.cell.world_size, take_all, line(case), plans, None, True):
        for found, made in zip(taken, [made for made in makers for _ in range(2)], strict=True):
            assert found.digests == made["curves"].digests
            assert found.steps == {float(NUM_STEPS)}
        assert sorted(taken[-1].losses) == [NUM_STEPS + 1, NUM_STEPS + 2]
        assert _near(taken[-1].losses, whole.losses, case.is_bf16)


@pytest.mark.parametrize("is_bf16", [False, True], ids=["fp32", "bf16"])
def test_as_source(is_bf16: bool, sources, line):
    makers = [made for name, made in sources.items() if CASES[name].is_bf16 == is_bf16]
    plans = [(kind, made[kind]) for made in makers for kind in ("direct", "universal")]
    for cell in WITHOUT[is_bf16]:
        for taken in run_ranks(cell.world_size, take_all, line(Case(cell, {}, is_bf16)), plans):
            for found, made in zip(taken, [made for made in makers for _ in range(2)], strict=True):
                assert found.digests == made["curves"].digests, cell.name


def _where(rank: int, world_size: int, argv: list[str]):
    """(the optimizer's class, devices of masters and of weights): nothing had to be compiled for it."""
    run = build(argv, rank, world_size)
    state, optimizer = run.live.state, run.live.engine.optimizer
    is_offloaded = getattr(optimizer, "offload_optimizer", None) or getattr(optimizer, "cpu_offload", None)
    return type(state.base).__name__, bool(is_offloaded), bool(getattr(optimizer, "offload_param", False))


@pytest.mark.parametrize("name", CASES)
def test_offload_is_really_on(name: str, line):
    """The tests above would pass without it. The optimizer is torch's: DeepSpeed's own compiles for a minute."""
    case = CASES[name]
    expected = ("AdamW", "offload_optimizer" in case.zero, "offload_param" in case.zero)
    assert set(run_ranks(case.cell.world_size, _where, line(case))) == {expected}
