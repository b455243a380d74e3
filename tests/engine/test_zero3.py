"""ZeRO-3 under all its settings: built in pieces, the same trajectory as one process, any Source and any Target."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from harness.ranks import run_ranks
from matrix.cells import Cell
from matrix.recording import build, command_line, train
from matrix.taking import Taken, take_all
from megatron.ucp.convert import convert

NUM_STEPS = 3
BATCH = 24
# Six heads of 5, a vocabulary of 101: cut by 2 and 3, and by nothing evenly.
SMALL = {"hidden_size": 30, "num_attention_heads": 6, "num_layers": 2}
# Norms of 4 elements, fewer than the ranks.
TINY = {"hidden_size": 4, "num_attention_heads": 2, "num_layers": 2}


@dataclass(frozen=True)
class Case:
    cell: Cell
    json: dict = field(default_factory=dict)
    """zero_optimization of the DeepSpeed JSON."""
    model: dict = field(default_factory=lambda: SMALL)


CASES = {
    "several-sub-groups": Case(Cell(dp=2, zero=3), {"sub_group_size": 500}),
    "nothing-persists": Case(Cell(dp=3, zero=3), {"stage3_param_persistence_threshold": 0}),
    "everything-persists": Case(Cell(dp=4, zero=3), {"stage3_param_persistence_threshold": 10**9}),
    "padded-vocabulary-on-tp2": Case(Cell(tp=2, dp=2, zero=3), {"sub_group_size": 2000}),
    "padded-vocabulary-on-tp3": Case(Cell(tp=3, dp=2, zero=3)),
    "smaller-than-dp8": Case(Cell(dp=8, zero=3), {"sub_group_size": 20, "stage3_param_persistence_threshold": 0}, TINY),
}
REFERENCES = {"small": SMALL, "tiny": TINY}


@pytest.fixture(scope="module")
def line(data, tmp_path_factory):
    """case -> command line."""
    folder = tmp_path_factory.mktemp("json")

    def line_of(case: Case, **flags) -> list[str]:
        config = folder / f"{abs(hash(json.dumps(case.json)))}.json"
        config.write_text(json.dumps({"zero_optimization": case.json}))
        flags = {"iters": NUM_STEPS + 2, "global_batch_size": BATCH, **case.model, **flags}
        return command_line(data, **case.cell.flags, deepspeed_config=config, **flags)

    return line_of


def _saved(case: Case, line, folder: Path) -> dict:
    argv = line(case, exit_interval=NUM_STEPS, save=folder)
    curves = run_ranks(case.cell.world_size, train, argv)[0]
    native = folder / f"global_step{NUM_STEPS}"
    universal = folder / f"global_step{NUM_STEPS}_universal"
    convert(native, universal, num_workers=1)
    return {"direct": str(native), "universal": str(universal), "curves": curves}


@pytest.fixture(scope="module")
def references(line, tmp_path_factory) -> dict[int, dict]:
    """By the model's hidden size: one process without ZeRO, saved after three steps, and its whole trajectory."""
    made = {}
    for name, model in REFERENCES.items():
        case = Case(Cell(), model=model)
        whole = run_ranks(1, train, line(case))[0]
        made[model["hidden_size"]] = {**_saved(case, line, tmp_path_factory.mktemp(name)), "whole": whole}
    return made


@pytest.fixture(scope="module")
def sources(line, tmp_path_factory) -> dict[str, dict]:
    return {name: _saved(case, line, tmp_path_factory.mktemp(name)) for name, case in CASES.items()}


# -- zero.Init ------------------------------------------------------------------------------------------------------


def _built(rank: int, world_size: int, argv: list[str]):
    """What this rank holds of its shard after the build, and the most whole elements that stood at any time before."""
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import Init

    from megatron.checkpoint.state_digest import state_digests

    post_init, most = Init._post_init_method, [0]

    def watched(self, module) -> None:
        whole = sum(p.numel() for p in gc.get_objects() if isinstance(p, torch.nn.Parameter))
        most[0] = max(most[0], whole)
        post_init(self, module)

    Init._post_init_method = watched
    state = build(argv, rank, world_size).live.state
    params = dict(state.engine.module.named_parameters())
    assert all(p.atomic_layout.shape and hasattr(p, "is_decayed") for p in params.values())
    assert {p.ds_tensor.dtype for p in params.values()} == {state.intervals[0].param.dtype}
    masters = {name: digests["fp32"] for name, digests in state_digests(state).items()}
    return {
        "whole": [name for name, p in params.items() if p.numel()],
        "most whole": most[0],
        "largest layer": max(
            sum(p.ds_numel for p in module.parameters(recurse=False)) for module in state.engine.module.modules()
        ),
        "pieces": sum(p.ds_tensor.numel() for p in params.values()),
        "shard": sum(p.ds_numel for p in params.values()),
        "padding": sum(p.ds_tensor.numel() * world_size - p.ds_numel for p in params.values()),
        "padded with": {
            float(value)
            for p in params.values()
            for value in p.ds_tensor[max(0, p.ds_numel - rank * p.ds_tensor.numel()) :].unique()
        },
        "masters": masters,
        "context ended": deepspeed.runtime.zero.partition_parameters.zero_init_context == 0,
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_rank_ever_holds_the_whole_model(precision: str, line):
    dp_size = 4
    case = Case(Cell(dp=dp_size, zero=3))
    flags = {} if precision == "fp32" else {"bf16": True}
    for rank, found in enumerate(run_ranks(dp_size, _built, line(case, **flags))):
        assert found["whole"] == []
        assert found["pieces"] * dp_size == found["shard"] + found["padding"]
        assert found["padding"] < 0.01 * found["shard"]
        assert found["most whole"] == found["largest layer"] < found["shard"] / 4
        assert found["padded with"] <= {0.0}, rank
        assert found["context ended"]


def _masters(rank: int, world_size: int, argv: list[str]) -> dict[str, str]:
    from megatron.checkpoint.state_digest import state_digests

    state = build(argv, rank, world_size).live.state
    return {name: digests["fp32"] for name, digests in state_digests(state).items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_first_values_are_those_of_every_topology(precision: str, line):
    flags = {} if precision == "fp32" else {"bf16": True}
    expected = run_ranks(1, _masters, line(Case(Cell()), **flags))[0]
    for name in ("nothing-persists", "padded-vocabulary-on-tp2", "padded-vocabulary-on-tp3"):
        case = CASES[name]
        for found in run_ranks(case.cell.world_size, _masters, line(case, **flags)):
            assert found == expected, name
    assert run_ranks(1, _masters, line(Case(Cell()), **flags, seed=7))[0] != expected


# -- as Source and as Target ----------------------------------------------------------------------------------------


def test_one_trajectory(sources, references):
    """fp32: losses and gradient norms are those of one process, to rounding."""
    for name, made in sources.items():
        curves, whole = made["curves"], references[CASES[name].model["hidden_size"]]["whole"]
        assert sorted(curves.losses) == [1, 2, 3]
        for step, loss in curves.losses.items():
            assert loss == pytest.approx(whole.losses[step], abs=2e-6), name
            assert curves.grad_norms[step] == pytest.approx(whole.grad_norms[step], rel=2e-5), name


def _check(taken: list[Taken], makers: list[dict]) -> None:
    for found, made in zip(taken, makers, strict=True):
        assert found.digests == made["curves"].digests
        assert found.steps <= {float(NUM_STEPS)}
        assert (found.iteration, found.samples) == (NUM_STEPS, NUM_STEPS * BATCH)


@pytest.mark.parametrize("target", [Cell(), Cell(dp=2, zero=1)], ids=lambda cell: cell.name)
@pytest.mark.parametrize("model", REFERENCES)
def test_as_source(model: str, target: Cell, sources, line):
    makers = [made for name, made in sources.items() if CASES[name].model == REFERENCES[model]]
    plans = [(kind, made[kind]) for made in makers for kind in ("direct", "universal")]
    argv = line(Case(target, model=REFERENCES[model]), seed=99)
    for taken in run_ranks(target.world_size, take_all, argv, plans):
        _check(taken, [made for made in makers for _ in range(2)])


@pytest.mark.parametrize("name", CASES)
def test_as_target(name: str, sources, references, line):
    """Of every ZeRO-3 run of the same model, and of a run without ZeRO, which then goes on as if it had not stopped."""
    case = CASES[name]
    reference = references[case.model["hidden_size"]]
    makers = [*(made for other, made in sources.items() if CASES[other].model == case.model), reference]
    plans = [(kind, made[kind]) for made in makers for kind in ("direct", "universal")]
    for taken in run_ranks(case.cell.world_size, take_all, line(case), plans, None, True):
        _check(taken, [made for made in makers for _ in range(2)])
        assert sorted(taken[-1].losses) == [NUM_STEPS + 1, NUM_STEPS + 2]
        for step, loss in taken[-1].losses.items():
            assert loss == pytest.approx(reference["whole"].losses[step], abs=2e-6)
