"""What DeepSpeed saves of an engine, given to whoever writes it: at once, or later from a copy.

    def take(name: str, content: dict) -> None: ...
    take_engine_files(
        engine, Path("runs/a"), "global_step7.tmp", {"iteration": 7}, take, deals_experts=False, excludes_frozen=False
    )

DeepSpeed asks its checkpoint engine to write each file; for the time of a save that is ours. No rank waits for ever
where another one cannot write.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deepspeed.checkpoint.constants import (
    AUTOEP_LAYERS_KEY,
    AUTOEP_ZERO3_EXPERT_STATE_FORMAT_KEY,
    AUTOEP_ZERO3_PARTITIONED_EXPERT_STATE_FORMAT,
)
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from megatron.engine.protocols import Engine
from megatron.ucp.disk import disk_errors

Take = Callable[[str, Any], None]
"""(name relative to the checkpoint's folder, content): what torch.save would have been given."""


def take_engine_files(
    engine: Engine,
    folder: Path,
    tag: str,
    client_state: Mapping[str, Any],
    take: Take,
    *,
    deals_experts: bool,
    excludes_frozen: bool,
) -> None:
    """Of `folder`/`tag`, which is made. Collective over the world. Raises this rank's first error, when all ranks are
    through. `deals_experts`: the ranks of an expert-parallel group hold different experts; `excludes_frozen`: without
    the weights that are not trained."""
    warning = _warning_of_dealt_experts() if deals_experts and engine.zero_optimization_stage() == 3 else {}
    with taken_files(engine, folder / tag, take):
        engine.save_checkpoint(
            str(folder),
            tag=tag,
            client_state={**client_state, **warning},
            save_latest=False,
            exclude_frozen_parameters=excludes_frozen,
        )


@contextlib.contextmanager
def taken_files(engine: Engine, folder: Path, take: Take) -> Iterator[None]:
    """What DeepSpeed has written into `folder` in the block goes to `take` instead. What a checkpoint engine other
    than torch's writes, it writes itself.

    DeepSpeed writes files between barriers: a rank that raised there would leave the others waiting in the next one. So
    a rank goes on after an error of its own, and raises when it is through."""
    before = engine.checkpoint_engine
    taking = _Taking(before, folder, take)
    if type(before) is TorchCheckpointEngine:
        engine.checkpoint_engine = taking
    else:  # whose other methods are its own business
        before.save, write = taking.save, before.save
        taking.write = write
    try:
        yield
    finally:
        if engine.checkpoint_engine is taking:
            engine.checkpoint_engine = before
        else:
            before.save = taking.write
    if taking.errors:
        raise taking.errors[0]


class _Taking(CheckpointEngine):
    def __init__(self, before: CheckpointEngine, folder: Path, take: Take):
        self._before, self._folder, self._take = before, folder, take
        self.write: Callable[..., Any] = before.save
        self.errors: list[Exception] = []

    def save(self, state_dict: Any, path: str, **kwargs: Any) -> Any:
        try:
            with disk_errors(path):
                if type(self._before) is not TorchCheckpointEngine or not Path(path).is_relative_to(self._folder):
                    return self.write(state_dict, path, **kwargs)
                return self._take(Path(path).relative_to(self._folder).as_posix(), state_dict)
        except Exception as error:
            self.errors.append(error)
            return None

    def preserves_storage_sharing(self) -> bool:
        """Elements are written, not the storages they are views of: DeepSpeed need not clone them first."""
        return False

    def create(self, info: Any) -> Any:
        return self._before.create(info)

    def load(self, path: str, map_location: Any = None) -> Any:
        return self._before.load(path, map_location)

    def commit(self, info: Any) -> Any:
        return self._before.commit(info)


def _warning_of_dealt_experts() -> dict[str, Any]:
    """ZeRO-3's conversion in DeepSpeed would put pieces of several ep ranks' experts one after the other. It knows of
    such experts by this list of its own (utils/zero_to_fp32.py, checkpoint/ds_to_universal.py), and stops."""
    return {AUTOEP_LAYERS_KEY: [{AUTOEP_ZERO3_EXPERT_STATE_FORMAT_KEY: AUTOEP_ZERO3_PARTITIONED_EXPERT_STATE_FORMAT}]}
