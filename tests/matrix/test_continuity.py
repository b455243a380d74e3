"""A resumed run goes on as the run that never stopped.

Same topology: bitwise, dropout on (losses, grad norms, learning rates, and the state at the end).
Another topology: fp32 losses within twice what reordering float sums does to the Source itself (the control arm).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from harness.ranks import run_ranks
from matrix.cells import MODEL, PAPER, Cell, cell
from matrix.recording import NUM_DOCUMENTS, Curves, command_line, train, write_dataset
from megatron.ucp.convert import convert

HALF = 14
TAG = f"global_step{HALF}"
SAME_HALF = 4
"""Bitwise, a few steps tell as much as many."""

SAME = (
    Cell(),
    Cell(dp=2, zero=1),
    Cell(dp=2, zero=2),
    Cell(dp=2, zero=3),
    Cell(tp=2, zero=1),
    Cell(pp=2, zero=1),
    Cell(tp=2, pp=2),
    Cell(tp=2, sp=2, cut=True, zero=1),
)


def _train(cell: Cell, data: Path, **flags) -> Curves:
    return run_ranks(cell.world_size, train, command_line(data, **cell.flags, **flags))[0]


@pytest.mark.parametrize("cell", SAME, ids=lambda cell: cell.name)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_topology_is_bitwise_with_dropout(cell: Cell, precision: str, data, tmp_path):
    flags = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "micro_batch": 4, "eval_iters": 1, "eval_interval": 2}
    if precision == "bf16":
        flags["bf16"] = True
    # The run that never stopped saves on its way; the resumed one forgets what it had come to after that.
    whole = _train(cell, data, iters=2 * SAME_HALF, save=tmp_path, save_interval=SAME_HALF, **flags)
    resumed = _train(cell, data, iters=2 * SAME_HALF, load=tmp_path, load_tag=f"global_step{SAME_HALF}", **flags)
    second_half = range(SAME_HALF + 1, 2 * SAME_HALF + 1)
    for curve in ("losses", "grad_norms", "learning_rates"):
        assert getattr(resumed, curve) == {step: getattr(whole, curve)[step] for step in second_half}
    assert resumed.validations and resumed.validations == whole.validations[-len(resumed.validations) :]
    assert resumed.digests == whole.digests
    saved = json.loads((tmp_path / f"global_step{SAME_HALF}" / "ucp.json").read_text())["digests"]
    assert saved != whole.digests


def test_a_save_does_not_change_the_run(data, tmp_path):
    """And a run that is stopped where it saves goes on in another as if it had not been: the test above saves only."""
    flags = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "eval_iters": 1, "eval_interval": 2}
    cell = Cell(dp=2, zero=1)
    whole = _train(cell, data, iters=2 * SAME_HALF, **flags)
    first = _train(cell, data, iters=2 * SAME_HALF, exit_interval=SAME_HALF, save=tmp_path, **flags)
    second = _train(cell, data, iters=2 * SAME_HALF, load=tmp_path, **flags)
    saving = _train(cell, data, iters=2 * SAME_HALF, save=tmp_path / "b", save_interval=2, **flags)
    for curve in ("losses", "grad_norms", "learning_rates"):
        assert {**getattr(first, curve), **getattr(second, curve)} == getattr(whole, curve) == getattr(saving, curve)
    assert first.validations + second.validations == whole.validations == saving.validations
    assert second.digests == whole.digests == saving.digests


def test_dropout_is_really_on(data):
    """The test above would pass without randomness; and evaluation must not use dropout."""
    cell = Cell()
    off = _train(cell, data, iters=2, eval_iters=1, eval_interval=1)
    on = _train(cell, data, iters=2, eval_iters=1, eval_interval=1, hidden_dropout=0.1)
    attention = _train(cell, data, iters=2, attention_dropout=0.1)
    assert off.losses[1] != on.losses[1] != attention.losses[1] != off.losses[1]


SOURCES = {
    "tp2pp2dp2-z1": ("tp1pp1dp1-z1", "tp1pp1dp2sp2-z1", "tp1pp1dp4-z3", "tp2pp1dp2-z2"),
    "tp1pp1dp2-z3": ("tp2pp1dp1-plain-z0", "tp1pp4dp1-z1", "tp1pp1dp1sp2-z2", "tp2pp1dp1-cut-z1"),
    "tp2pp1dp1-cut-z2": ("tp1pp1dp4-z2", "tp1pp2dp1-z0"),
    "tp1pp2dp1sp2-z1": ("tp3pp1dp1-z3", "tp1pp1dp4-z1"),
}
"""A dozen journeys, each from a half-way save: Source -> Targets; those of four ranks by way of a universal folder."""
JOURNEYS = [(cell(source), cell(target)) for source, targets in SOURCES.items() for target in targets]


class HalfWay(NamedTuple):
    folder: Path
    whole: Curves
    control: Curves
    """The same topology, resumed with another micro batch: sums in another order and nothing else."""


@pytest.fixture(scope="module")
def short_data(tmp_path_factory) -> Path:
    """Of which a run sees three epochs."""
    prefix = tmp_path_factory.mktemp("data") / "short_text_document"
    return write_dataset(prefix, num_documents=NUM_DOCUMENTS // 3)


@pytest.fixture(scope="module")
def half_way(short_data, tmp_path_factory) -> dict[Cell, HalfWay]:
    made = {}
    for name in SOURCES:
        source, folder = cell(name), tmp_path_factory.mktemp(name)
        whole = _train(source, short_data, iters=2 * HALF, micro_batch=3, save=folder, save_interval=HALF, **MODEL)
        convert(folder / TAG, folder / f"{TAG}_universal", num_workers=1)
        control = _train(source, short_data, iters=2 * HALF, micro_batch=6, load=folder, load_tag=TAG, **MODEL)
        made[source] = HalfWay(folder, whole, control)
    return made


def _max_delta(curves: Curves, reference: Curves) -> float:
    return max(abs(loss - reference.losses[step]) for step, loss in curves.losses.items())


@pytest.mark.parametrize("source, target", JOURNEYS, ids=lambda cell: cell.name)
def test_another_topology_within_twice_the_control(source: Cell, target: Cell, short_data, half_way):
    folder, whole, control = half_way[source]
    is_universal = target.world_size % 4 == 0
    where = {"load_tag": f"{TAG}_universal", "universal_checkpoint": True} if is_universal else {"load_tag": TAG}
    resumed = _train(target, short_data, iters=2 * HALF, micro_batch=3, load=folder, **where, **MODEL)
    assert sorted(resumed.losses) == list(range(HALF + 1, 2 * HALF + 1))
    first = HALF + 1
    assert abs(resumed.losses[first] - whole.losses[first]) < 1e-5
    # The floor is one unit in the last place of these losses: a control may by luck not differ at all.
    assert _max_delta(resumed, whole) <= 2 * max(_max_delta(control, whole), 4.8e-7)
    assert resumed.learning_rates == {step: whole.learning_rates[step] for step in resumed.learning_rates}
    for step, norm in resumed.grad_norms.items():
        assert norm == pytest.approx(whole.grad_norms[step], rel=1e-4)


def test_planted_fault_another_run_does_not_pass(short_data, half_way):
    """Another seed's first loss, and the right run's one step late."""
    whole = half_way[PAPER].whole
    stranger = _train(Cell(), short_data, iters=1, seed=7, **MODEL)
    assert abs(stranger.losses[1] - whole.losses[1]) > 1e-3
    late = Curves({step + 1: loss for step, loss in whole.losses.items() if step < 2 * HALF}, {}, {}, [], {})
    assert _max_delta(late, whole) > 100 * _max_delta(half_way[PAPER].control, whole)


def test_changed_batching_reads_every_sample_once(data, tmp_path):
    """dp1 with micro batch 4, then dp2 with micro batch 1: the same 8 samples per step, in the same order."""
    whole = _train(Cell(), data, iters=12, micro_batch=8)
    _train(Cell(), data, iters=12, micro_batch=4, exit_interval=6, save=tmp_path)
    resumed = _train(Cell(dp=2, zero=1), data, iters=12, micro_batch=1, load=tmp_path)
    assert max(abs(resumed.losses[i] - whole.losses[i]) for i in range(7, 13)) < 2e-6
