"""DeepSpeed's own save of an engine: its files, without waiting for ever where one rank cannot write.

write_engine_files(engine, Path("runs/a"), "global_step100.tmp", {"iteration": 100}, deals_experts=False)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deepspeed.checkpoint.constants import (
    AUTOEP_LAYERS_KEY,
    AUTOEP_ZERO3_EXPERT_STATE_FORMAT_KEY,
    AUTOEP_ZERO3_PARTITIONED_EXPERT_STATE_FORMAT,
)

from megatron.engine.protocols import Engine
from megatron.ucp.disk import disk_errors


def write_engine_files(
    engine: Engine, folder: Path, tag: str, client_state: Mapping[str, Any], *, deals_experts: bool
) -> None:
    """Into `folder`/`tag`. Collective over the world. Raises this rank's first error, when all ranks are through.
    `deals_experts`: the ranks of an expert-parallel group hold different experts."""
    warning = _warning_of_dealt_experts() if deals_experts and engine.zero_optimization_stage() == 3 else {}
    with deferred_write_errors(engine):
        engine.save_checkpoint(str(folder), tag=tag, client_state={**client_state, **warning}, save_latest=False)


@contextlib.contextmanager
def deferred_write_errors(engine: Engine) -> Iterator[None]:
    """DeepSpeed writes files between barriers: a rank that raised there would leave the others waiting in the next
    one. So a rank goes on after an error of its own, and raises when it is through."""
    write = engine.checkpoint_engine.save
    errors: list[Exception] = []

    def save(state_dict: Any, path: str, **kwargs: Any) -> Any:
        try:
            with disk_errors(path):
                return write(state_dict, path, **kwargs)
        except Exception as error:
            errors.append(error)
            return None

    engine.checkpoint_engine.save = save
    try:
        yield
    finally:
        engine.checkpoint_engine.save = write
    if errors:
        raise errors[0]


def _warning_of_dealt_experts() -> dict[str, Any]:
    """ZeRO-3's conversion in DeepSpeed would put pieces of several ep ranks' experts one after the other. It knows of
    such experts by this list of its own (utils/zero_to_fp32.py, checkpoint/ds_to_universal.py), and stops."""
    return {AUTOEP_LAYERS_KEY: [{AUTOEP_ZERO3_EXPERT_STATE_FORMAT_KEY: AUTOEP_ZERO3_PARTITIONED_EXPERT_STATE_FORMAT}]}
