"""The global batch size of every step: Megatron's ramp-up, and lengths counted through it."""

import pytest

from megatron.config.batch_sizes import BatchSizes
from megatron.config.length import RunLength

RAMPS = [
    # (final, ramp-up, (samples consumed, size of the next step) of every step up to the final size): as Megatron-core
    # 0.16.1's RampupBatchsizeNumMicroBatchesCalculator gives them.
    (32, (8, 8, 100), [(0, 8), (8, 8), (16, 8), (24, 8), (32, 8), (40, 16), (56, 16), (72, 24), (96, 24), (120, 32)]),
    (16, (4, 4, 60), [(0, 4), (4, 4), (8, 4), (12, 4), (16, 4), (20, 8), (28, 8), (36, 8), (44, 12), (56, 12)]),
    (12, (2, 5, 7), [(0, 2), (2, 2), (4, 7), (11, 12)]),
    (40, (4, 4, 9), [(0, 4), (4, 20), (24, 40)]),  # whole sizes are passed over
    (8, (8, 4, 100), [(0, 8), (8, 8)]),  # no increment at all
]


@pytest.mark.parametrize("final, rampup, steps", RAMPS)
def test_sizes_are_megatrons(final, rampup, steps):
    sizes = BatchSizes(final, rampup)
    assert [sizes.at(samples) for samples, _ in steps] == [size for _, size in steps]
    assert sizes.at(10**9) == final
    for i, (samples, _) in enumerate(steps):
        for j in range(i, len(steps)):
            end, size = steps[j]
            assert sizes.samples_after(samples, j - i) == end
            for missing in {1, size - 1}:
                assert sizes.num_batches(samples, end + missing) == j - i + (size == missing)
                assert sizes.num_batches(samples, end + missing, is_last_begun=True) == j - i + 1
            assert sizes.num_batches(samples, end) == sizes.num_batches(samples, end, is_last_begun=True) == j - i
        assert sizes.to_come(samples) == sorted({size for _, size in steps[i:]} | {final})


def test_a_run_through_a_rampup():
    sizes = BatchSizes(16, (4, 4, 60))
    for unit, length in (("samples", {"train_samples": 100}), ("tokens", {"train_tokens": 1600})):
        run = RunLength(sizes, 16, **length)
        assert run.last_iteration() == 12, unit
        assert run.last_iteration(7, 36, 576) == 12, unit
        assert (run.planned_samples, run.samples(7, 36, 576)) == (100, 100), unit
    assert RunLength(sizes, 16, train_samples=99).last_iteration() == 11
    assert RunLength(sizes, 16, train_tokens=1584).last_iteration() == 12
    assert RunLength(sizes, 16, train_samples=90).last_iteration(12, 100, 1600) == 11  # behind it


def test_a_long_rampup_is_counted_at_once():
    """Of 10^10 samples: by phases, not by steps."""
    sizes = BatchSizes(1536, (16, 16, 10**10))
    assert sizes.num_batches(0, 10**10) == pytest.approx(
        sum(10**10 / 95 / size for size in range(16, 1536, 16)), rel=1e-6
    )
