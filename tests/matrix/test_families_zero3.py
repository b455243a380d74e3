"""ZeRO-3 that gives every weight back after use and gathers it again for backward, in the other families' layers.

At DeepSpeed's usual threshold such small weights stay whole between steps, and nothing of this would be seen.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.ranks import RankFailure, run_ranks
from matrix.cells import Cell, cell
from matrix.families import MODELS
from matrix.recording import Curves, command_line, train, write_dataset

CASES = (
    ("kv2-tp3pp1dp1-z3", {}),
    ("kv2-tp3pp1dp1-z3", {"recompute_granularity": "full"}),
    ("qwen-tp2pp1dp2-cut-z3", {}),
    ("bloom-tp1pp1dp2-z3", {"recompute_granularity": "selective"}),
    ("moe-tp2pp1dp2ep2-z3", {}),
    ("moe-tp2pp1dp2ep2-z3", {"recompute_granularity": "full"}),
    ("gptmoe-tp1pp1dp4ep2-z3", {}),
)


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> tuple[Path, Path]:
    """The dataset, and a DeepSpeed JSON under which nothing persists."""
    folder = tmp_path_factory.mktemp("zero3")
    config = folder / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    return write_dataset(folder / "matrix_text_document"), config


def _argv(place: Cell, data: Path, **flags) -> list[str]:
    return command_line(data, **{**MODELS[place.model], **place.flags, "iters": 3, **flags})


@pytest.fixture(scope="module")
def one_process(flags) -> dict[str, Curves]:
    """By model: plain, without ZeRO."""
    models = {cell(name).model for name, _ in CASES}
    return {name: run_ranks(1, train, _argv(Cell(how="plain", model=name), flags[0]))[0] for name in sorted(models)}


@pytest.mark.parametrize("name, more", CASES, ids=lambda it: it if isinstance(it, str) else "-".join(it.values()) or "")
def test_trains_as_one_process(name: str, more: dict, flags, one_process):
    place, (data, config) = cell(name), flags
    curves = run_ranks(place.world_size, _train_in_pieces, _argv(place, data, deepspeed_config=config, **more))[0]
    truth = one_process[place.model]
    assert sorted(truth.losses) == sorted(curves.losses) == [1, 2, 3]
    for step, loss in truth.losses.items():
        assert curves.losses[step] == pytest.approx(loss, abs=2e-6)
        assert curves.grad_norms[step] == pytest.approx(truth.grad_norms[step], rel=2e-5)


def _train_in_pieces(rank: int, world_size: int, argv: list[str]) -> Curves:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    from matrix.recording import build, curves
    from megatron.training.loop import fit

    run = build(argv, rank, world_size)
    fit(run)
    states = {param.ds_status for param in run.live.engine.module.parameters()}
    assert states == {ZeroParamStatus.NOT_AVAILABLE}, "weights are whole between steps: nothing was given back"
    return curves(run, {})


def test_at_the_usual_threshold_nothing_would_be_seen(flags):
    with pytest.raises(RankFailure, match="nothing was given back"):
        run_ranks(2, _train_in_pieces, _argv(cell("llama-tp1pp1dp2-z3"), flags[0]))


def test_fault_a_router_whose_weight_nobody_brings_back(flags):
    """As if its module returned no tensor: DeepSpeed's hooks are passed by in the second half of a step."""
    place = cell("moe-tp1pp1dp2ep2-z3")
    with pytest.raises(RankFailure, match="size of tensor|must match|invalid"):
        run_ranks(2, _hidden_from_hooks, _argv(place, flags[0], deepspeed_config=flags[1]))


def _hidden_from_hooks(rank: int, world_size: int, argv: list[str]) -> Curves:
    from megatron.layers.router import Router

    class Hidden:
        def __init__(self, tensor):
            self.tensor = tensor

    forward, call = Router.forward, Router.__call__
    Router.forward = lambda self, x: Hidden(forward(self, x))
    Router.__call__ = lambda self, x: call(self, x).tensor
    return _train_in_pieces(rank, world_size, argv)
