"""A rank that is alone in its data-parallel group trains as under DeepSpeed's own ZeRO, without its copies."""

from __future__ import annotations

import pytest
import torch

from harness.ranks import run_ranks
from matrix.cells import Cell
from matrix.recording import build, command_line, curves
from megatron.engine.grad_norms import ROW, sum_of_squares


def _trained(rank: int, world_size: int, argv: list[str], is_spared: bool):
    """The curves, and what became of DeepSpeed's copies."""
    from megatron.checkpoint.state_digest import state_digests
    from megatron.engine import engine
    from megatron.training.loop import fit

    if not is_spared:
        engine.spare_copies = lambda optimizer: None
        engine._Unshared.buffered_allreduce_fallback = engine.DeepSpeedEngine.buffered_allreduce_fallback
    run = build(argv, rank, world_size)
    fit(run)
    optimizer = run.live.engine.optimizer
    shares = [
        master.data_ptr() == weights.data_ptr()
        for master, weights in zip(
            getattr(optimizer, "single_partition_of_fp32_groups", []),
            getattr(optimizer, "bit16_groups_flat", []),
            strict=True,
        )
    ]
    return curves(run, state_digests(run.live.state)), shares, _seen_by_deepspeed(run)


def _seen_by_deepspeed(run) -> bool:
    """DeepSpeed's own accessors reach the masters and moments that are stepped."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_fp32_param

    if not run.live.engine.zero_optimization_stage() or run.live.context.zero_size > 1:
        return True  # nothing was linked again; and the accessors are collective, of parameters that all ranks have
    fine = []
    run.live.state.make_states()  # DeepSpeed finds only the first group's states by itself
    for interval in run.live.state.intervals:
        param = interval.param
        safe_set_full_fp32_param(param, torch.full_like(param, 0.5, dtype=torch.float32))
        fine += [
            bool((interval.master == 0.5).all()),
            torch.equal(safe_get_full_fp32_param(param).flatten(), interval.master),
            torch.equal(
                safe_get_full_optimizer_state(param, "exp_avg").flatten(),
                interval.state(run.live.state.base, "exp_avg"),
            ),
        ]
    return bool(fine) and all(fine)


CASES = {
    "zero0": (Cell(), {}),
    "zero1": (Cell(zero=1), {}),
    "zero2": (Cell(zero=2), {}),
    "zero1, accumulation": (Cell(zero=1), {"micro_batch": 2}),
    "zero2, accumulation": (Cell(zero=2), {"micro_batch": 2}),
    "zero1, bf16": (Cell(zero=1), {"bf16": True}),
    "zero2, bf16, fp32 gradients": (Cell(zero=2), {"bf16": True, "accumulate_allreduce_grads_in_fp32": True}),
    "tp2, zero1": (Cell(tp=2, zero=1), {}),
    "pp2": (Cell(pp=2), {}),
    "pp2, zero1": (Cell(pp=2, zero=1), {}),
    "shared, zero1": (Cell(dp=2, zero=1), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_trains_as_deepspeeds_own(case: str, data):
    cell, flags = CASES[case]
    argv = command_line(data, **cell.flags, iters=4, **flags)
    spared = run_ranks(cell.world_size, _trained, argv, True)
    stock = run_ranks(cell.world_size, _trained, argv, False)
    for (found, shares, is_seen), (expected, shares_of_stock, _) in zip(spared, stock, strict=True):
        assert found.losses == expected.losses and len(found.losses) == 4
        assert found.grad_norms == expected.grad_norms
        assert found.digests == expected.digests
        assert is_seen
        assert not any(shares_of_stock)
        assert all(shares) is (cell.dp == 1 and "bf16" not in flags) or cell.zero == 0


def test_a_sum_of_squares_is_fp64s():
    generator = torch.Generator().manual_seed(0)
    for numel in (0, 1, 7, ROW - 1, ROW, ROW + 1, 300 * ROW + 77):
        values = torch.randn(numel, generator=generator)
        exact = values.double().square().sum().item()
        assert sum_of_squares(values).item() == pytest.approx(exact, rel=5e-7)
        assert sum_of_squares(values.bfloat16()).item() == pytest.approx(
            values.bfloat16().double().square().sum().item(), rel=5e-7
        )
    long = torch.rand(1 << 20, generator=generator)  # its norm in fp32 throughout is off by more than that
    exact = long.double().square().sum().item()
    assert sum_of_squares(long).item() == pytest.approx(exact, rel=5e-7)
    assert long.norm().item() ** 2 != pytest.approx(exact, rel=5e-7)
    for bad in (float("inf"), float("nan")):
        for place in (3, 5 * ROW - 1, 5 * ROW + 2):
            values = torch.ones(5 * ROW + 5)
            values[place] = bad
            assert not sum_of_squares(values).isfinite()


def _norms(rank: int, world_size: int, argv: list[str]) -> list[tuple[float, float]]:
    """The norm of each step's gradients, by ours and by DeepSpeed's own method on the same gradients."""
    from megatron.training.loop import fit

    run = build(argv, rank, world_size)
    optimizer = run.live.engine.optimizer
    ours, pairs = optimizer.get_grad_norm_direct, []

    def both(gradients, params, norm_type=2):
        gradients, params = list(gradients), list(params)
        found = ours(gradients, params)
        expected = type(optimizer).get_grad_norm_direct(optimizer, gradients, params)
        pairs.append((float(found), float(expected)))
        return found

    optimizer.get_grad_norm_direct = both
    fit(run)
    return pairs


@pytest.mark.parametrize(
    "cell", [Cell(zero=1), Cell(dp=2, zero=2), Cell(tp=2, dp=2, zero=1), Cell(pp=2, zero=1)], ids=str
)
def test_the_norm_is_deepspeeds(cell: Cell, data):
    for pairs in run_ranks(cell.world_size, _norms, command_line(data, **cell.flags, iters=2)):
        assert len(pairs) >= 4 and all(found == pytest.approx(expected, rel=1e-6) for found, expected in pairs)
