"""Any Source to any Target: the digest after the load equals the digest at the save, for every pair of the matrix.

Every Source cell trains three steps, saves, and is converted (U). Each Target, as another run with other weights,
takes all its Sources one after the other, directly and from U. Its own state is overwritten with noise before every
load, so a load that does nothing cannot pass. What it then saves is converted again (U') and compared with U tensor by
tensor, with plain torch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from harness.pt_files import save_again
from harness.ranks import RankFailure, run_ranks
from matrix.cells import FIG_7A, FIG_7B, FIG_8, MODEL, PAIRS, PAPER, SOURCES, SQUARES, TARGETS, Cell, cell, sources_of
from matrix.recording import command_line, train
from matrix.sources import NUM_STEPS, TAG, Sources, take_every_source
from matrix.taking import assert_same_tensors, take_all
from megatron.ucp.convert import convert


@pytest.fixture(scope="module")
def sources(tmp_path_factory, data) -> Sources:
    return Sources(tmp_path_factory.mktemp("sources"), data, MODEL)


def test_the_matrix_is_whole():
    """A table that lost its rows would pass everything."""
    assert len(FIG_7A) == 11 and len(FIG_7B) == 8 and len(FIG_8) == 3
    assert len(SQUARES["ZeRO stages and dp sizes"]) == 16 and len(PAIRS) >= 490
    assert {c.tp for c in SQUARES["tp sizes, uneven vocabulary"]} == {1, 2, 3, 4}
    assert {c.pp for c in SQUARES["stages of five blocks"]} >= {1, 2, 4}
    assert {c.sp for c in SQUARES["sequence parallel"]} == {1, 2, 4}
    assert max(c.world_size for c in TARGETS) == 8
    assert len({c.name for c in (*SOURCES, *TARGETS)}) == len({*SOURCES, *TARGETS})
    assert all(cell(c.name) == c for c in (*SOURCES, *TARGETS))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"to-{target.name}")
def test_every_source_into(target: Cell, sources, data, tmp_path):
    # U' of every pair of the paper and of many degrees; of a square's Targets once.
    saved = {
        source
        for source in sources_of(target)
        if PAIRS[source, target] not in list(SQUARES)[:-1] or source == sources_of(target)[-1]
    }
    take_every_source(target, sources_of(target), saved, sources, tmp_path)


def test_sources_trained_the_same_trajectory(sources):
    """fp32: one trajectory and one grad norm under every topology, to rounding."""
    reference = sources[SOURCES[0]].curves
    assert len(reference.losses) == NUM_STEPS
    for source in SOURCES:
        curves = sources[source].curves
        assert sorted(curves.losses) == sorted(curves.grad_norms) == sorted(reference.losses), source.name
        for step, loss in curves.losses.items():
            assert loss == pytest.approx(reference.losses[step], abs=2e-6), source.name
            assert curves.grad_norms[step] == pytest.approx(reference.grad_norms[step], rel=2e-5), source.name


def test_planted_fault_a_universal_folder_of_another_state_is_found_out(sources, data, tmp_path):
    """Most Targets read no universal folder: each is held against its Source by digest."""
    source = cell("tp1pp1dp2-z1")
    made = sources[source]
    manifest = json.loads((made.universal / "ucp.json").read_text())
    manifest["digests"]["final_norm.weight"]["exp_avg"] = "0" * 32
    (tmp_path / "ucp.json").write_text(json.dumps(manifest))
    others = Sources(sources.folder, data, MODEL, {source: made._replace(universal=tmp_path)})
    with pytest.raises(AssertionError, match=source.name):
        take_every_source(Cell(), [source], [source], others, tmp_path)


def test_planted_fault_a_changed_source_is_refused(sources, data, tmp_path):
    """One moment of one parameter is changed after the save: the load must name it."""
    folder = tmp_path / TAG
    shutil.copytree(sources[cell("tp1pp1dp2-z1")].native, folder)
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    state = torch.load(path, weights_only=False)
    moments = state["optimizer_state_dict"]["base_optimizer_state"]
    moments = moments.get("state", moments)
    moments[0]["exp_avg"][5] += 1e-3
    save_again(state, path)
    argv = command_line(data, **MODEL, zero=0, seed=99)
    with pytest.raises(RankFailure, match=r"1 digests differ: .*\(exp_avg\)"):
        run_ranks(1, take_all, argv, [("direct", str(folder))])


def test_planted_fault_a_stale_universal_folder_is_seen(sources, data, tmp_path):
    """What the comparison with plain torch is for: U' of another Source is not U."""
    other = _of_another_step(data, tmp_path)
    with pytest.raises(AssertionError, match=r"^zero/.*\.pt"):  # a file's content, not the list of files
        assert_same_tensors(sources[PAPER].universal, other)


def _of_another_step(data: Path, folder: Path) -> Path:
    argv = command_line(data, **MODEL, iters=2, save=folder, save_interval=2)
    run_ranks(1, train, argv)
    convert(folder / "global_step2", folder / "universal", num_workers=1)
    return folder / "universal"
