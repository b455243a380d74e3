"""Which checkpoints of a run stay: the last ones, and every so many iterations one.

    keep = Keep(last=3, every=1000)
    removed = keep.thin_out(Path("runs/a"), newest=5200)            # after the save of iteration 5200 is durable

What is removed is a native checkpoint of an earlier iteration, committed under the name of its iteration, that no
pointer names. One that was found damaged is never removed, nor what is newer than the save that has just been made:
that is of a branch that the run has left, and a person's to judge.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron.ucp.commit import damage_of, remove_checkpoint
from megatron.ucp.errors import UcpError
from megatron.ucp.manifest import MANIFEST_NAME, read_manifest
from megatron.ucp.pointers import POINTERS, read_pointer

_NAME = re.compile(r"global_step(\d{1,18})")


@dataclass(frozen=True)
class Keep:
    """`last`: how many of the newest; None keeps all. `every`: of which iterations one stays for good."""

    last: int | None = None
    every: int | None = None

    def superseded(self, run_folder: Path, newest: int) -> list[Path]:
        """What `thin_out` would remove, oldest first."""
        if self.last is None:
            return []
        named = {read_pointer(run_folder, pointer).named for pointer in POINTERS}
        there: list[tuple[int, Path]] = []
        for folder in run_folder.iterdir():
            match = _NAME.fullmatch(folder.name)
            if match and int(match[1]) <= newest and (folder / MANIFEST_NAME).is_file() and not folder.is_symlink():
                there.append((int(match[1]), folder))
        found = []
        for iteration, folder in sorted(there)[: -self.last]:
            is_for_good = self.every is not None and iteration % self.every == 0
            if not is_for_good and folder.name not in named and not damage_of(folder) and _is_of(folder, iteration):
                found.append(folder)
        return found

    def thin_out(self, run_folder: Path, newest: int) -> list[str]:
        """Removes them; returns their names, and one line for each that could not be removed."""
        told = []
        for folder in self.superseded(run_folder, newest):
            try:
                remove_checkpoint(folder)
                told.append(folder.name)
            except (OSError, UcpError) as error:
                told.append(f"not {folder.name}, which could not be removed: {error}")
        return told


def _is_of(folder: Path, iteration: int) -> bool:
    """A native save that says so itself."""
    try:
        manifest = read_manifest(folder)
    except (UcpError, OSError):
        return False
    return manifest.kind == "native" and manifest.iteration == iteration
