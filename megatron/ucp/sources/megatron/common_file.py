"""What a torch_dist folder has beside its tensors: `metadata.json`, and `common.pt` with `args`, counters, schedule and
the optimizer's groups.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.ucp.errors import CorruptFileError, UnsupportedCheckpointError
from megatron.ucp.ordinary_file import read_content
from megatron.ucp.safe_paths import existing_file, open_file
from megatron.ucp.sources.dcp.metadata import METADATA

_COMMON, _FORMAT = "common.pt", "metadata.json"
_MAX_JSON = 1 << 20


def is_core(folder: Path) -> bool:
    return (folder / METADATA).is_file() and (folder / _COMMON).is_file()


def read_common(folder: Path) -> Mapping[str, Any]:
    """`args` is in it. Raises UnsupportedCheckpointError for another format or without `args`, and what reading a .pt
    file raises."""
    _require_format(folder)
    common = read_content(existing_file(folder, _COMMON))
    if not isinstance(common, Mapping) or not isinstance(common.get("args"), argparse.Namespace):
        raise UnsupportedCheckpointError(
            f"{_COMMON} has no args, which say of which model the checkpoint is",
            found=list(common)[:20] if isinstance(common, Mapping) else type(common).__name__,
            where=folder,
            do="save it with Megatron-LM's pretrain_gpt.py",
        )
    return common


def _require_format(folder: Path) -> None:
    try:
        with open_file(folder, _FORMAT) as file:
            told = json.loads(file.read(_MAX_JSON))
    except ValueError as error:
        raise CorruptFileError(f"not readable as JSON ({error})"[:200], where=folder / _FORMAT) from error
    backend = told.get("sharded_backend") if isinstance(told, dict) else None
    if backend != "torch_dist":
        raise UnsupportedCheckpointError(
            "a format of Megatron-Core's that is not read here",
            found=f"sharded_backend {backend!r}"[:100],
            expected="torch_dist",
            where=folder,
            do="save it with --dist-ckpt-format torch_dist, or convert it with Megatron-LM",
        )
