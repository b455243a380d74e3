"""bf16 and fp16: masters carried bit for bit between precisions and stages; the loss scale goes on as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.ranks import run_ranks
from matrix.cells import Cell
from matrix.recording import build, command_line, curves, train, write_dataset

NUM_STEPS = 4
PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": True},
    "bf16-fp32-grads": {"bf16": True, "accumulate_allreduce_grads_in_fp32": True},
}
SOURCES = {
    "fp32": Cell(dp=2, zero=1),
    "bf16": Cell(tp=2, zero=2),
    "bf16-fp32-grads": Cell(dp=2, zero=1),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "matrix_text_document")


@pytest.fixture(scope="module")
def sources(tmp_path_factory, data) -> dict[str, tuple[Path, dict]]:
    made = {}
    for name, cell in SOURCES.items():
        folder = tmp_path_factory.mktemp(name)
        argv = command_line(data, **cell.flags, **PRECISIONS[name], iters=NUM_STEPS, save=folder)
        made[name] = folder, run_ranks(cell.world_size, train, argv)[0].digests
    return made


def _load(rank: int, world_size: int, argv: list[str]):
    """The state after the load, the optimizer's wrapper, and whether the live weights are the masters, rounded."""
    from megatron.training.state_digest import state_digests

    run = build(argv, rank, world_size)
    state = run.live.state
    are_weights_masters = all(
        bool((i.param.detach().flatten()[i.start : i.start + i.numel] == i.master.to(i.param.dtype)).all())
        for i in state.intervals
    )
    return state_digests(state), state.wrapper, are_weights_masters, {i.master.dtype for i in state.intervals}


@pytest.mark.parametrize("target", PRECISIONS)
@pytest.mark.parametrize("source", SOURCES)
def test_masters_are_bit_equal_across_precisions(source: str, target: str, sources, data):
    folder, saved = sources[source]
    wrappers = set()
    for cell in (Cell(dp=2, zero=1), Cell(pp=2, zero=0), Cell(zero=2)):
        argv = command_line(data, **cell.flags, **PRECISIONS[target], iters=NUM_STEPS + 1, load=folder)
        for digests, wrapper, are_weights_masters, _ in run_ranks(cell.world_size, _load, argv):
            assert digests == saved
            assert are_weights_masters
            wrappers.add(wrapper)
    # The table is of different optimizers only if DeepSpeed really chose them.
    assert ("BF16_Optimizer" in wrappers) == (target == "bf16-fp32-grads")


def _train_fp16(rank: int, world_size: int, argv: list[str]):
    """fp16 on a CPU without native fp16: DeepSpeed's own check is told otherwise; it then computes slowly but right."""
    from deepspeed.accelerator import get_accelerator

    from megatron.training.loop import fit
    from megatron.training.state_digest import state_digests

    type(get_accelerator()).is_fp16_supported = lambda self: True
    run = build(argv, rank, world_size)
    fit(run)
    scaler = run.live.state.loss_scaler
    steps = [(s.iteration, s.loss_scale, s.is_skipped) for s in run.run_log.steps]
    kept = {key: getattr(scaler, key) for key in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")}
    return curves(run, state_digests(run.live.state)), steps, kept, run.progress.skipped_iterations


@pytest.mark.parametrize("cell", [Cell(dp=2, zero=1), Cell(tp=2, zero=2)], ids=lambda cell: cell.name)
def test_fp16_loss_scale_goes_on(cell: Cell, data, tmp_path):
    """The scale starts far too high, so the first steps are skipped; the run is cut in the middle of its growth."""
    flags = {"fp16": True, "initial_loss_scale": 2.0**26, "hysteresis": 1, "loss_scale_window": 3}
    flags |= {"hidden_dropout": 0.1, "iters": 24}
    whole, steps, kept, skipped = run_ranks(cell.world_size, _train_fp16, command_line(data, **cell.flags, **flags))[0]
    scales = [scale for _, scale, _ in steps]
    assert skipped > 0, "no overflow: the test would show nothing"
    assert min(scales) < scales[-1], "the scale never grew: the test would show nothing"

    cut = command_line(data, **cell.flags, **flags, exit_interval=12, save=tmp_path)
    first, first_steps, _, _ = run_ranks(cell.world_size, _train_fp16, cut)[0]
    # The resumed engine is built with another initial scale: what counts is the saved one.
    flags["initial_loss_scale"] = 2.0**4
    again = command_line(data, **cell.flags, **flags, load=tmp_path)
    second, second_steps, second_kept, second_skipped = run_ranks(cell.world_size, _train_fp16, again)[0]
    assert first_steps + second_steps == steps
    assert (second_kept, second_skipped) == (kept, skipped)
    assert {**first.losses, **second.losses} == whole.losses
    assert second.digests == whole.digests
