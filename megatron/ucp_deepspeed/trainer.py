"""Hugging Face's Trainer, where a resume under another number of ranks needs more than the engine's state.

* The newest *whole* checkpoint is taken: a machine that dies while it saves leaves one that has no trainer_state.json,
  or a tag's folder that is not committed.
* A step goes on seeing as many samples as before: Trainer skips batches of this run's size, so the global batch is
  kept, by gradient accumulation, or the resume is refused.
* Random states are per rank, and there may be more or fewer ranks now.

Sources: transformers/trainer.py (train, _load_rng_state, _save_rng_state), trainer_utils.py (get_last_checkpoint).
"""

from __future__ import annotations

import functools
import logging
import random
import re
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.ucp.errors import UcpError
from megatron.ucp.file_table import require_sizes
from megatron.ucp.manifest import MANIFEST_NAME, read_manifest
from megatron.ucp.pointers import LATEST
from megatron.ucp.safe_load import load as load_file
from megatron.ucp.sources import find_checkpoint, open_source
from megatron.ucp.sources.deepspeed_files import list_files
from megatron.ucp_deepspeed.replacing import Replacement

log = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,18})")
_RNG_FILE = re.compile(r"rng_state_([0-9]{1,9})\.pth")


def trainer_replacements(trainer: ModuleType) -> list[Replacement]:
    """`trainer`: the module transformers.trainer."""
    return [
        Replacement(trainer, "get_last_checkpoint", lambda _: last_whole_checkpoint),
        Replacement(sys.modules["transformers.trainer_utils"], "get_last_checkpoint", lambda _: last_whole_checkpoint),
        Replacement(trainer.Trainer, "train", _training),
        Replacement(trainer.Trainer, "_load_rng_state", _loading_rng_state),
    ]


def last_whole_checkpoint(folder: str, needs_deepspeed: bool = False) -> str | None:
    """As transformers' get_last_checkpoint, passing over what is not whole, and telling of it. Not `needs_deepspeed`:
    one that has none of DeepSpeed's files will do."""
    numbered = [(int(m[1]), path) for path in Path(folder).iterdir() if (m := _CHECKPOINT.fullmatch(path.name))]
    for _, path in sorted(numbered, reverse=True):
        if fault := _not_whole(path, needs_deepspeed):
            log.warning("warning: %s is passed over: %s", path, fault)
        else:
            return str(path)
    return None


def _not_whole(folder: Path, needs_deepspeed: bool) -> str | None:
    if not (folder / "trainer_state.json").is_file():
        return "it has no trainer_state.json, which Trainer writes last"
    if not needs_deepspeed and not (folder / LATEST).exists() and not any(folder.glob("global_step*")):
        return None
    try:
        found = find_checkpoint(folder)
        if (found / MANIFEST_NAME).is_file():
            require_sizes(found, read_manifest(found))
        else:
            open_source(found)
    except UcpError as error:
        return str(error)
    return None


# -- the global batch ------------------------------------------------------------------------------------------------


def _training(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint is True and self.is_deepspeed_enabled:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir, needs_deepspeed=True)
            if resume_from_checkpoint is None:
                raise ValueError(f"there is no whole checkpoint in {self.args.output_dir}: start without resuming")
        if resume_from_checkpoint and self.is_deepspeed_enabled:
            _keep_global_batch(self, Path(resume_from_checkpoint))
        return stock(self, resume_from_checkpoint, *args, **kwargs)

    return train


def _keep_global_batch(trainer: Any, checkpoint: Path) -> None:
    """Local; the same on every rank."""
    args, saved = trainer.args, _global_batch_of(checkpoint)
    of_micro_step = args.per_device_train_batch_size * args.world_size
    if saved is None or saved == of_micro_step * args.gradient_accumulation_steps:
        return
    num_steps, rest = divmod(saved, of_micro_step)
    if rest:
        raise CheckpointError(
            f"{checkpoint} was trained with {saved} samples a step, which {args.world_size} ranks with "
            f"per_device_train_batch_size {args.per_device_train_batch_size} cannot make up of whole batches: samples "
            "would be seen twice or not at all. Choose another number of ranks, or a per_device_train_batch_size that "
            f"divides {saved / args.world_size:g}."
        )
    log.warning(
        "gradient_accumulation_steps is %d here, not %d: a step goes on seeing %d samples, on %d ranks",
        num_steps,
        args.gradient_accumulation_steps,
        saved,
        args.world_size,
    )
    args.gradient_accumulation_steps = num_steps
    trainer.accelerator.gradient_accumulation_steps = num_steps
    plugin = trainer.accelerator.state.deepspeed_plugin
    for config in (plugin.deepspeed_config, plugin.hf_ds_config.config):
        config["gradient_accumulation_steps"], config["train_batch_size"] = num_steps, saved


def _global_batch_of(checkpoint: Path) -> int | None:
    """None where neither ucp.json nor the model states say it."""
    folder = find_checkpoint(checkpoint)
    if (folder / MANIFEST_NAME).is_file():
        said = read_manifest(folder).common.get("global_batch_size")
    else:
        config = load_file(min(list_files(folder).models.values())).get("ds_config")
        said = config.get("train_batch_size") if isinstance(config, dict) else None
    return said if isinstance(said, int) and said > 0 else None


# -- random states ---------------------------------------------------------------------------------------------------


def _loading_rng_state(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def _load_rng_state(self, checkpoint):
        if checkpoint is None:
            return
        rank, world_size = self.args.process_index, self.args.world_size
        states = _rng_files(Path(checkpoint))
        if not states or len(states) == world_size:
            stock(self, checkpoint)
            return
        name = f"rng_state_{rank}.pth" if world_size > 1 else "rng_state.pth"
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / name).symlink_to(states[rank % len(states)].resolve())
            stock(self, folder)
        if rank >= len(states):  # that state is another rank's too: this one goes on from a seed made of both
            seed = zlib.crc32(torch.random.get_rng_state().numpy().tobytes(), rank)
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        log.info("the checkpoint has random states of %d ranks, for %d here", len(states), world_size)

    return _load_rng_state


def _rng_files(checkpoint: Path) -> list[Path]:
    """By rank."""
    if (whole := checkpoint / "rng_state.pth").is_file():
        return [whole]
    by_rank = {int(m[1]): path for path in checkpoint.iterdir() if (m := _RNG_FILE.fullmatch(path.name))}
    return [by_rank[rank] for rank in range(len(by_rank))] if set(by_rank) == set(range(len(by_rank))) else []
