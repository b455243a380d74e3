"""Files that a Source has beside its tensors, such as random streams: they come along as they are.

infos = copy_other_files(source, staging)
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron.ucp.commit import checksum_file
from megatron.ucp.manifest import FileInfo
from megatron.ucp.sources.source import Source


def copy_other_files(source: Source, folder: Path) -> dict[str, FileInfo]:
    """Size and checksum of each, by relative path. Raises OSError."""
    infos = {}
    for relative, path in source.other_files().items():
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / relative)
        infos[relative] = checksum_file(folder / relative)
    return infos
