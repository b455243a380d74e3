"""Is this still the folder that was opened? A save may replace a checkpoint while it is read.

The identity of a checkpoint is its folder (device and inode) with the bytes of its ucp.json; without one,
the table of its files. It is taken before anything is read and compared when all was read, so that nothing that mixes
two saves is ever used.

    identity = Identity.of(folder)
    ...                                     # read
    identity.require_unchanged()            # raises ChangedWhileReadError
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from megatron.ucp.errors import ChangedWhileReadError
from megatron.ucp.manifest import MANIFEST_NAME, read_manifest_bytes


@dataclass(frozen=True)
class Identity:
    folder: Path
    inode: tuple[int, int]
    manifest: str
    """SHA-256 of ucp.json; empty without one."""
    files: tuple[tuple[str, int, int, int], ...] = ()
    """Of a folder without ucp.json: path, inode, bytes, time of the last change in ns."""

    @classmethod
    def of(cls, folder: str | Path) -> Identity:
        """Raises what reading ucp.json raises."""
        folder = Path(folder)
        status = os.stat(folder)
        if os.path.lexists(folder / MANIFEST_NAME):
            digest = hashlib.sha256(read_manifest_bytes(folder)).hexdigest()
            return cls(folder, (status.st_dev, status.st_ino), digest)
        return cls(folder, (status.st_dev, status.st_ino), "", tuple(sorted(_table(folder))))

    def require_unchanged(self) -> None:
        """Raises ChangedWhileReadError."""
        try:
            now = Identity.of(self.folder)
        except OSError as error:
            raise self._error(f"it is gone ({error.strerror})") from error
        if now.inode != self.inode:
            raise self._error("another folder stands there now")
        if now.manifest != self.manifest:
            raise self._error(f"its {MANIFEST_NAME} is another")
        if now.files != self.files:
            changed = sorted({entry[0] for entry in set(now.files) ^ set(self.files)})
            raise self._error(f"files changed: {', '.join(changed[:8])}")

    def _error(self, found: str) -> ChangedWhileReadError:
        return ChangedWhileReadError(
            "the checkpoint was replaced or changed while it was read",
            found=found,
            where=self.folder,
            do="run it again; to keep one checkpoint while a run goes on saving, copy the folder first",
        )


def _table(folder: Path):
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            with contextlib.suppress(FileNotFoundError):  # gone since it was listed: the next table tells
                status = os.lstat(path)
                yield os.path.relpath(path, folder), status.st_ino, status.st_size, status.st_mtime_ns
