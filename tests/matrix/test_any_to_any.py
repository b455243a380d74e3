"""Any Source to any Target: the digest after the load equals the digest at the save, for every pair.

Twenty cells train three steps and save. Then each cell, as a Target with other weights in it, takes all twenty
Sources one after the other, once directly and once from their universal folders. Its own state is overwritten with
noise before every load, so a load that does nothing cannot pass. What the Target then saves is converted again and
compared with the Source's universal folder tensor by tensor, with plain torch.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.ranks import RankFailure, run_ranks
from matrix.cells import CELLS, MIN_CELLS, Cell
from matrix.recording import build, command_line, train, write_dataset
from megatron.ucp.convert import convert

NUM_STEPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "matrix_text_document")


@pytest.fixture(scope="module")
def sources(tmp_path_factory, data) -> dict[str, dict]:
    """Every cell trained and saved: {cell: {"native", "universal", "curves"}}."""
    made = {}
    for cell in CELLS:
        folder = tmp_path_factory.mktemp(cell.name)
        argv = command_line(data, **cell.flags, iters=NUM_STEPS, save=folder, save_interval=NUM_STEPS)
        curves = run_ranks(cell.world_size, train, argv)[0]
        native = folder / f"global_step{NUM_STEPS}"
        universal = folder / f"global_step{NUM_STEPS}_universal"
        convert(native, universal, num_workers=1)
        made[cell.name] = {"native": native, "universal": universal, "curves": curves}
    return made


def _take_all(rank: int, world_size: int, argv: list[str], plans: list[tuple[str, str]], save_last: str | None):
    """Load every planned Source into one live engine; the digests found after each load."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    from megatron.training.loading import load
    from megatron.training.resume import ResumePlan
    from megatron.training.saving import save
    from megatron.training.state_digest import state_digests

    run = build(argv, rank, world_size)
    state = run.live.state
    state.make_states()
    found = []
    for kind, folder in plans:
        for interval in state.intervals:
            for tensor in (interval.master, *(interval.state(state.base, name) for name in state.state_names)):
                tensor.fill_(777.0)
            state.set_step(interval.flat, 777)
        state.refresh_weights()
        with GatheredParameters(list(run.live.engine.module.parameters())):  # whole under ZeRO-3 too
            assert all(bool((p == 777.0).all()) and p.numel() for p in run.live.engine.module.parameters())
        progress = load(run.live, ResumePlan(kind, Path(folder), ""))
        step = {state.step_of(interval.flat) for interval in state.intervals}
        found.append((state_digests(state), step, progress.iteration, progress.consumed_train_samples))
    if save_last is not None:
        save(run.live, Path(save_last), progress)
    return found


def test_the_matrix_is_whole():
    assert len(CELLS) >= MIN_CELLS
    assert len({cell.name for cell in CELLS}) == len(CELLS)


@pytest.mark.parametrize("kind", ["direct", "universal"])
@pytest.mark.parametrize("target", CELLS, ids=lambda cell: f"to-{cell.name}")
def test_every_source_into(target: Cell, kind: str, sources, data, tmp_path):
    argv = command_line(data, **target.flags, seed=99)
    folders = {name: made["native" if kind == "direct" else "universal"] for name, made in sources.items()}
    plans = [(kind, str(folder)) for folder in folders.values()]
    results = run_ranks(target.world_size, _take_all, argv, plans, str(tmp_path))
    last = None
    for by_rank in results:
        for (name, made), (digests, steps, iteration, samples) in zip(sources.items(), by_rank, strict=True):
            assert digests == made["curves"].digests, f"{name} to {target.name}"
            assert steps <= {float(NUM_STEPS)}, f"{name} to {target.name}"
            assert (iteration, samples) == (NUM_STEPS, NUM_STEPS * 8)
            last = name
    convert(tmp_path / f"global_step{NUM_STEPS}", tmp_path / "again_universal", num_workers=1)
    assert_same_tensors(sources[last]["universal"], tmp_path / "again_universal")


BEYOND = (
    Cell(dp=4, zero=1),
    Cell(dp=4, zero=2),
    Cell(tp=4, zero=1),
    Cell(pp=3, zero=1),  # four layers on three stages
    Cell(pp=4, zero=0),
    Cell(pp=2, dp=2, zero=1),
    Cell(pp=2, dp=2, zero=0),
    Cell(tp=2, pp=2, dp=2, zero=1),
)


@pytest.mark.parametrize("kind", ["direct", "universal"])
@pytest.mark.parametrize("target", BEYOND, ids=lambda cell: f"to-{cell.name}")
def test_beyond_two_of_each(target: Cell, kind: str, sources, data, tmp_path):
    """More ranks, uneven stages, three degrees at once; and from there on to one rank."""
    made = sources["tp2pp2dp1-zero1"]
    folder = made["native" if kind == "direct" else "universal"]
    argv = command_line(data, **target.flags, seed=99)
    for by_rank in run_ranks(target.world_size, _take_all, argv, [(kind, str(folder))], str(tmp_path)):
        assert by_rank[0][0] == made["curves"].digests
    saved = [("direct", str(tmp_path / f"global_step{NUM_STEPS}"))]
    back = run_ranks(1, _take_all, command_line(data, seed=98), saved, None)
    assert back[0][0][0] == made["curves"].digests


def assert_same_tensors(first: Path, second: Path) -> None:
    """Bitwise, with plain torch.load: independent of our readers and of the digest."""
    files = sorted(path.relative_to(first) for path in (first / "zero").rglob("*.pt") if "optimizer" not in path.name)
    assert len(files) > 100
    assert files == sorted(p.relative_to(second) for p in (second / "zero").rglob("*.pt") if "optimizer" not in p.name)
    for file in files:
        # Our own files of a moment ago; DeepSpeed's format has a class of its own in them.
        a, b = (torch.load(folder / file, weights_only=False) for folder in (first, second))
        a, b = (x["param"] if isinstance(x, dict) else x for x in (a, b))
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), file


def test_sources_trained_the_same_trajectory(sources):
    """fp32: one trajectory and one grad norm under every topology, to rounding."""
    reference = sources[CELLS[0].name]["curves"]
    assert len(reference.losses) == NUM_STEPS
    for name, made in sources.items():
        for step, loss in made["curves"].losses.items():
            assert loss == pytest.approx(reference.losses[step], abs=2e-6), name
            assert made["curves"].grad_norms[step] == pytest.approx(reference.grad_norms[step], rel=2e-5), name


def test_planted_fault_a_changed_source_is_refused(sources, data, tmp_path):
    """One moment of one parameter is changed after the save: the load must name it."""
    import shutil

    made = sources["tp1pp1dp2-zero1"]
    folder = tmp_path / "global_step3"
    shutil.copytree(made["native"], folder)
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    state = torch.load(path, weights_only=False)
    moments = state["optimizer_state_dict"]["base_optimizer_state"]
    moments = moments.get("state", moments)
    moments[0]["exp_avg"][5] += 1e-3
    torch.save(state, path)
    argv = command_line(data, zero=0, seed=99)
    with pytest.raises(RankFailure, match=r"1 digests differ: .*\(exp_avg\)"):
        run_ranks(1, _take_all, argv, [("direct", str(folder))], None)
