"""Changed .pt files for tests, in the form in which they were written."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch


def save_again(content: Any, path: Path) -> None:
    """So that what is in the file differs and its size does not: torch.save lays a file out otherwise where it is given
    an open one, as a save of ours gives it, than where it is given a path."""
    with zipfile.ZipFile(path) as file:
        is_to_open_file = file.namelist()[0].split("/")[0] == "archive"
    if is_to_open_file:
        with open(path, "wb") as opened:
            torch.save(content, opened)
    else:
        torch.save(content, path)
