"""Frozen parameters: they do not move, are saved and restored under every topology, and may change sides at a resume.

The truth is plain torch: the same model in one process, with requires_grad False and torch's own AdamW.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from harness.pt_files import save_again
from harness.ranks import RankFailure, run_ranks
from matrix.cells import Cell
from matrix.recording import build, command_line, train
from matrix.stock import stock_convert
from matrix.taking import take_all
from megatron.ucp.convert import convert

NUM_STEPS = 3
PATTERNS = ("embedding.*", "layers.0.*", "layers.2.mlp.*.bias", "final_norm.weight")
PLAIN = {"no_pipeline_parallel": True}
CASES = {
    "zero0": (Cell(), {}),
    "zero0-dp2-plain": (Cell(dp=2), PLAIN),
    "zero1-tp2-plain": (Cell(tp=2, zero=1), PLAIN),
    "zero2-tp2-dp2": (Cell(tp=2, dp=2, zero=2), {}),
    "zero0-pp2": (Cell(pp=2), {}),
    "zero1-tp2-pp2": (Cell(tp=2, pp=2, zero=1), {}),
    "zero3-tp2-dp2": (Cell(tp=2, dp=2, zero=3), {}),
}
"""A cell and flags; at one stage weights are in layer files all the same, unless the model is plain."""


def line(data: Path, cell: Cell, patterns: Sequence[str] = PATTERNS, **flags) -> list[str]:
    freeze = ["--freeze-parameters", *patterns] if patterns else []
    return [*command_line(data, **cell.flags, iters=NUM_STEPS + 2, **flags), *freeze]


def _saved(data: Path, cell: Cell, folder: Path, patterns: Sequence[str] = PATTERNS, **flags) -> dict:
    argv = line(data, cell, patterns, exit_interval=NUM_STEPS, save=folder, **flags)
    curves = run_ranks(cell.world_size, train, argv)[0]
    native, universal = folder / f"global_step{NUM_STEPS}", folder / f"global_step{NUM_STEPS}_universal"
    convert(native, universal, num_workers=1)
    return {"direct": str(native), "universal": str(universal), "curves": curves}


@pytest.fixture(scope="module")
def sources(data, tmp_path_factory) -> dict[str, dict]:
    return {name: _saved(data, cell, tmp_path_factory.mktemp(name), **flags) for name, (cell, flags) in CASES.items()}


# -- plain torch ----------------------------------------------------------------------------------------------------


def _in_plain_torch(rank: int, world_size: int, argv: list[str], frozen_from: dict[int, Sequence[str]]):
    """Losses of a loop as in a textbook. `frozen_from`: the patterns that are frozen from a step on; what begins to be
    trained joins the optimizer then, as new. Matrices decay, vectors do not."""
    from megatron.model.build import build_model
    from megatron.parallel.context import ParallelContext

    run = build(argv, rank, world_size)
    config, context = run.config, ParallelContext.single()
    model = build_model(config.model, config.parallel, context, run.live.streams, config.run.seed).train()
    optimizer, losses = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]), {}
    batches, curve = run.batches.train(0), run.live.schedule.curve
    for step in range(1, NUM_STEPS + 3):
        for name, param in model.named_parameters() if step in frozen_from else ():
            param.requires_grad_(not any(fnmatch.fnmatch(name, pattern) for pattern in frozen_from[step]))
            if param.requires_grad and param not in {p for group in optimizer.param_groups for p in group["params"]}:
                optimizer.add_param_group({"params": [param], "weight_decay": 0.1 if param.dim() > 1 else 0.0})
        micro_losses = []
        for _ in range(8):
            batch = next(batches)
            micro_losses.append(model(batch["tokens"], batch["labels"], batch["loss_mask"]))
        losses[step] = sum(loss.item() for loss in micro_losses) / 8
        (sum(micro_losses) / 8).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = curve.learning_rate((step - 1) * 8)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.fixture(scope="module")
def truth(data) -> dict[int, float]:
    argv = [*line(data, Cell(), ()), "--no-pipeline-parallel"]
    return run_ranks(1, _in_plain_torch, argv, {1: PATTERNS})[0]


def _first_masters(rank: int, world_size: int, argv: list[str]) -> dict[str, str]:
    from megatron.checkpoint.state_digest import state_digests

    return {name: digests["fp32"] for name, digests in state_digests(build(argv, rank, world_size).live.state).items()}


def _is_frozen(name: str) -> bool:
    return (
        name.startswith(("embedding.", "layers.0."))
        or name == "final_norm.weight"
        or (name.startswith("layers.2.mlp.") and name.endswith(".bias"))
    )


# -- training and saving --------------------------------------------------------------------------------------------


def test_trained_as_in_plain_torch(sources, truth):
    for name, made in sources.items():
        assert sorted(made["curves"].losses) == [1, 2, 3]
        for step, loss in made["curves"].losses.items():
            assert loss == pytest.approx(truth[step], abs=2e-6), name


def test_frozen_weights_do_not_move_and_are_saved_once(sources, data):
    """They are what a run without the flag starts from, to the bit; all others have moved and have their states."""
    first = run_ranks(1, _first_masters, line(data, Cell(), ()))[0]
    assert 10 < sum(map(_is_frozen, first)) < len(first) - 10
    for source, made in sources.items():
        manifest = json.loads((Path(made["direct"]) / "ucp.json").read_text())
        for name, digests in made["curves"].digests.items():
            info = manifest["parameters"][name]
            assert info["is_trainable"] == (not _is_frozen(name)), name
            if _is_frozen(name):
                assert digests == {"fp32": first[name]} == manifest["digests"][name], f"{name} in {source}"
                assert (info["states"], info["group"], info["step"]) == (["fp32"], "", None)
            else:
                assert set(digests) == {"fp32", "exp_avg", "exp_avg_sq"} and digests["fp32"] != first[name]


@pytest.mark.parametrize("target", CASES)
def test_every_source_into(target: str, sources, truth, data):
    """Under noise everywhere, in the frozen weights too; and from the last Source on, as in plain torch."""
    plans = [(kind, made[kind]) for made in sources.values() for kind in ("direct", "universal")]
    makers = [made for made in sources.values() for _ in range(2)]
    cell, flags = CASES[target]
    for taken in run_ranks(cell.world_size, take_all, line(data, cell, **flags), plans, None, True):
        for found, made in zip(taken, makers, strict=True):
            assert found.digests == made["curves"].digests
        assert sorted(taken[-1].losses) == [NUM_STEPS + 1, NUM_STEPS + 2]
        for step, loss in taken[-1].losses.items():
            assert loss == pytest.approx(truth[step], abs=2e-6)


UNEVEN = {
    "no-vectors-on-the-last-stage": ("layers.[23].*norm.*", "layers.[23].*.bias", "final_norm.*"),
    "no-matrices-on-the-first": ("embedding.*", "layers.[01].*.weight"),
}


@pytest.mark.parametrize("case", UNEVEN)
def test_stages_with_other_parameter_groups(case: str, data):
    """Of which DeepSpeed reduces one norm each over the stages: with fewer on one it would wait forever."""
    alone = run_ranks(1, train, line(data, Cell(), UNEVEN[case]))[0]
    staged = run_ranks(2, train, line(data, Cell(pp=2, zero=1), UNEVEN[case]), timeout=60)[0]
    assert sorted(staged.losses) == sorted(alone.losses) == [1, 2, 3, 4, 5]
    for step, loss in staged.losses.items():
        assert loss == pytest.approx(alone.losses[step], abs=2e-6)
        assert staged.grad_norms[step] == pytest.approx(alone.grad_norms[step], rel=2e-5)


# -- precisions -----------------------------------------------------------------------------------------------------


def _weights(rank: int, world_size: int, argv: list[str]) -> tuple[dict[str, torch.Tensor], dict]:
    """The live weights, whole, and the digests."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    from megatron.checkpoint.state_digest import state_digests

    run = build(argv, rank, world_size)
    params = dict(run.live.engine.module.named_parameters())
    with GatheredParameters(list(params.values())):
        weights = {name: param.detach().clone() for name, param in params.items()}
    return weights, state_digests(run.live.state)


@pytest.mark.parametrize("target", [Cell(dp=2, zero=1), Cell(dp=2, zero=3)], ids=lambda cell: cell.name)
def test_fp32_rounds_into_bf16_and_bf16_widens(target: Cell, sources, data, tmp_path):
    source = sources["zero2-tp2-dp2"]
    argv = line(data, target, bf16=True, load=source["direct"])
    for weights, digests in run_ranks(target.world_size, _weights, argv):
        for name in filter(_is_frozen, weights):
            path = Path(source["universal"]) / "zero" / name / "fp32.pt"
            saved = torch.load(path, weights_only=False)["param"]
            rows = min(len(saved), len(weights[name]))
            assert weights[name].dtype == torch.bfloat16
            assert torch.equal(weights[name][:rows], saved[:rows].bfloat16()), name
            if name.endswith("word_embeddings.weight"):
                assert digests[name] != source["curves"].digests[name]
    low = _saved(data, target, tmp_path, bf16=True)
    taken = run_ranks(
        2, take_all, line(data, Cell(dp=2, zero=1)), [(kind, low[kind]) for kind in ("direct", "universal")]
    )
    assert all(found.digests == low["curves"].digests for by_rank in taken for found in by_rank)


# -- changing sides -------------------------------------------------------------------------------------------------

THAWED = ("embedding.*",)
"""What is still frozen after the resume."""


@pytest.fixture(scope="module")
def thawed_truth(data) -> dict[int, float]:
    argv = [*line(data, Cell(), ()), "--no-pipeline-parallel"]
    return run_ranks(1, _in_plain_torch, argv, {1: PATTERNS, NUM_STEPS + 1: THAWED})[0]


@pytest.mark.parametrize(
    "target", [Cell(), Cell(dp=2, zero=1), Cell(tp=2, dp=2, zero=3), Cell(pp=2, zero=1)], ids=lambda cell: cell.name
)
def test_what_was_frozen_is_trained(target: Cell, sources, truth, thawed_truth, data, tmp_path):
    """With moments that begin at zero and a step of its own, as torch does for a parameter that joins an optimizer."""
    source = sources["zero1-tp2-pp2"]
    argv = line(data, target, THAWED, load=source["universal"], save=tmp_path, exit_interval=NUM_STEPS + 1)
    first = run_ranks(target.world_size, train, argv)[0]
    manifest = json.loads((tmp_path / f"global_step{NUM_STEPS + 1}" / "ucp.json").read_text())
    steps = {name: info["step"] for name, info in manifest["parameters"].items()}
    assert steps["layers.1.mlp.dense_h_to_4h.weight"] == NUM_STEPS + 1
    assert steps["layers.0.mlp.dense_h_to_4h.weight"] == 1
    assert steps["embedding.word_embeddings.weight"] is None
    groups = {name: info["group"] for name, info in manifest["parameters"].items()}
    assert groups["layers.0.mlp.dense_h_to_4h.weight"] == f"decay_since_{NUM_STEPS}"
    # Resumed once more, elsewhere: the late ones stay late.
    other = Cell(dp=2, zero=2) if target == Cell() else Cell()
    second = run_ranks(other.world_size, train, line(data, other, THAWED, load=tmp_path))[0]
    losses = {**first.losses, **second.losses}
    assert sorted(losses) == [NUM_STEPS + 1, NUM_STEPS + 2]
    for step, loss in losses.items():
        assert loss == pytest.approx(thawed_truth[step], abs=2e-6)
    assert abs(thawed_truth[NUM_STEPS + 2] - truth[NUM_STEPS + 2]) > 1e-4


def test_what_was_trained_is_frozen(data, tmp_path):
    source = _saved(data, Cell(dp=2, zero=1), tmp_path, ())
    for target in (Cell(), Cell(dp=2, zero=3), Cell(pp=2, zero=1)):
        resumed = run_ranks(target.world_size, train, line(data, target, load=source["direct"]))[0]
        for name, digests in resumed.digests.items():
            if _is_frozen(name):
                assert digests == {"fp32": source["curves"].digests[name]["fp32"]}
            else:
                assert digests["fp32"] != source["curves"].digests[name]["fp32"]
        whole = run_ranks(1, train, line(data, Cell(), load=source["universal"]))[0]
        for step, loss in resumed.losses.items():
            assert loss == pytest.approx(whole.losses[step], abs=2e-6)


# -- stock DeepSpeed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zero1-tp2-plain", "zero1-tp2-pp2"])
def teststock_converter_reads_what_is_trained(name: str, sources, tmp_path):
    """The patterns that it is given must not name anything else: in strict mode it wants to find each of them. (Frozen
    weights it takes from the first tensor parallel rank alone, or not at all.)"""
    run_ranks(1, stock_convert, sources[name]["direct"], str(tmp_path))
    trained = [name for name in sources[name]["curves"].digests if not _is_frozen(name)]
    assert len(trained) > 20
    for param in trained:
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            theirs, ours = (
                torch.load(folder / "zero" / param / f"{state}.pt", weights_only=False)["param"]
                for folder in (tmp_path, Path(sources[name]["universal"]))
            )
            assert torch.equal(theirs, ours), f"{param} {state}"


# -- what must fail -------------------------------------------------------------------------------------------------


def test_a_pattern_that_matches_nothing(data):
    with pytest.raises(RankFailure, match=r"--freeze-parameters layer\.0\.\* matches no parameter(.|\n)*layers\.0\."):
        run_ranks(2, train, line(data, Cell(pp=2, zero=1), ("layer.0.*", "embedding.*")))


def test_nothing_left_to_train(data):
    with pytest.raises(RankFailure, match="nothing is left to train"):
        run_ranks(1, train, line(data, Cell(), ("*",)))
    with pytest.raises(RankFailure, match="nothing is left to train on pipeline stage 0"):
        run_ranks(2, train, line(data, Cell(pp=2, zero=1), ("embedding.*", "layers.[01].*")))


@pytest.mark.parametrize("source", ["zero0-pp2", "zero3-tp2-dp2"])
def test_planted_fault_a_changed_frozen_weight(source: str, sources, data, tmp_path):
    import shutil

    folder = Path(shutil.copytree(sources[source]["direct"], tmp_path / "global_step3"))
    if source == "zero3-tp2-dp2":
        path, key = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt", "final_norm.weight"
    else:
        path, key = folder / "layer_06-model_00-model_states.pt", "weight"
    content = torch.load(path, weights_only=False)
    values = content[key] if key in content else content["frozen_param_fragments"][key]
    values.view(-1)[5] += 1e-3
    save_again(content, path)
    with pytest.raises(RankFailure, match=r"1 digests differ: final_norm.weight \(fp32\)"):
        run_ranks(1, train, line(data, Cell(), load=folder))


def _save_after_a_drift(rank: int, world_size: int, argv: list[str], folder: str) -> None:
    from megatron.checkpoint.saving import save
    from megatron.training.loop import fit

    run = build(argv, rank, world_size)
    fit(run)
    if rank == 1:
        next(i for i in run.live.state.frozen_intervals if i.name == "final_norm.weight").weights[3] += 1e-7
    save(run.live, Path(folder), run.progress)


def test_planted_fault_frozen_copies_that_drifted_apart(data, tmp_path):
    for cell in (Cell(dp=2, zero=1), Cell(tp=2, dp=2, zero=3)):
        with pytest.raises(RankFailure, match=r"DivergedCopiesError(.|\n)*final_norm.weight \(fp32\)"):
            run_ranks(cell.world_size, _save_after_a_drift, line(data, cell), str(tmp_path / "save"))
        assert not (tmp_path / "save").exists()


def test_persistent_buffers_are_refused():
    from megatron.training.trainable import UnsavedBufferError, refuse_buffers

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model[0].register_buffer("angles", torch.zeros(3), persistent=False)
    refuse_buffers(model)
    model[0].register_buffer("running_mean", torch.zeros(3))
    with pytest.raises(UnsavedBufferError, match=r"0\.running_mean"):
        refuse_buffers(model)
