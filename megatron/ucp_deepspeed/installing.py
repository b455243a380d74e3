"""What `install()` replaces: methods of DeepSpeed's engine, on the class, so that engines that exist already have them,
and what Hugging Face's Trainer does about checkpoints (trainer.py), if it is imported.

Before anything is replaced, every name of DeepSpeed's that we depend on is looked for: another version is refused.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from megatron.checkpoint.errors import CheckpointError, on_rank_0
from megatron.engine.deepspeed_names import require_names
from megatron.ucp.pointers import LATEST, read_pointer
from megatron.ucp_deepspeed.engine_view import left_to_deepspeed
from megatron.ucp_deepspeed.loading import LoadArguments, load
from megatron.ucp_deepspeed.replacing import Replaced, Replacement
from megatron.ucp_deepspeed.saving import save
from megatron.ucp_deepspeed.trainer import trainer_replacements

log = logging.getLogger(__name__)
_log_of_all = logging.getLogger("megatron")
_handler = logging.StreamHandler()

_replaced = Replaced()


def install() -> None:
    """A second call does nothing. Raises DeepSpeedChangedError, with nothing replaced, for a DeepSpeed whose names are
    not those that we know."""
    if _replaced:
        return
    require_names()
    _replaced.add(
        [
            Replacement(DeepSpeedEngine, "load_checkpoint", _loading),
            Replacement(DeepSpeedEngine, "save_checkpoint", _saving),
        ]
    )
    _replaced.when_imported("transformers.trainer", trainer_replacements)
    _show_what_is_said()


def uninstall() -> None:
    """What was there before, again."""
    _replaced.undo()
    _log_of_all.removeHandler(_handler)


class _Rank0(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _show_what_is_said() -> None:
    """On rank 0's standard error, where the program has not set up logging for us itself."""
    if _log_of_all.hasHandlers():
        return
    _handler.setFormatter(logging.Formatter("[%(asctime)s] [ucp] %(message)s", datefmt="%H:%M:%S"))
    _handler.addFilter(_Rank0())
    _log_of_all.addHandler(_handler)
    _log_of_all.setLevel(logging.INFO)


def _loading(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def load_checkpoint(
        self,
        load_dir,
        tag=None,
        load_module_strict=True,
        load_optimizer_states=True,
        load_lr_scheduler_states=True,
        load_module_only=False,
        custom_load_fn=None,
    ):
        reason = left_to_deepspeed(self)
        if self.load_universal_checkpoint():
            reason = "its configuration asks for DeepSpeed's universal checkpoint"
        elif custom_load_fn is not None:
            reason = "the program loads the weights itself (custom_load_fn)"
        folder = None if reason else on_rank_0(lambda: _folder(Path(load_dir), tag))
        if folder is None:
            if reason:
                log.info("%s is loaded by DeepSpeed alone: %s", load_dir, reason)
            return stock(
                self,
                load_dir,
                tag=tag,
                load_module_strict=load_module_strict,
                load_optimizer_states=load_optimizer_states,
                load_lr_scheduler_states=load_lr_scheduler_states,
                load_module_only=load_module_only,
                custom_load_fn=custom_load_fn,
            )
        wanted = LoadArguments(load_module_strict, load_optimizer_states, load_lr_scheduler_states, load_module_only)
        return load(self, folder, wanted)

    return load_checkpoint


def _folder(load_dir: Path, tag: str | None) -> Path | None:
    """None where nothing says which checkpoint is meant, which DeepSpeed answers with (None, None). Raises
    CheckpointError for a pointer that leads nowhere."""
    if tag is not None:
        return load_dir / str(tag)
    pointer = read_pointer(load_dir, LATEST)
    if pointer.fault:
        raise CheckpointError(f"{load_dir / LATEST}: {pointer.fault}")
    return pointer.folder


def _saving(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def save_checkpoint(self, save_dir, tag=None, client_state=None, save_latest=True, exclude_frozen_parameters=False):
        def write(to: str, points: bool) -> Any:
            return stock(
                self,
                save_dir,
                tag=to,
                client_state=client_state or {},
                save_latest=points,
                exclude_frozen_parameters=exclude_frozen_parameters,
            )

        reason = left_to_deepspeed(self)
        if self.checkpoint_engine.is_decoupled():
            reason = "its checkpoint engine writes later, by itself"
        elif self.use_node_local_storage():
            reason = "each node keeps its own files (use_node_local_storage)"
        if reason or not save_dir:
            log.info("%s is saved by DeepSpeed alone: %s", save_dir, reason)
            return write(tag, save_latest)
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        save(self, write, Path(save_dir), tag, exclude_frozen=exclude_frozen_parameters, save_latest=save_latest)
        return True

    return save_checkpoint
