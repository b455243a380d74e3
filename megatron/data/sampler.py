"""Which samples this rank reads next, from nothing but the number of samples consumed so far.

The samples stand in one line. A micro step takes the next micro_batch_size * dp_size of it, and
data-parallel rank r the r-th piece. So global batch k is samples [k * gbs, (k + 1) * gbs) whatever dp_size and
micro_batch_size are, and a run resumed under others goes on exactly where the line was left.

    for indices in SampleIndexer(len(train), consumed_samples, micro_batch_size, dp_rank, dp_size):
        ...      # this rank's micro batch: micro_batch_size indices into the dataset

dp_size 2, micro batch 2, accumulation 2 (gbs 8):   0 1 | 2 3 | 4 5 | 6 7      rank 0 reads 0 1, then 4 5
dp_size 4, micro batch 2, no accumulation (gbs 8):  0 1 | 2 3 | 4 5 | 6 7      rank 2 reads 4 5
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.data.errors import SamplerError


@dataclass(frozen=True)
class SampleIndexer:
    """Iterates over this rank's micro batches as lists of dataset indices; ends before an incomplete step."""

    num_samples: int
    """Samples in the line: len(dataset), or fewer."""
    consumed_samples: int
    """Samples before this point were seen, by all ranks together."""
    micro_batch_size: int
    dp_rank: int
    dp_size: int

    def __post_init__(self) -> None:
        problems = [
            (self.micro_batch_size >= 1, f"micro_batch_size {self.micro_batch_size}", "at least 1"),
            (self.dp_size >= 1, f"dp_size {self.dp_size}", "at least 1"),
            (0 <= self.dp_rank < self.dp_size, f"dp_rank {self.dp_rank}", f"0 to {self.dp_size - 1}"),
            (self.consumed_samples >= 0, f"consumed_samples {self.consumed_samples}", "0 or more"),
        ]
        for is_right, found, expected in problems:
            if not is_right:
                raise SamplerError("the samples cannot be dealt out", found=found, expected=expected)
        if self.consumed_samples >= self.num_samples:
            raise SamplerError(
                "no samples are left",
                found=f"{self.consumed_samples} consumed of {self.num_samples}",
                expected="fewer consumed than there are",
                do="train for more iterations (--train-iters, --train-samples), or start afresh without --load",
            )

    @property
    def samples_per_step(self) -> int:
        """Samples that one micro step takes on all ranks together."""
        return self.micro_batch_size * self.dp_size

    def __len__(self) -> int:
        """Micro steps left."""
        return (self.num_samples - self.consumed_samples) // self.samples_per_step

    def __iter__(self) -> Iterator[list[int]]:
        first = self.consumed_samples + self.dp_rank * self.micro_batch_size
        for step in range(len(self)):
            start = first + step * self.samples_per_step
            yield list(range(start, start + self.micro_batch_size))
