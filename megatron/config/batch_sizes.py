"""The global batch size of every step: constant, or rising with the samples that were consumed.

The size follows from the samples alone, so a run that goes on in the middle of its ramp-up, under
whatever parallelism, takes the batches that the run before it would have taken.

    sizes = BatchSizes(32, rampup=(8, 8, 600))     # 8, 16, 24 for 200 samples each, then 32
    sizes.at(consumed_samples)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSizes:
    final: int
    rampup: tuple[int, ...] | None = None
    """(first size, increment, samples until the final one), as Megatron's --rampup-batch-size
    (core/num_microbatches_calculator.py): every size but the final one has an equal share of the samples."""

    def at(self, samples: int) -> int:
        """Of the step after `samples` have been consumed."""
        if self.rampup is None or samples > self.rampup[2] or self._num_increments == 0:
            return self.final
        start, increment, _ = self.rampup
        return min(self.final, start + int(samples / self._samples_per_size) * increment)

    def phases(self, samples: int) -> Iterator[tuple[int, int | None]]:
        """(batch size, how many batches of it follow) from `samples` on; None stands for all others. Sizes may be
        told in several parts."""
        while (size := self.at(samples)) < self.final:
            start, increment, _ = self.rampup or (size, 1, 0)
            until = ((size - start) // increment + 1) * self._samples_per_size
            num_batches = max(1, int((until - samples) // size))
            yield size, num_batches
            samples += size * num_batches
        yield self.final, None

    def num_batches(self, samples: int, end: int, is_last_begun: bool = False) -> int:
        """Of the steps from `samples` to `end`, negative where that is passed. A batch that is not full counts only
        if `is_last_begun`."""
        count = 0
        for size, available in self.phases(samples):
            missing = -((samples - end) // size) if is_last_begun else (end - samples) // size
            if available is None or missing <= available:
                return count + missing
            count += available
            samples += size * available
        raise AssertionError("the last phase has no end")

    def samples_after(self, samples: int, num_batches: int) -> int:
        """What has been consumed when `num_batches` more steps are done."""
        for size, available in self.phases(samples):
            taken = num_batches if available is None else min(num_batches, available)
            samples += size * taken
            num_batches -= taken
            if not num_batches:
                break
        return samples

    def to_come(self, samples: int) -> list[int]:
        """Every size from `samples` on, rising."""
        return sorted({size for size, _ in self.phases(samples)})

    @property
    def _num_increments(self) -> int:
        start, increment, _ = self.rampup or (self.final, 1, 0)
        return (self.final - start) // increment

    @property
    def _samples_per_size(self) -> float:
        return self.rampup[2] / self._num_increments if self.rampup else 0.0
