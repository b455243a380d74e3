"""The edges of the loop: where there is nothing to evaluate or to train, and what makes it stop."""

from __future__ import annotations

import os
import signal

import pytest

from harness.ranks import RankFailure, run_ranks
from matrix.recording import build, command_line


def _fit(rank: int, world_size: int, argv: list[str], signal_at: int | None = None):
    from megatron.training.loop import fit, test

    run = build(argv, rank, world_size)
    if signal_at is not None:
        step = run.run_log.step

        def step_and_signal(metrics):
            step(metrics)
            if metrics.iteration == signal_at and rank == world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        run.run_log.step = step_and_signal
    progress = fit(run)
    return progress.iteration, [loss for _, loss in run.run_log.validations], test(run)


def test_a_split_without_validation_or_test_part(data):
    argv = command_line(data, iters=2, split="100,0,0", eval_iters=1, eval_interval=1)
    assert run_ranks(1, _fit, argv) == [(2, [], None)]


def test_evaluation_does_not_depend_on_topology(data):
    flags = {"iters": 2, "split": "80,10,10", "eval_iters": 2, "eval_interval": 1}
    _, reference, tested = run_ranks(1, _fit, command_line(data, **flags))[0]
    assert len(reference) == 2 and reference[0] != reference[1] and tested is not None
    for flags_of_cell in ({"zero": 1}, {"tp": 2}, {"pp": 2, "zero": 1, "micro_batch": 2}):
        for _, losses, test_loss in run_ranks(2, _fit, command_line(data, **flags, **flags_of_cell)):
            assert losses == pytest.approx(reference, abs=2e-6)
            assert test_loss == pytest.approx(tested, abs=2e-6)


def test_resuming_a_finished_run_does_nothing(data, tmp_path):
    argv = command_line(data, iters=2, save=tmp_path)
    assert run_ranks(1, _fit, argv)[0][0] == 2
    before = (tmp_path / "global_step2" / "ucp.json").stat().st_mtime_ns
    assert run_ranks(1, _fit, [*argv, "--load", str(tmp_path)])[0][0] == 2
    assert (tmp_path / "global_step2" / "ucp.json").stat().st_mtime_ns == before


def test_sigterm_on_one_rank_saves_and_stops_all(data, tmp_path):
    argv = command_line(data, zero=1, iters=8, save=tmp_path, exit_signal_handler=True)
    assert [result[0] for result in run_ranks(2, _fit, argv, 3)] == [3, 3]
    assert (tmp_path / "latest").read_text() == "global_step3"


def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing(data, tmp_path):
    argv = command_line(data, iters=8, save=tmp_path, save_interval=1, lr=1e20, min_lr=1e19, lr_warmup_iters=0)
    with pytest.raises(RankFailure, match=r"NonFiniteLossError: loss is nan at iteration 2 "):
        run_ranks(1, _fit, argv)
    # The first step's loss is that of the initial weights; what it made of them is saved before anyone can know.
    assert (tmp_path / "latest").read_text() == "global_step1"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["global_step1"]


@pytest.mark.parametrize("unit", ["samples", "tokens"])
@pytest.mark.parametrize("batch, iterations", [(8, 15), (2, 30)])
def test_a_length_in_samples_ends_there_under_another_batch_size(unit, batch, iterations, data, tmp_path):
    """40 of 80 samples at batch 4, then at another: each sample once, and the learning rate of its sample count."""

    def argv(batch_size: int, **flags) -> list[str]:
        length = {"train_samples": 80} if unit == "samples" else {"train_tokens": 80 * 16}
        return command_line(
            data,
            iters=None,
            lr_decay_iters=None,
            lr_warmup_iters=None,
            global_batch_size=batch_size,
            eval_iters=0,
            save=tmp_path,
            **length,
            **flags,
        )

    begun = run_ranks(1, _curves, argv(4, exit_interval=10))[0]
    assert [step.consumed_samples for step in begun] == list(range(4, 44, 4))
    ended = run_ranks(1, _curves, argv(batch, load=tmp_path))[0]
    assert [step.iteration for step in ended] == list(range(11, iterations + 1))
    assert [step.consumed_samples for step in ended] == list(range(40 + batch, 81, batch))
    whole = run_ranks(1, _curves, [word for word in argv(2) if word not in ("--save", str(tmp_path))])[0]
    rate_at = {step.consumed_samples - 2: step.learning_rate for step in whole}
    assert max(rate_at) == 78
    for step in ended:
        assert step.learning_rate == pytest.approx(rate_at[step.consumed_samples - batch], rel=1e-12)


def _curves(rank: int, world_size: int, argv: list[str]) -> list:
    from megatron.training.loop import fit

    run = build(argv, rank, world_size)
    fit(run)
    return run.run_log.steps
