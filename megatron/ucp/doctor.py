"""What is each thing in a run folder, and what can be mended without guessing?

    examined = examine(Path("runs/a"))               # reads sizes; full=True: every byte
    examined.would_resume, examined.entries
    mended = mend(examined)                          # what `fix` says of an entry is done; returns one line for each

Mended is only what has one right answer: a pointer that is lost names the newest whole checkpoint, a replacement that
was interrupted is ended, what dead saves left is removed, and the mark of a checkpoint that proves whole is taken away.
Nothing is made up, and no checkpoint is removed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron.ucp import commit
from megatron.ucp.commit import DAMAGE_MARK, OWNER_MARK, REPLACED_SUFFIX, RUN_MARK, STAGING_SUFFIX
from megatron.ucp.errors import UcpError, listed
from megatron.ucp.manifest import MANIFEST_NAME, Manifest, read_manifest
from megatron.ucp.owner import lives, mark_of
from megatron.ucp.pointers import LATEST, LATEST_UNIVERSAL, read_pointer
from megatron.ucp.run_folder import find_checkpoints, is_checkpoint_folder
from megatron.ucp.unfinished import WORK
from megatron.ucp.verify import verify

Fix = Literal["", "remove", "rename back", "unmark", "point"]


@dataclass(frozen=True)
class Entry:
    name: str
    what: str
    """whole, damaged, unfinished, being written, replaced, pointer, lost pointer, not a checkpoint."""
    why: str
    fix: Fix = ""
    target: str = ""
    """Of the fix: a folder's name."""


@dataclass(frozen=True)
class Examined:
    folder: Path
    entries: tuple[Entry, ...]
    would_resume: str
    """The name of the checkpoint that a resume would take; empty where there is none."""
    notes: tuple[str, ...]
    """Why not another."""

    @property
    def is_well(self) -> bool:
        return all(entry.what in ("whole", "pointer", "being written", "not a checkpoint") for entry in self.entries)


def examine(run_folder: str | Path, *, full: bool = False, num_workers: int = 2) -> Examined:
    """By sizes; `full`: by checksums and digests too, which reads everything. Raises NotADirectoryError."""
    folder = Path(run_folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder")
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    manifests = {path: manifest for path in inside if (manifest := _manifest_of(path)) is not None}
    newest = max(manifests.values(), key=lambda manifest: int(manifest.iteration or 0), default=None)
    entries = [_entry(path, manifests.get(path), newest, full, num_workers) for path in inside]
    would_resume, notes = "", list[str]()
    try:
        found = find_checkpoints(folder)
        chosen = found.native or found.universal
        would_resume, notes = chosen.folder.name if chosen else "", list(found.lost)
    except (UcpError, OSError) as error:
        notes = [str(error)]
    whole = {entry.name for entry in entries if entry.what == "whole"}
    entries += _pointers(folder, manifests, whole)
    return Examined(folder, tuple(entries), would_resume, tuple(notes))


def mend(examined: Examined) -> list[str]:
    """One line for everything that was done, and for what could not be. Nothing while a run is going on there."""
    done = []
    owner = mark_of(examined.folder / RUN_MARK)
    if owner is not None and (not owner.is_here or lives(owner)):
        return [f"nothing is mended: a run is going on here, or was ({owner.told()}). Where it is gone, look there"]
    for entry in examined.entries:
        path = examined.folder / entry.name
        if not entry.fix:
            continue
        try:
            done.append(_mended(path, entry))
        except (OSError, UcpError) as error:
            done.append(f"{entry.name}: could not be mended: {error}")
    return done


def _mended(path: Path, entry: Entry) -> str:
    if entry.fix == "remove":
        commit.remove_left_over(path)
        return f"{entry.name}: removed"
    if entry.fix == "rename back":
        commit.rename_back(path, path.with_name(entry.target))
        return f"{entry.name}: is {entry.target} again"
    if entry.fix == "unmark":
        (path / DAMAGE_MARK).unlink()
        return f"{entry.name}: its mark is taken away"
    commit.point_to(path.parent, entry.name, entry.target)
    return f"{entry.name}: names {entry.target}"


def _manifest_of(folder: Path) -> Manifest | None:
    if folder.suffix in (STAGING_SUFFIX, REPLACED_SUFFIX) or not (folder / MANIFEST_NAME).is_file():
        return None
    try:
        return read_manifest(folder)
    except (UcpError, OSError):
        return None


def _entry(path: Path, manifest: Manifest | None, newest: Manifest | None, full: bool, num_workers: int) -> Entry:
    name = path.name
    if path.suffix == STAGING_SUFFIX:
        return _unfinished(path)
    if path.suffix == REPLACED_SUFFIX:
        final = path.with_suffix("")
        if final.is_dir():
            return Entry(name, "replaced", f"{final.name} has taken its place", *_if_dead(path, "remove"))
        why = f"a save that was to replace {final.name} died between its two renames; this is the older one, whole"
        return Entry(name, "replaced", why, *_if_dead(path, "rename back", final.name))
    if not is_checkpoint_folder(path):
        return Entry(name, "not a checkpoint", "left alone")
    marked = commit.damage_of(path)
    if manifest is None and (path / MANIFEST_NAME).is_file():
        return Entry(name, "damaged", marked or f"its {MANIFEST_NAME} cannot be read")
    try:
        report = verify(path, quick=not full, num_workers=num_workers)
    except (UcpError, OSError) as error:
        return Entry(name, "damaged", str(error))
    if report.findings:
        return Entry(name, "damaged", listed(report.findings, 5, is_sorted=True))
    checked = "every byte" if full else "sizes"
    if marked:
        why = f"marked: {marked}; by {checked} it is whole"
        return Entry(name, "damaged", why, "unmark") if report.is_proven else Entry(name, "damaged", why)
    return Entry(name, "whole", _told(manifest, newest, checked, report.doubt if full else ""))


def _told(manifest: Manifest | None, newest: Manifest | None, checked: str, doubt: str) -> str:
    if manifest is None:
        return f"by {checked}; of a program that leaves no {MANIFEST_NAME}"
    text = (
        f"by {checked}; {manifest.kind}, iteration {manifest.iteration}, {manifest.topology} ZeRO-{manifest.zero_stage}"
    )
    if newest is not None and manifest.model and newest.model and _differs(manifest.model, newest.model):
        text += "; of another model than the newest"
    return text + (f"; unproven: {doubt}" if doubt else "")


def _differs(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    return any(one[key] != other[key] for key in one.keys() & other.keys())


def _unfinished(path: Path) -> Entry:
    mark = mark_of(path / OWNER_MARK)
    if mark is None or not mark.host:
        return Entry(
            path.name, "unfinished", "without a mark of who was writing it: look at it, and remove it yourself"
        )
    if not mark.is_here:
        return Entry(path.name, "unfinished", f"being written, or left, by {mark.told()}: examine it there")
    if lives(mark):
        return Entry(path.name, "being written", f"by {mark.told()}")
    goes_on = "; the same conversion would go on with it" if (path / WORK).is_dir() else ""
    return Entry(path.name, "unfinished", f"left by {mark.told()}, which is gone{goes_on}", "remove")


def _if_dead(path: Path, fix: Fix, target: str = "") -> tuple[Fix, str]:
    """Not while its owner may still be at it."""
    mark = mark_of(path / OWNER_MARK)
    return (fix, target) if mark is not None and mark.is_here and not lives(mark) else ("", "")


def _pointers(folder: Path, manifests: Mapping[Path, Manifest], whole: set[str]) -> list[Entry]:
    entries = []
    for pointer, kind in ((LATEST, "native"), (LATEST_UNIVERSAL, "universal")):
        of_kind = [(int(m.iteration or 0), path.name) for path, m in manifests.items() if m.kind == kind]
        newest = max((entry for entry in of_kind if entry[1] in whole), default=(0, ""))[1]
        found = read_pointer(folder, pointer)
        if found.folder is not None:
            entries.append(Entry(pointer, "pointer", f"names {found.named}"))
        elif found.named and (folder / f"{found.named}{REPLACED_SUFFIX}").is_dir():
            entries.append(Entry(pointer, "pointer", f"names {found.named}, whose replacement was interrupted"))
        elif (found.fault or of_kind) and not os.path.isdir(folder / pointer):
            why = found.fault or f"there is no {pointer}"
            entries.append(Entry(pointer, "lost pointer", why, "point" if newest else "", newest))
    return entries
