"""A resumed run with other flags than its Source: what goes on, what changes, and that the two agree with the log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.ranks import RankFailure, run_ranks
from matrix.cells import Cell
from matrix.recording import build, command_line, train
from megatron.ucp.manifest import manifest_bytes


@pytest.fixture(scope="module")
def saved(tmp_path_factory, data) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    argv = command_line(data, zero=1, iters=8, exit_interval=4, save=folder)
    run_ranks(2, train, argv)
    return folder


def _used(rank: int, world_size: int, argv: list[str]):
    """(logged learning rate of the next step, those of the groups, weight decays, consumed samples)."""
    run = build(argv, rank, world_size)
    groups = run.live.state.base.param_groups
    decays = {group["name"]: group["weight_decay"] for group in groups}
    logged = run.live.schedule.get_last_lr()[0]
    return logged, {group["lr"] for group in groups}, decays, run.progress.consumed_train_samples


def test_a_smaller_global_batch_reaches_the_end(data, saved):
    """32 samples were taken in batches of 8; 40 steps of 4 follow, past what 44 x 4 samples would plan for."""
    argv = command_line(data, zero=1, iters=44, load=saved, global_batch_size=4, override_opt_param_scheduler=True)
    curves = run_ranks(2, train, argv)[0]
    assert sorted(curves.losses) == list(range(5, 45))


def test_the_schedule_has_the_last_word(data, saved):
    same = command_line(data, iters=8, load=saved)
    logged, used, decays, consumed = run_ranks(1, _used, same)[0]
    assert used == {logged} and decays == {"decay": 0.1, "no_decay": 0.0} and consumed == 32
    anew, used, _, _ = run_ranks(1, _used, [*same, "--no-load-lr-state"])[0]
    assert used == {anew} and anew != logged


def test_override_takes_weight_decay_from_the_flags(data, saved):
    changed = command_line(data, iters=8, load=saved, weight_decay=0.3)
    with pytest.raises(RankFailure, match="end_weight_decay: saved 0.1, now 0.3"):
        run_ranks(1, train, changed)
    _, _, decays, _ = run_ranks(1, _used, [*changed, "--override-opt_param-scheduler"])[0]
    assert decays == {"decay": 0.3, "no_decay": 0.0}


def test_a_source_without_counters_goes_on_where_its_iterations_say(data, saved, tmp_path):
    """As DeepSpeed's own universal folders: no samples, no schedule."""
    import shutil

    folder = Path(shutil.copytree(saved, tmp_path / "copy")) / "global_step4"
    manifest = json.loads((folder / "ucp.json").read_text())
    for key in ("consumed_train_samples", "consumed_train_tokens", "schedule"):
        del manifest["common"][key]
    (folder / "ucp.json").write_bytes(manifest_bytes(manifest))
    flags = {"iters": 8}
    told = run_ranks(1, _used, command_line(data, load=folder, **flags))[0]
    assert told == run_ranks(1, _used, command_line(data, load=saved, **flags))[0]


def test_round_robin_gradients_are_refused(data, tmp_path):
    """DeepSpeed's table of fragments is wrong under it: such a save could never be loaded."""
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 1, "round_robin_gradients": True}}))
    with pytest.raises(RankFailure, match="round_robin_gradients in the DeepSpeed JSON is refused"):
        run_ranks(1, train, command_line(data, zero=1, deepspeed_config=config))


def _load_stale(rank: int, world_size: int, argv: list[str]) -> str:
    from megatron.engine.engine_state import EngineState

    EngineState.refresh_weights = lambda self: None
    try:
        build(argv, rank, world_size)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


@pytest.mark.parametrize(
    "cell", [Cell(dp=2, zero=1), Cell(dp=2, zero=2), Cell(dp=2, zero=3)], ids=lambda cell: cell.name
)
def test_planted_fault_weights_that_are_not_refreshed(cell: Cell, data, saved):
    """The digest is of the masters; the weights that compute are held against them."""
    flags = {"iters": 8, "load": saved}
    for told in run_ranks(cell.world_size, _load_stale, command_line(data, **cell.flags, **flags)):
        assert "live weights are not the masters that were placed" in told


def test_a_dangling_native_pointer_does_not_block_the_universal_folder(data, saved, tmp_path):
    import shutil

    from megatron.ucp.convert import convert

    run = tmp_path / "run"
    run.mkdir()
    convert(saved / "global_step4", run / "global_step4_universal", num_workers=1)
    (run / "latest").write_text("global_step4")
    flags = {"iters": 8, "load": run}
    assert run_ranks(1, _used, command_line(data, **flags, universal_checkpoint=True))[0][3] == 32
    assert run_ranks(1, _used, command_line(data, **flags))[0][3] == 32
    with pytest.raises(RankFailure, match="latest names global_step4, which is not there"):
        run_ranks(1, _used, command_line(data, **flags, load_strict=True))
    shutil.rmtree(run)
