"""The training state inside a live engine: found whole, made without a trace, equal in every precision, copies checked.

Each test of a checker comes with the fault that it must catch.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.ranks import RankFailure, run_ranks
from matrix.cells import Cell
from matrix.recording import VOCAB_SIZE, build, command_line, train
from megatron.ucp.sources import DeepSpeedSource, open_source

HIDDEN, LAYERS, SEQUENCE = 32, 4, 16
NUM_PARAMETERS = (
    (VOCAB_SIZE + SEQUENCE) * HIDDEN
    + LAYERS * (2 * 2 * HIDDEN + 3 * HIDDEN * (HIDDEN + 1) + HIDDEN * (HIDDEN + 1) + HIDDEN * (8 * HIDDEN + 5))
    + 2 * HIDDEN
)
"""Of the model in matrix/recording.py, by hand: embeddings; per layer two norms, q k v, dense, h to 4h to h; norm."""


# -- intervals ------------------------------------------------------------------------------------------------------


def _counted(rank: int, world_size: int, argv: list[str], is_broken: bool = False):
    """{name: flat indices that this rank counts}, by plain expansion of the runs."""
    state = build(argv, rank, world_size).live.state
    intervals = list(state.intervals)
    if is_broken and rank == 1:
        intervals[0] = replace(intervals[0], counted_runs=intervals[0].counted_runs[:0])
    found: dict[str, list] = {}
    for interval in intervals:
        for start, _, length in interval.counted_runs.tolist():
            found.setdefault(interval.name, []).append(torch.arange(start, start + length))
        assert int(interval.runs[:, 2].sum()) <= interval.numel
    shapes = {name: layout.shape for name, layout in state.layouts.items()}
    return {name: torch.cat(parts) for name, parts in found.items()}, shapes


def _tiling_faults(results) -> list[str]:
    faults = []
    shapes = results[0][1]
    for name, shape in shapes.items():
        parts = [found[name] for found, _ in results if name in found]
        indices = torch.cat(parts).sort().values if parts else torch.empty(0, dtype=torch.int64)
        if not torch.equal(indices, torch.arange(math.prod(shape))):
            faults.append(name)
    return faults


TILED = (Cell(), Cell(dp=2), Cell(dp=2, zero=1), Cell(dp=3, zero=2), Cell(tp=2, zero=1), Cell(tp=2, pp=2))
TILED += (Cell(tp=2, pp=2, dp=2, zero=1),)


@pytest.mark.parametrize("cell", TILED, ids=lambda cell: cell.name)
def test_intervals_tile_every_parameter_once(cell: Cell, data):
    batch = {"global_batch_size": 6} if cell.dp == 3 else {}
    results = run_ranks(cell.world_size, _counted, command_line(data, **cell.flags, **batch))
    assert _tiling_faults(results) == []
    assert sum(math.prod(shape) for shape in results[0][1].values()) == NUM_PARAMETERS


def test_planted_fault_an_interval_nobody_counts(data):
    results = run_ranks(2, _counted, command_line(data, zero=1), True)
    assert len(_tiling_faults(results)) == 1


# -- make_states ----------------------------------------------------------------------------------------------------


def _train_with_states_made(rank: int, world_size: int, argv: list[str], is_broken: bool = False):
    from megatron.checkpoint.state_digest import state_digests
    from megatron.training.loop import fit

    run = build(argv, rank, world_size)
    state = run.live.state
    state.make_states()
    state.make_states()  # a second call finds nothing to do
    for interval in state.intervals:
        assert state.step_of(interval.flat) in (0.0, None)
        for name in state.state_names:
            assert not interval.state(state.base, name).any()
            if is_broken:
                interval.state(state.base, name).fill_(1e-3)
    fit(run)
    losses = {step.iteration: step.loss for step in run.run_log.steps}
    return losses, state_digests(state)


FRESH = (
    (Cell(), {}),
    (Cell(dp=2, zero=2), {}),
    (Cell(tp=2, zero=1), {"bf16": True}),
    (Cell(pp=2), {"optimizer": "sgd"}),
    (Cell(dp=2, zero=1), {"optimizer": "sgd"}),
)


@pytest.mark.parametrize("cell, flags", FRESH, ids=lambda x: x.name if isinstance(x, Cell) else "-".join(x))
def test_made_states_change_nothing(cell: Cell, flags: dict, data):
    argv = command_line(data, **cell.flags, **flags)
    without = run_ranks(cell.world_size, train, argv)[0]
    assert run_ranks(cell.world_size, _train_with_states_made, argv)[0] == (without.losses, without.digests)


def test_planted_fault_states_that_are_not_zero(data):
    argv = command_line(data)
    losses, _ = run_ranks(1, _train_with_states_made, argv, True)[0]
    assert losses != run_ranks(1, train, argv)[0].losses


# -- copies ---------------------------------------------------------------------------------------------------------


def _save_after_a_fault(rank: int, world_size: int, argv: list[str], save: str, name: str, victim: int, kind: str):
    from megatron.checkpoint import saving
    from megatron.training.loop import fit

    run = build(argv, rank, world_size)
    fit(run)
    state = run.live.state
    if rank == victim:
        interval = next(i for i in state.intervals if i.name == name)
        values = interval.master if kind == "fp32" else interval.state(state.base, kind)
        # The last bit: not to be seen in any loss.
        values[3] = torch.nextafter(values[3], torch.tensor(math.inf))
    saving.save(run.live, Path(save), run.progress)


EMBEDDING = "embedding.word_embeddings.weight"
FAULTS = {
    "norm-on-tp1": (Cell(tp=2), "layers.2.input_norm.weight", 1, "fp32", "pp rank 0, tp rank 1"),
    "moment-on-tp1-zero1": (Cell(tp=2, zero=1), "final_norm.bias", 1, "exp_avg_sq", "pp rank 0, tp rank 1"),
    "tied-embedding-on-the-last-stage": (Cell(pp=2, zero=1), EMBEDDING, 1, "fp32", "pp rank 1, tp rank 0"),
    "replica-on-dp1": (Cell(dp=2), "layers.0.mlp.dense_h_to_4h.weight", 1, "exp_avg", "pp rank 0, tp rank 0"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_copies_that_drifted_apart_are_not_saved(case: str, data, tmp_path):
    cell, name, victim, kind, where = FAULTS[case]
    argv = command_line(data, **cell.flags, iters=2)
    told = rf"(?s)rank 0 raised: DivergedCopiesError.*{name} \({kind}\) on {where}.*rank 1 raised: DivergedCopiesError"
    with pytest.raises(RankFailure, match=told):
        run_ranks(cell.world_size, _save_after_a_fault, argv, str(tmp_path / "save"), name, victim, kind)
    assert not (tmp_path / "save").exists()


# -- precisions and wrappers ----------------------------------------------------------------------------------------


def _held(rank: int, world_size: int, argv: list[str]):
    """What stands in the engine after the load: digests, wrapper, and the masters' difference from the weights."""
    from megatron.checkpoint.state_digest import state_digests

    state = build(argv, rank, world_size).live.state
    is_refreshed = all(
        torch.equal(i.param.detach().view(-1)[i.start : i.start + i.numel], i.master.to(i.param.dtype))
        for i in state.intervals
    )
    return state_digests(state), state.wrapper, is_refreshed


BF16 = {"bf16": True}
WRAPPED = {"bf16": True, "accumulate_allreduce_grads_in_fp32": True}
PRECISIONS = {
    "bf16-optimizer": (Cell(dp=2, zero=1), WRAPPED, "BF16_Optimizer"),
    "bf16-zero1": (Cell(dp=2, zero=1), BF16, "DeepSpeedZeroOptimizer"),
    "bf16-zero2": (Cell(tp=2, zero=2), BF16, "DeepSpeedZeroOptimizer"),
    "fp32-zero0": (Cell(), {}, "AdamW"),
    "fp32-zero1": (Cell(pp=2, zero=1), {}, "DeepSpeedZeroOptimizer"),
}


@pytest.fixture(scope="module")
def precisions(tmp_path_factory, data) -> dict[str, tuple[Path, dict]]:
    made = {}
    for name in ("bf16-optimizer", "bf16-zero1", "fp32-zero1"):
        cell, flags, _ = PRECISIONS[name]
        folder = tmp_path_factory.mktemp(name)
        argv = command_line(data, **cell.flags, **flags, iters=3, save=folder)
        made[name] = folder, run_ranks(cell.world_size, train, argv)[0].digests
    return made


@pytest.mark.parametrize("target", PRECISIONS)
def test_masters_and_moments_are_the_same_in_every_precision(target: str, precisions, data):
    cell, flags, wrapper = PRECISIONS[target]
    for source, (folder, digests) in precisions.items():
        argv = command_line(data, **cell.flags, **flags, iters=4, load=folder)
        for found in run_ranks(cell.world_size, _held, argv):
            assert found == (digests, wrapper, True), f"{source} to {target}"


# -- another optimizer ----------------------------------------------------------------------------------------------


def test_sgd_goes_on_under_another_topology(data, tmp_path):
    flags = {"optimizer": "sgd", "iters": 8, "lr": 0.1, "min_lr": 0.01}
    whole = run_ranks(1, train, command_line(data, **flags))[0]
    run_ranks(1, train, command_line(data, **flags, exit_interval=4, save=tmp_path))
    for cell in (Cell(), Cell(dp=2), Cell(dp=2, zero=2), Cell(tp=2, zero=1)):
        resumed = run_ranks(cell.world_size, train, command_line(data, **cell.flags, **flags, load=tmp_path))[0]
        assert sorted(resumed.losses) == [5, 6, 7, 8]
        assert set(resumed.digests["final_norm.weight"]) == {"fp32", "momentum_buffer"}
        for step, loss in resumed.losses.items():
            assert loss == pytest.approx(whole.losses[step], abs=2e-6), cell.name
        if cell == Cell():
            assert resumed.digests == whole.digests
    # The momentum matters: without it the same resume goes elsewhere.
    fresh = run_ranks(1, train, [*command_line(data, **flags, load=tmp_path), "--no-load-optim"])[0]
    assert abs(fresh.losses[8] - whole.losses[8]) > 1e-4


# -- the table of fragments -----------------------------------------------------------------------------------------


TABLED = [Cell(tp=2, dp=2, zero=1), Cell(pp=2, zero=1), Cell(dp=2, sp=2, zero=2)]


@pytest.mark.parametrize("cell", TABLED, ids=lambda cell: cell.name)
def test_the_saved_table_of_fragments_is_the_one_in_deepspeeds_files(cell: Cell, data, tmp_path):
    run_ranks(cell.world_size, train, command_line(data, **cell.flags, iters=1, save=tmp_path, save_interval=1))
    source = open_source(tmp_path)
    assert source.manifest.fragments
    from_files = DeepSpeedSource(source.folder, replace(source.manifest, fragments={})).fragments()
    assert source.fragments() == from_files
