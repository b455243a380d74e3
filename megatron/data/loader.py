"""Samples to the tensors that a model takes.

Labels are the tokens moved by one, so a sample of s + 1 tokens gives s inputs and s labels.

    loader = build_loader(train, SampleIndexer(...), Collator())
    batch = next(iter(loader))      # {"tokens": [b, s] int64, "labels": [b, s] int64, "loss_mask": [b, s] fp32}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader

from megatron.data.sampler import SampleIndexer


@dataclass(frozen=True)
class Collator:
    """A list of dataset items to one batch on the CPU."""

    eod: int | None = None
    """End-of-document id; needed for eod_mask_loss only."""
    eod_mask_loss: bool = False
    """No loss where the input is end-of-document: what follows is another text (--eod-mask-loss)."""

    def __post_init__(self) -> None:
        if self.eod_mask_loss and self.eod is None:
            raise ValueError("eod_mask_loss needs eod, the id of the end-of-document token")

    def __call__(self, items: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        tokens_bs = torch.from_numpy(np.stack([item["tokens"] for item in items]))
        inputs_bs = tokens_bs[:, :-1].contiguous()
        loss_mask_bs = torch.ones(inputs_bs.shape, dtype=torch.float32)
        if self.eod_mask_loss:
            loss_mask_bs[inputs_bs == self.eod] = 0.0
        return {"tokens": inputs_bs, "labels": tokens_bs[:, 1:].contiguous(), "loss_mask": loss_mask_bs}


def build_loader(
    dataset, indexer: SampleIndexer, collator: Collator, num_workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """One batch per micro step of this rank, in the indexer's order, from `num_workers` processes."""
    return DataLoader(
        dataset,
        batch_sampler=indexer,
        collate_fn=collator,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Without one of its own, every new iterator would draw from the global generator, and a resumed run
        # would see other dropout masks than the run that never stopped.
        generator=torch.Generator(),
    )
