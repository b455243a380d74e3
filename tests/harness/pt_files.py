"""Changed .pt files for tests, in the form in which they were written."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.live_memory import LiveMemory
from megatron.checkpoint.snapshot import file_to_write
from megatron.ucp.save_job import write_files


def save_again(content: Any, path: Path) -> None:
    """So that what is in the file differs and its size does not: torch.save lays a file out otherwise than a save of
    ours does."""
    with zipfile.ZipFile(path) as file:
        names = [name for name in file.namelist() if name.endswith("/.data/serialization_id")]
        is_ours = any(file.read(name) == b"0" * 40 for name in names)
    if is_ours:
        memory = LiveMemory()
        write_files([file_to_write(path.name, content, memory)], path.parent, memory)
    else:
        torch.save(content, path)
