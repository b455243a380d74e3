"""Which checkpoints of a run stay: the last ones, and every so many iterations one.

    keep = Keep(last=3, every=1000, newest_verified=True)
    removed = keep.thin_out(Path("runs/a"), newest=5200)            # after the save of iteration 5200 is durable

What is removed is a native checkpoint of an earlier iteration, committed under the name of its iteration, that no
pointer names. One that was found damaged is never removed, nor what is newer than the save that has just been made:
that is of a branch that the run has left, and a person's to judge.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from megatron.ucp.commit import damage_of, mark_damaged, remove_checkpoint
from megatron.ucp.errors import UcpError
from megatron.ucp.file_table import file_faults
from megatron.ucp.manifest import MANIFEST_NAME, read_manifest
from megatron.ucp.pointers import POINTERS, read_pointer
from megatron.ucp.safe_paths import open_file

_NAME = re.compile(r"global_step(\d{1,18})")


@dataclass(frozen=True)
class Keep:
    """`last`: how many of the newest; None keeps all. `every`: of which iterations one stays for good.
    `newest_verified`: before any is removed the newest is read back, from the disk, and where it is not what was saved
    it is marked damaged and the one before is read; the first that is right stays, however old. One that cannot be read
    just now stays too, without a mark."""

    last: int | None = None
    every: int | None = None
    newest_verified: bool = False

    def superseded(self, run_folder: Path, newest: int) -> list[Path]:
        """What `thin_out` would remove, oldest first."""
        if self.last is None:
            return []
        named = {read_pointer(run_folder, pointer).named for pointer in POINTERS}
        found = []
        for iteration, folder in _saved(run_folder, newest)[: -self.last]:
            is_for_good = self.every is not None and iteration % self.every == 0
            if not is_for_good and folder.name not in named and not damage_of(folder) and _is_of(folder, iteration):
                found.append(folder)
        return found

    def thin_out(self, run_folder: Path, newest: int) -> list[str]:
        """Removes them; returns their names, and one line for each that could not be removed."""
        told: list[str] = []
        superseded = self.superseded(run_folder, newest)
        if superseded and self.newest_verified:
            spared = _until_verified(_saved(run_folder, newest), told)
            superseded = [folder for folder in superseded if folder not in spared]
        for folder in superseded:
            try:
                remove_checkpoint(folder)
                told.append(folder.name)
            except (OSError, UcpError) as error:
                told.append(f"not {folder.name}, which could not be removed: {error}")
        return told


def _saved(run_folder: Path, newest: int) -> list[tuple[int, Path]]:
    """(iteration, folder) of what is committed there up to `newest`, oldest first."""
    there: list[tuple[int, Path]] = []
    for folder in run_folder.iterdir():
        match = _NAME.fullmatch(folder.name)
        if match and int(match[1]) <= newest and (folder / MANIFEST_NAME).is_file() and not folder.is_symlink():
            there.append((int(match[1]), folder))
    return sorted(there)


def _until_verified(saved: list[tuple[int, Path]], told: list[str]) -> set[Path]:
    """What was read back, newest first, up to the first that is what was saved."""
    read: set[Path] = set()
    for iteration, folder in reversed(saved):
        if damage_of(folder) or not _is_of(folder, iteration):
            continue
        read.add(folder)
        try:
            faults = _read_back(folder)
        except OSError as error:  # of the disk or of this process, which may pass: nothing is known of what was saved
            told.append(f"not {folder.name}, which could not be read back: {error}")
            continue
        if not faults:
            break
        told.append(f"not {folder.name}, which is not what was saved, and is marked damaged: {faults[0]}")
        try:
            mark_damaged(folder, f"read back after a save: {'; '.join(faults)}")
        except OSError as error:
            told.append(f"not {folder.name}, which could not be marked: {error}")
    return read


def _read_back(folder: Path) -> list[str]:
    """What is wrong with it. What memory still has of its files is let go first, so that the disk is asked. Raises
    OSError."""
    try:
        manifest = read_manifest(folder)
        if hasattr(os, "posix_fadvise"):
            for name in manifest.files:
                with open_file(folder, name) as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return list(file_faults(folder, manifest, 1).values())
    except UcpError as error:
        return [str(error)]


def _is_of(folder: Path, iteration: int) -> bool:
    """A native save that says so itself."""
    try:
        manifest = read_manifest(folder)
    except (UcpError, OSError):
        return False
    return manifest.kind == "native" and manifest.iteration == iteration
