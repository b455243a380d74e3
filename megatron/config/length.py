"""How long a run is, counted in what was asked for: iterations, samples or tokens.

What is counted in samples stays in samples. A run that goes on with another batch size ends where the
samples end, not where an iteration number of the other batch size would be.

    length = config.length
    last = length.last_iteration(progress.iteration, progress.consumed_train_samples, progress.consumed_train_tokens)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.config.batch_sizes import BatchSizes


@dataclass(frozen=True)
class RunLength:
    batch_sizes: BatchSizes
    seq_length: int
    train_iters: int | None = None
    train_samples: int | None = None
    train_tokens: int | None = None

    def last_iteration(self, iteration: int = 0, samples: int = 0, tokens: int = 0) -> int:
        """The iteration at which a run that has come so far ends; it may be behind it. As in Megatron a batch that the
        samples do not fill is not trained on, and one that the tokens begin is."""
        if samples and not tokens:
            tokens = samples * self.seq_length  # a checkpoint of another program's counts samples at best
        limits = []
        if self.train_iters is not None:
            limits.append(self.train_iters)
        if self.train_samples is not None:
            limits.append(iteration + self.batch_sizes.num_batches(samples, self.train_samples))
        if self.train_tokens is not None:
            end = samples + math.ceil((self.train_tokens - tokens) / self.seq_length)
            limits.append(iteration + self.batch_sizes.num_batches(samples, end, is_last_begun=True))
        return min(limits)

    def samples(self, iteration: int = 0, samples: int = 0, tokens: int = 0) -> int:
        """Of the whole run, those behind included: what the data must reach to."""
        left = max(0, self.last_iteration(iteration, samples, tokens) - iteration)
        reached = self.batch_sizes.samples_after(samples, left)
        return reached if self.train_samples is None else max(reached, self.train_samples)

    @property
    def planned_samples(self) -> int:
        """What the schedule is made for: the same under every batch size, unless the length was given in iterations."""
        limits = []
        if self.train_iters is not None:
            limits.append(self.batch_sizes.samples_after(0, self.train_iters))
        if self.train_samples is not None:
            limits.append(self.train_samples)
        if self.train_tokens is not None:
            limits.append(math.ceil(self.train_tokens / self.seq_length))
        return min(limits)
