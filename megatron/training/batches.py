"""Micro batches for this rank, in an order that depends on nothing but the seed and the samples consumed.

batches = Batches(config, context, eod=tokenizer.eod, start=Progress())     # builds or opens the index caches
for batch in batches.train(progress.consumed_train_samples): ...   # {"tokens", "labels", "loss_mask"}, [b, s / sp]
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from megatron.checkpoint.progress import Progress
from megatron.config.config import Config
from megatron.data.blending import BlendedDataset
from megatron.data.gpt_dataset import GPTDataset, build_datasets, order_crc32, without_token
from megatron.data.loader import Collator, build_loader
from megatron.data.sampler import SampleIndexer
from megatron.parallel.context import ParallelContext
from megatron.training.stop_signal import without_signals

log = logging.getLogger(__name__)


class Batches:
    """The three splits. Every rank builds the same; construction is local (the index cache is race-safe)."""

    def __init__(self, config: Config, context: ParallelContext, eod: int, start: Progress) -> None:
        self.context = context
        self.micro_batch_size = config.run.micro_batch_size
        self.samples_per_evaluation = max(1, config.run.eval_iters * config.run.global_batch_size)
        self.num_workers = config.data.num_workers
        self.kept_from_workers = [config.run.exit_signal] if config.run.exit_signal_handler else []
        self.collate = Collator(eod=eod, eod_mask_loss=config.data.eod_mask_loss)
        self._order_flags = {
            # Names, not paths: where the files lie on this machine does not matter.
            "data_path": [word for e in config.data.blend for word in (f"{e.weight:g}", Path(e.prefix).name)],
            "split": config.data.split,
            "seed": config.run.seed,
            "seq_length": config.model.seq_length,
        }
        self.train_set, self.valid_set, self.test_set = build_datasets(
            config.data.data_path,
            split=config.data.split,
            seq_length=config.model.seq_length,
            seed=config.run.seed,
            num_samples=_samples_needed(config, start),
            cache_dir=config.data.data_cache_path,
            vocab_size=config.model.vocab_size,
        )
        if config.data.eod_mask_loss and (prefixes := without_token(config.data.data_path, eod)):
            log.warning(
                "warning: --eod-mask-loss masks nothing in %s: the tokenizer's end-of-document id %d was not found "
                "there. Was the data made with another tokenizer, or without --append-eod?",
                ", ".join(prefixes),
                eod,
            )

    def train_order(self) -> dict[str, Any]:
        """What a resumed run must have in common with its Source, for every sample to be seen once, in order."""
        return {**self._order_flags, "num_samples": len(self.train_set), "order_crc32": order_crc32(self.train_set)}

    def train(self, consumed_samples: int) -> Iterator[dict[str, torch.Tensor]]:
        return self._loader(self.train_set, consumed_samples)

    def valid(self, consumed_samples: int) -> Iterator[dict[str, torch.Tensor]] | None:
        """From the next evaluation's first sample on; None where --split leaves no validation part."""
        if self.valid_set is None:
            return None
        start = evaluation_start(consumed_samples, len(self.valid_set), self.samples_per_evaluation)
        return self._loader(self.valid_set, start)

    def test(self) -> Iterator[dict[str, torch.Tensor]] | None:
        """None where --split leaves no test part."""
        return None if self.test_set is None else self._loader(self.test_set, 0)

    def _loader(self, dataset: GPTDataset | BlendedDataset, consumed_samples: int) -> Iterator[dict[str, torch.Tensor]]:
        indexer = SampleIndexer(
            num_samples=len(dataset),
            consumed_samples=consumed_samples,
            micro_batch_size=self.micro_batch_size,
            dp_rank=self.context.dp_rank,
            dp_size=self.context.dp_size,
        )
        pin_memory = get_accelerator().device_name() != "cpu"
        with without_signals(self.kept_from_workers):
            loader = iter(build_loader(dataset, indexer, self.collate, self.num_workers, pin_memory))
        return loader if self.context.sp_size == 1 else map(self._chunk, loader)

    def _chunk(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's part of every sequence; the ranks of an sp group read the same samples."""
        context = self.context
        return {key: value.chunk(context.sp_size, dim=1)[context.sp_rank] for key, value in batch.items()}


def evaluation_start(consumed: int, available: int, size: int) -> int:
    """The first of the `size` samples of an evaluation after `consumed`, which may have been evaluations of another
    size: no sample is seen twice before all were. A run longer than it was planned to be begins anew."""
    start = consumed % max(size, available - available % size)
    return start if start + size <= available else 0


def _samples_needed(config: Config, start: Progress) -> tuple[int, int, int]:
    """(train, valid, test) samples of the whole run, as Megatron counts them. What lies behind a resumed run may have
    been taken in batches of another size."""
    run = config.run
    done = (start.iteration, start.consumed_train_samples, start.consumed_train_tokens)
    size = run.eval_iters * run.global_batch_size
    evaluations = config.length.last_iteration(*done) // run.eval_interval + 1
    still_to_come = evaluations - start.iteration // run.eval_interval
    valid = max(evaluations * size, start.consumed_valid_samples + still_to_come * size)
    return config.length.samples(*done), valid, size
