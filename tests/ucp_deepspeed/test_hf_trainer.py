"""Hugging Face's Trainer with the one line: resumed under another number of ranks and another ZeRO stage.

Truth is the run that never stopped: its state when it saved, its losses and the samples of each of its later steps.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ucp_deepspeed.seen import raised_by_deepspeed
from ucp_deepspeed.trainer_program import GLOBAL_BATCH, NUM_STEPS, SAVED_AT, Ran, differences, program, resume, save

from harness.ranks import RankFailure, run_ranks

SOURCES = [(stage, ranks) for stage in (1, 2, 3) for ranks in (1, 2, 3, 4)]
TARGETS = [(stage, ranks) for stage in (1, 2, 3) for ranks in (1, 2, 3, 4)]
Whole = tuple[Path, list[Ran]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[..., Whole]:
    """The folder of the checkpoint, and what the run that made it went on to do. Made when it is first asked for."""

    @functools.cache
    def make(stage: int, ranks: int, installs: bool = True, is_bf16: bool = False) -> Whole:
        out = tmp_path_factory.mktemp(f"zero{stage}dp{ranks}")
        whole = run_ranks(ranks, save, str(out), stage, {"bf16": is_bf16}, installs, timeout=300)
        return out / f"checkpoint-{SAVED_AT}", whole

    return make


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"to-zero{target[0]}dp{target[1]}")
def test_every_stage_and_size_into(target: tuple[int, int], saved, tmp_path):
    made = [saved(*source) for source in SOURCES] + [saved(1 + sum(target) % 3, 2, False)]
    checkpoints = [str(folder) for folder, _ in made]
    found = run_ranks(target[1], resume, str(tmp_path), target[0], checkpoints, {}, True, timeout=300)
    for index, (_, whole) in enumerate(made):
        assert not differences([by_rank[index] for by_rank in found], whole)


@pytest.mark.parametrize("source, target", [((2, 2), (3, 1)), ((3, 3), (1, 2))])
def test_bf16(source: tuple[int, int], target: tuple[int, int], saved, tmp_path):
    folder, whole = saved(*source, is_bf16=True)
    found = run_ranks(target[1], resume, str(tmp_path), target[0], [str(folder)], {"bf16": True}, True, timeout=300)
    assert not differences([ran for [ran] in found], whole, within=2e-2)


@pytest.mark.parametrize("installs", [True, False], ids=["saved with install", "saved by stock"])
@pytest.mark.parametrize("source, target", [((2, 2), (3, 1)), ((3, 3), (1, 2)), ((1, 2), (2, 3))])
def test_adapters_on_a_frozen_base(source: tuple[int, int], target: tuple[int, int], installs: bool, tmp_path):
    """Trainer leaves the base out of the checkpoint."""
    out, lora = tmp_path / "run", {"lora_on": 5}
    whole = run_ranks(source[1], save, str(out), source[0], lora, installs, timeout=300)
    checkpoint = out / f"checkpoint-{SAVED_AT}"
    found = run_ranks(target[1], resume, str(out), target[0], [str(checkpoint)], lora, True, timeout=300)
    assert not differences([ran for [ran] in found], whole)
    if installs:  # which base it was is known by its digest
        with pytest.raises(RankFailure, match="was trained on another base model"):
            run_ranks(target[1], resume, str(out), target[0], [str(checkpoint)], {"lora_on": 6}, True, timeout=300)


@pytest.mark.parametrize("source, target", [((1, 2), (1, 1)), ((2, 2), (2, 3)), ((2, 2), (3, 2)), ((3, 2), (3, 1))])
def test_stock_trainer_beside_it(source: tuple[int, int], target: tuple[int, int], saved, tmp_path):
    """Without the one line the same resume fails, or goes on otherwise."""
    folder, whole = saved(*source, False)
    try:
        found = run_ranks(target[1], resume, str(tmp_path), target[0], [str(folder)], {}, False, timeout=300)
    except RankFailure as error:
        assert raised_by_deepspeed(error)
        return
    assert differences([ran for [ran] in found], whole)


def test_the_newest_whole_checkpoint_is_taken(saved, tmp_path):
    """The machine died while it saved the sixth: its folder is there, without what is written last."""
    folder, whole = saved(2, 2)
    run = tmp_path / "run"
    shutil.copytree(folder.parent, run)
    (run / f"checkpoint-{NUM_STEPS}" / "trainer_state.json").unlink()
    (run / "checkpoint-99").mkdir()
    found = run_ranks(1, resume, str(run), 1, [True], {}, True, timeout=300)
    assert not differences([ran for [ran] in found], whole)


def test_a_torn_tag_is_no_checkpoint(saved, tmp_path):
    from megatron.ucp_deepspeed.trainer import last_whole_checkpoint

    folder, _ = saved(2, 2)
    run = tmp_path / "run"
    shutil.copytree(folder.parent, run)
    assert last_whole_checkpoint(str(run)) == str(run / f"checkpoint-{NUM_STEPS}")
    path = run / f"checkpoint-{NUM_STEPS}" / f"global_step{NUM_STEPS}" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-1])
    assert last_whole_checkpoint(str(run)) == str(run / "checkpoint-3")
    shutil.rmtree(run / "checkpoint-3")
    assert last_whole_checkpoint(str(run)) is None


def test_the_best_checkpoint_is_loaded_at_the_end_whoever_saved_it(tmp_path):
    """`load_best_model_at_end`, where the best (the worst here, which is the first) is another number of ranks'."""
    best: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    best |= {"eval_strategy": "steps", "eval_steps": SAVED_AT, "save_strategy": "steps"}
    whole = run_ranks(2, save, str(tmp_path), 2, best, True, timeout=300)
    checkpoint = str(tmp_path / f"checkpoint-{SAVED_AT}")
    found = [ran for [ran] in run_ranks(3, resume, str(tmp_path), 1, [checkpoint], best, True, timeout=300)]
    assert not differences(found, whole)
    for ran in (*whole, *found):
        assert ran.ended is not None and whole[0].state is not None
        for key, value in whole[0].state.state.items():
            assert torch.equal(ran.ended.state[key], value)


def test_trainers_without_deepspeed_find_their_checkpoints(tmp_path):
    """Theirs have none of DeepSpeed's files; one that is empty is passed over there too."""
    from megatron.ucp_deepspeed.trainer import last_whole_checkpoint

    for name in ("checkpoint-5", "checkpoint-20", "checkpoint-100", "other"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-5", "checkpoint-20"):
        (tmp_path / name / "trainer_state.json").write_text("{}")
    assert last_whole_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-20")
    assert last_whole_checkpoint(str(tmp_path), needs_deepspeed=True) is None


def test_a_global_batch_that_cannot_be_kept_is_refused(saved, tmp_path):
    folder, _ = saved(2, 2)
    manifest = json.loads((folder / f"global_step{SAVED_AT}" / "ucp.json").read_text())
    assert manifest["common"]["global_batch_size"] == GLOBAL_BATCH
    with pytest.raises(RankFailure, match=r"12 samples a step, which 1 ranks with per_device_train_batch_size 5"):
        run_ranks(1, _resume_with_five, str(tmp_path), str(folder), timeout=300)


def _resume_with_five(rank: int, world_size: int, out: str, checkpoint: str) -> None:
    from megatron import ucp_deepspeed

    ucp_deepspeed.install()
    program(out, 1, 5, 1, checkpoint)
