"""Four ranks that take themselves for two nodes of two: what a rank reads and writes follows its place in the run,
never its number on its node. (DeepSpeed's own loading has mistaken one for the other: its issues 6691 and 7601.)"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.ranks import RankFailure, run_ranks
from matrix.cells import Cell
from matrix.recording import RecordingLog, command_line, curves, train, write_dataset
from megatron.ucp.verify import verify

RANKS_PER_NODE = 2
CELLS = (Cell(dp=4, zero=3), Cell(tp=2, dp=2, zero=1))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "nodes_text_document")


def _build_on_two_nodes(rank: int, world_size: int, argv: list[str]):
    from megatron.config.arguments import parse
    from megatron.training.build import build_run
    from megatron.training.launch import LaunchInfo

    os.environ.update(LOCAL_RANK=str(rank % RANKS_PER_NODE), LOCAL_SIZE=str(RANKS_PER_NODE))
    launch = LaunchInfo(rank, rank % RANKS_PER_NODE, world_size, RANKS_PER_NODE, is_plain=False)
    run = build_run(parse(argv).config.validate(world_size), launch)
    run.run_log = RecordingLog()
    assert run.live.engine.local_rank == rank % RANKS_PER_NODE
    return run


def _train_on_two_nodes(rank: int, world_size: int, argv: list[str]):
    from megatron.checkpoint.state_digest import state_digests
    from megatron.training.loop import fit

    run = _build_on_two_nodes(rank, world_size, argv)
    loaded = state_digests(run.live.state)
    fit(run)
    return loaded, curves(run, state_digests(run.live.state))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_two_nodes_save_and_resume(cell: Cell, data, tmp_path):
    flags = {**cell.flags, "num_layers": 2, "iters": 4}
    whole = run_ranks(4, train, command_line(data, **flags))[0]
    _, first = run_ranks(4, _train_on_two_nodes, command_line(data, **flags, exit_interval=2, save=tmp_path))[0]
    report = verify(tmp_path / "global_step2")
    assert report.is_sound, report
    optimizer_files = list((tmp_path / "global_step2").glob("*zero_pp_rank_*_optim_states.pt"))
    assert len(optimizer_files) == 4 and min(path.stat().st_size for path in optimizer_files) > 1000
    # On two nodes, and on one that has all four ranks: both go on to the bit as the run that never stopped.
    resumed = run_ranks(4, _train_on_two_nodes, command_line(data, **flags, load=tmp_path))
    assert all(loaded == first.digests for loaded, _ in resumed)
    for second in (resumed[0][1], run_ranks(4, train, command_line(data, **flags, load=tmp_path))[0]):
        assert {**first.losses, **second.losses} == whole.losses
        assert second.digests == whole.digests


def _build_by_local_rank(rank: int, world_size: int, argv: list[str]) -> None:
    from megatron.engine import engine_state

    own = engine_state._stage3_interval

    def mistaken(param):
        start, numel = own(param)
        length = param.partition_numel()
        return min(int(os.environ["LOCAL_RANK"]) * length, param.ds_numel - numel), numel

    engine_state._stage3_interval = mistaken
    _build_on_two_nodes(rank, world_size, argv)


def test_planted_fault_a_piece_by_the_local_rank(data, tmp_path):
    flags = {**Cell(zero=3).flags, "num_layers": 2, "iters": 4}
    run_ranks(4, train, command_line(data, **flags, exit_interval=2, save=tmp_path))
    with pytest.raises(RankFailure, match="what was placed in the engine is not what was saved|have drifted apart"):
        run_ranks(4, _build_by_local_rank, command_line(data, **flags, load=tmp_path))
