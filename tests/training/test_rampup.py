"""--rampup-batch-size: the trajectory of a plain loop over batches of those sizes, under every topology, and across a
change of topology in the middle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from harness.ranks import RankFailure, run_ranks
from matrix.cells import Cell
from matrix.recording import build, command_line

SIZES = (4, 4, 4, 4, 4, 8, 8, 8, 12, 12, 16, 16)
"""Of 100 samples from 4 in steps of 4 to 16 over 60, as Megatron gives them (tests/config/test_batch_sizes.py)."""
ITERS_UNTIL = 7
LR = 5e-3


def _argv(data: Path, cell: Cell, **flags) -> list[str]:
    values = {
        "iters": None,
        "lr_decay_iters": None,
        "lr_warmup_iters": None,
        "train_samples": sum(SIZES),
        "num_layers": 2,
        "global_batch_size": 16,
        "lr": LR,
        "lr_decay_style": "constant",
        **flags,
    }
    return [*command_line(data, **cell.flags, **values), "--rampup-batch-size", "4", "4", "60"]


def _steps(rank: int, world_size: int, argv: list[str]):
    from megatron.training.loop import fit

    run = build(argv, rank, world_size)
    fit(run)
    steps = run.run_log.steps
    return steps, run.live.engine.global_samples, run.run_log.validations


def _plain(rank: int, world_size: int, argv: list[str]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step: no engine, no loader, samples taken from the dataset by number."""
    run = build(argv, rank, world_size)
    model, train_set = run.live.engine.module, run.batches.train_set
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    told, at = [], 0
    for size in SIZES:
        model.zero_grad()
        each = []
        for sample in range(at, at + size):
            batch = run.batches.collate([train_set[sample]])
            each.append(model(batch["tokens"], batch["labels"], batch["loss_mask"]))
        loss = sum(each) / size
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), 0.5)
        optimizer.step()
        told.append((float(loss), float(norm)))
        at += size
    return told


@pytest.fixture(scope="module")
def truth(data) -> list[tuple[float, float]]:
    told = run_ranks(1, _plain, _argv(data, Cell(), no_pipeline_parallel=True))[0]
    assert told[-1][0] < told[0][0] - 0.1
    return told


def _compare(steps, truth, start: int = 0) -> None:
    assert [step.global_batch_size for step in steps] == list(SIZES[start:])
    assert [step.consumed_samples for step in steps] == [sum(SIZES[: i + 1]) for i in range(start, len(SIZES))]
    assert [step.loss for step in steps] == pytest.approx([loss for loss, _ in truth[start:]], abs=2e-5)
    assert [step.grad_norm for step in steps] == pytest.approx([norm for _, norm in truth[start:]], abs=5e-4)


CELLS = (
    Cell(how="plain"),
    Cell(dp=2, zero=1),
    Cell(dp=2, zero=2),
    Cell(dp=4, zero=3),
    Cell(pp=2, dp=2, zero=1),
    Cell(tp=2),
    Cell(dp=2, sp=2, zero=1),
)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_the_same_as_a_plain_loop(cell: Cell, data, truth):
    steps, global_samples, _ = run_ranks(cell.world_size, _steps, _argv(data, cell))[0]
    _compare(steps, truth)
    assert global_samples == sum(SIZES) * cell.sp


def test_offloaded(data, truth, tmp_path):
    """ZeRO-2 with offload keeps the number of micro batches that it was built for, the final one."""
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    steps, _, _ = run_ranks(4, _steps, _argv(data, Cell(dp=4, zero=2), deepspeed_config=config))[0]
    _compare(steps, truth)


@pytest.mark.parametrize(
    "source, target",
    [
        (Cell(dp=2, zero=1), Cell(pp=2)),
        (Cell(pp=2, dp=2, zero=1), Cell(dp=4, zero=3)),
        (Cell(tp=2), Cell(dp=2, zero=2)),
    ],
    ids=lambda cell: cell.name,
)
def test_resumed_in_the_middle(source: Cell, target: Cell, data, truth, tmp_path):
    begun = run_ranks(source.world_size, _steps, _argv(data, source, save=tmp_path, exit_interval=ITERS_UNTIL))[0][0]
    assert len(begun) == ITERS_UNTIL
    went_on = run_ranks(target.world_size, _steps, _argv(data, target, load=tmp_path))[0][0]
    _compare(went_on, truth, ITERS_UNTIL)


def test_evaluations_are_of_the_final_size(data):
    """However far the ramp-up has come: the first one is of the samples that a constant batch size would give it."""
    flags = {"eval_iters": 1, "eval_interval": 6}
    for cell in (Cell(), Cell(pp=2)):
        _, _, during = run_ranks(cell.world_size, _steps, _argv(data, cell, lr=1e-30, min_lr=0.0, **flags))[0]
        constant = _argv(data, cell, lr=1e-30, min_lr=0.0, **flags | {"eval_interval": 3})[:-4]
        _, _, without = run_ranks(cell.world_size, _steps, constant)[0]
        assert [i for i, _ in during] == [6, 12]
        assert during[0][1] == pytest.approx(without[0][1], abs=1e-6)


def test_a_resume_asks_only_for_the_sizes_to_come(data, tmp_path):
    """Four ranks with micro batches of 2 cannot take 4 or 12 samples: told before anything is built, unless passed."""
    begin = _argv(data, Cell(dp=1), save=tmp_path, exit_interval=ITERS_UNTIL)
    run_ranks(1, _steps, begin)
    wide = _argv(data, Cell(dp=4, zero=1), load=tmp_path, micro_batch=2)
    with pytest.raises(RankFailure, match=r"--rampup-batch-size 4 4 60: 12 with --micro-batch-size 2 on 4 data"):
        run_ranks(4, _steps, wide)
    run_ranks(1, _steps, [*_argv(data, Cell(dp=1), load=tmp_path, save=tmp_path, exit_interval=10)])
    steps = run_ranks(4, _steps, wide)[0][0]
    assert [step.global_batch_size for step in steps] == [16, 16]


def _forgetful(rank: int, world_size: int, argv: list[str]):
    """Where DeepSpeed looks for the end of a step is left as it was."""
    from megatron.training import loop

    changed = loop.set_global_batch_size

    def forget(engine, size, data_parallel_size):
        before = engine.micro_steps
        changed(engine, size, data_parallel_size)
        engine.micro_steps = before

    loop.set_global_batch_size = forget
    return _steps(rank, world_size, argv)


def test_planted_fault_the_end_of_a_step_is_elsewhere(data, truth):
    steps, _, _ = run_ranks(2, _forgetful, _argv(data, Cell(dp=2, zero=2)))[0]
    differences = [abs(step.loss - loss) for step, (loss, _) in zip(steps, truth)]
    assert max(differences[:5]) < 2e-5
    assert max(differences[5:]) > 1e-3
