"""DeepSpeed's own save of an engine: its files, summed while they are written, and without waiting for ever where one
rank cannot write.

written = write_engine_files(engine, Path("runs/a"), "global_step100.tmp", {"iteration": 100}, deals_experts=False)
written["zero_pp_rank_0_mp_rank_00_optim_states.pt"].crc32
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
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from megatron.engine.protocols import Engine
from megatron.ucp.disk import disk_errors
from megatron.ucp.manifest import FileInfo
from megatron.ucp.output_file import SummedFile


def write_engine_files(
    engine: Engine, folder: Path, tag: str, client_state: Mapping[str, Any], *, deals_experts: bool
) -> dict[str, FileInfo]:
    """Into `folder`/`tag`. Returns what this rank wrote, by name. Collective over the world. Raises this rank's first
    error, when all ranks are through. `deals_experts`: the ranks of an expert-parallel group hold different experts."""
    warning = _warning_of_dealt_experts() if deals_experts and engine.zero_optimization_stage() == 3 else {}
    with summed_writes(engine, folder / tag) as written:
        engine.save_checkpoint(str(folder), tag=tag, client_state={**client_state, **warning}, save_latest=False)
    return written


@contextlib.contextmanager
def summed_writes(engine: Engine, folder: Path) -> Iterator[dict[str, FileInfo]]:
    """Gives a table of what this rank writes into `folder` in the block, by relative path, as it is written: size and
    checksum come out of the writing. Nothing of what a checkpoint engine other than torch's writes.

    DeepSpeed writes files between barriers: a rank that raised there would leave the others waiting in the next one. So
    a rank goes on after an error of its own, and raises when it is through."""
    write = engine.checkpoint_engine.save
    is_torch = type(engine.checkpoint_engine) is TorchCheckpointEngine
    written: dict[str, FileInfo] = {}
    errors: list[Exception] = []

    def save(state_dict: Any, path: str, **kwargs: Any) -> Any:
        try:
            with disk_errors(path):
                if not is_torch or not Path(path).is_relative_to(folder):
                    return write(state_dict, path, **kwargs)
                # torch.save takes a file as well as a path, and writes it front to back.
                with SummedFile(Path(path)) as file:
                    write(state_dict, file, **kwargs)
                written[Path(path).relative_to(folder).as_posix()] = file.info
                return None
        except Exception as error:
            errors.append(error)
            return None

    engine.checkpoint_engine.save = save
    try:
        yield written
    finally:
        engine.checkpoint_engine.save = write
    if errors:
        raise errors[0]


def _warning_of_dealt_experts() -> dict[str, Any]:
    """ZeRO-3's conversion in DeepSpeed would put pieces of several ep ranks' experts one after the other. It knows of
    such experts by this list of its own (utils/zero_to_fp32.py, checkpoint/ds_to_universal.py), and stops."""
    return {AUTOEP_LAYERS_KEY: [{AUTOEP_ZERO3_EXPERT_STATE_FORMAT_KEY: AUTOEP_ZERO3_PARTITIONED_EXPERT_STATE_FORMAT}]}
