"""A resumed run with experts goes on as the run that never stopped; so do figure 9's pairs of other architectures.

Same topology: bitwise, with dropout and noise in the router. Another topology: as test_continuity.py, within twice what
another order of sums does to the Source itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from harness.ranks import run_ranks
from matrix.cells import Cell, cell
from matrix.families import FIG_9, MODELS
from matrix.recording import Curves, command_line, train

HALF = 12
SAME_HALF = 4
TAG = f"global_step{HALF}"
FP32, BF16 = {}, {"bf16": True}
SUMMED_IN_FP32 = {"bf16": True, "accumulate_allreduce_grads_in_fp32": True}
SAME = {
    "moe-tp1pp1dp2ep2-z2": (FP32, BF16),
    "moe-tp1pp1dp2ep2-z3": (FP32, BF16),
    "moe-tp2pp1dp2ep2-z1": (FP32, SUMMED_IN_FP32),
    "gptmoe-tp1pp2dp2ep2-z1": (FP32, BF16),
    "moe-tp1pp1dp2ep2-z0": (FP32,),
}


def _train(cell: Cell, data: Path, **flags) -> Curves:
    argv = command_line(data, **{**MODELS[cell.model], **cell.flags, **flags})
    return run_ranks(cell.world_size, train, argv)[0]


@pytest.mark.parametrize(
    "target, precision",
    [(cell(name), precision) for name, ways in SAME.items() for precision in ways],
    ids=lambda it: it.name if isinstance(it, Cell) else "-".join(it) or "fp32",
)
def test_same_topology_is_bitwise_with_dropout(target: Cell, precision: dict, data, tmp_path):
    flags = {
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "moe_router_jitter": 0.05,
        "iters": 2 * SAME_HALF,
        "eval_iters": 1,
        "eval_interval": 2,
        **precision,
    }
    first = _train(target, data, exit_interval=SAME_HALF, save=tmp_path, **flags)
    second = _train(target, data, load=tmp_path, **flags)
    whole = _train(target, data, **flags)
    assert sorted(second.losses) == list(range(SAME_HALF + 1, 2 * SAME_HALF + 1))
    for curve in ("losses", "grad_norms", "learning_rates"):
        assert {**getattr(first, curve), **getattr(second, curve)} == getattr(whole, curve)
    assert first.validations + second.validations == whole.validations
    assert second.digests == whole.digests
    assert first.digests != whole.digests


class HalfWay(NamedTuple):
    folder: Path
    whole: Curves
    control: Curves
    """The same topology, resumed with another micro batch: sums in another order and nothing else."""


@pytest.fixture(scope="module")
def half_way(data, tmp_path_factory):
    made: dict[Cell, HalfWay] = {}

    def get(source: Cell) -> HalfWay:
        if source not in made:
            folder = tmp_path_factory.mktemp(source.name)
            whole = _train(source, data, iters=2 * HALF, save=folder, save_interval=HALF)
            control = _train(source, data, iters=2 * HALF, micro_batch=2, load=folder, load_tag=TAG)
            made[source] = HalfWay(folder, whole, control)
        return made[source]

    return get


def _max_delta(curves: Curves, reference: Curves) -> float:
    return max(abs(loss - reference.losses[step]) for step, loss in curves.losses.items())


@pytest.mark.parametrize("source, target", FIG_9, ids=lambda cell: cell.name)
def test_another_topology_within_twice_the_control(source: Cell, target: Cell, data, half_way):
    folder, whole, control = half_way(source)
    resumed = _train(target, data, iters=2 * HALF, load=folder, load_tag=TAG)
    assert sorted(resumed.losses) == list(range(HALF + 1, 2 * HALF + 1))
    # The floor is one unit in the last place of these losses: a control may by luck not differ at all.
    assert _max_delta(resumed, whole) <= 2 * max(_max_delta(control, whole), 4.8e-7)
    assert resumed.learning_rates == {step: whole.learning_rates[step] for step in resumed.learning_rates}
    for step, norm in resumed.grad_norms.items():
        assert norm == pytest.approx(whole.grad_norms[step], rel=1e-4)
