"""Durability: a folder becomes a checkpoint in one step, or never.

Write everything under a temporary name, ucp.json last, flush it to the disk, rename, and only then move
the pointer file (`latest`), itself by an atomic replace. Whoever dies in between leaves the previous state intact.

    staging = stage(run / "global_step100")            # run/global_step100.tmp, empty, ours
    ...                                                # write files, then write_manifest(staging, ...)
    commit(staging, run / "global_step100")
    point_to(run, "latest", "global_step100")

In a distributed save rank 0 calls these, with a barrier before `commit`.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import shutil
import stat
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from megatron.ucp import native
from megatron.ucp.disk import disk_errors, write_and_flush
from megatron.ucp.errors import NotACheckpointError, OutputExistsError, OwnedByOtherError, UcpError
from megatron.ucp.manifest import MANIFEST_NAME, FileInfo
from megatron.ucp.owner import claim, lives, mark_of
from megatron.ucp.pointers import LATEST
from megatron.ucp.safe_paths import open_file

STAGING_SUFFIX = ".tmp"
REPLACED_SUFFIX = ".replaced"
"""What a checkpoint is called while another takes its place."""
OWNER_MARK = ".writing"
"""In a folder that is being written."""
RUN_MARK = ".owner"
"""In the folder of a run that is going on."""
DAMAGE_MARK = ".damaged"
"""In a checkpoint of which somebody found that it is not what was saved; why, and since when. A resume passes it over,
and nobody removes it."""
_BLOCK = 1 << 20
_OWN_POINTER = re.compile(rf"\.{LATEST}(_checkpointed_iteration\.txt)?\.[0-9a-f]{{16}}\{STAGING_SUFFIX}")
"""A pointer that only the run's owner moves, before it has its name."""
_OWN_FOLDER = re.compile(rf"\.[0-9a-f]{{8}}\{STAGING_SUFFIX}$")
"""One of ours that is about to get its name, or to be removed."""


def stage(final: str | Path, replace: bool = False) -> Path:
    """A fresh staging folder for `final`, with this process's mark in it. A left-over of a dead run is removed;
    OutputExistsError if `final` exists (unless it is to be replaced), OwnedByOtherError if another writer lives or what
    is there carries no mark of ours."""
    final = Path(final)
    staging = final.with_name(final.name + STAGING_SUFFIX)
    if not replace:
        require_absent(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(staging):
        _require_left_over(staging)
        _remove(staging)
    # It appears with its mark: a folder without one is never ours.
    fresh = final.with_name(f"{final.name}.{secrets.token_hex(4)}{STAGING_SUFFIX}")
    with disk_errors(final):
        fresh.mkdir()
    try:
        with disk_errors(final):
            claim(fresh / OWNER_MARK)
            flush(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)  # the first error is the one to be told
        raise
    try:
        os.rename(fresh, staging)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        if os.path.lexists(staging):  # another writer was faster: its folder is not empty
            _require_left_over(staging)
        raise
    # Before anything is written into it: what a machine that stops leaves there is known to be ours.
    flush(final.parent)
    return staging


def require_absent(final: Path) -> None:
    """Raises OutputExistsError."""
    if os.path.lexists(final):
        raise OutputExistsError(
            "the output is already there", where=final, do="choose another folder, or remove this one yourself"
        )


def commit(staging: str | Path, final: str | Path, replace: bool = False, marker: str = MANIFEST_NAME) -> None:
    """Makes `staging`, complete with its `marker` (ucp.json), the checkpoint `final`; on return it is on the disk.

    With `replace` an older `final` is moved aside first and removed last, so that a whole one always exists."""
    staging, final = Path(staging), Path(final)
    if not any(staging.rglob(marker)):  # of a run folder that is written as one, in the checkpoint inside
        raise NotACheckpointError(f"nothing to commit: {marker} was not written", where=staging)
    if os.path.lexists(final) and not replace:
        raise OutputExistsError("the output is already there", where=final)
    folders = [staging, *(p for p in staging.rglob("*") if p.is_dir())]
    files = [p for p in staging.rglob("*") if p.is_file()]
    # Many small files: the flushes wait on the device, not on the processor.
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(flush, files))
        list(pool.map(flush, folders))
    aside = final.with_name(final.name + REPLACED_SUFFIX)
    is_replacing = os.path.lexists(final)
    if is_replacing:
        if os.path.lexists(aside):
            _require_left_over(aside)
            _remove(aside)
        claim(final / OWNER_MARK)  # so that it can be told from a user's own folder of that name
        flush(final)
        os.rename(final, aside)
    os.rename(staging, final)
    flush(final.parent)
    # Not before: until now only the mark said that the folder is somebody's.
    (final / OWNER_MARK).unlink()
    flush(final)
    if is_replacing and (aside / DAMAGE_MARK).is_file():
        _keep_damaged(aside, final)
    elif is_replacing:
        _remove(aside)


def mark_damaged(folder: str | Path, why: str) -> None:
    """Raises OSError where nothing can be written there."""
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {' '.join(why.split())[:1000]}\n"
    handle = os.open(Path(folder) / DAMAGE_MARK, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
    write_and_flush(handle, text.encode())


def damage_of(folder: str | Path) -> str:
    """When and why it was marked; empty where it was not."""
    if not os.path.lexists(Path(folder) / DAMAGE_MARK):
        return ""
    try:
        with open_file(folder, DAMAGE_MARK) as file:
            return file.read(2000).decode(errors="replace").strip() or "it was marked so"
    except (UcpError, OSError):
        return "it was marked so"


def _keep_damaged(aside: Path, final: Path) -> None:
    """The replaced checkpoint, under a name that says what it is."""
    (aside / OWNER_MARK).unlink(missing_ok=True)
    numbers = (f".{number}" if number else "" for number in itertools.count())
    kept = next(path for number in numbers if not (path := final.with_name(f"{final.name}.damaged{number}")).exists())
    os.rename(aside, kept)


def remove_left_overs(run_folder: str | Path) -> list[str]:
    """Removes what dead runs, or failed saves of this one, have left in a run folder: folders under a temporary name
    that carry our mark, and replaced checkpoints whose successor is there. Returns their names. Not to be called while
    this process is writing there. Another machine's are left to it."""
    removed = []
    for path in sorted(Path(run_folder).iterdir()):
        if path.suffix not in (STAGING_SUFFIX, REPLACED_SUFFIX) or path.is_symlink():
            continue
        if _OWN_POINTER.fullmatch(path.name) and path.is_file():  # of a process that died while it moved one
            path.unlink(missing_ok=True)
            continue
        mark = mark_of(path / OWNER_MARK)
        if mark is None and _OWN_FOLDER.search(path.name) and _is_bare(path):
            shutil.rmtree(path)
            continue
        if mark is None or not mark.is_here or (not mark.is_mine and lives(mark)):
            continue
        if path.suffix == STAGING_SUFFIX or (path.with_suffix("") / MANIFEST_NAME).is_file():
            _remove(path)
            removed.append(path.name)
    return removed


def _is_bare(folder: Path) -> bool:
    """Whether a folder holds nothing, or no more than a mark that was not finished."""
    return folder.is_dir() and all(path.name.startswith(OWNER_MARK) for path in folder.iterdir())


def end_replacements(run_folder: str | Path) -> list[str]:
    """Gives checkpoints their names back whose replacement died between its two renames: they are whole. Returns these
    names. For who owns the run folder. Another machine's are left to it."""
    ended = []
    for path in sorted(Path(run_folder).glob(f"*{REPLACED_SUFFIX}")):
        final, mark = path.with_suffix(""), mark_of(path / OWNER_MARK)
        if os.path.lexists(final) or not (path / MANIFEST_NAME).is_file():
            continue
        if mark is not None and mark.is_here and (mark.is_mine or not lives(mark)):
            rename_back(path, final)
            ended.append(final.name)
    return ended


def rename_back(replaced: Path, final: Path) -> None:
    """Raises OSError."""
    os.rename(replaced, final)
    flush(final.parent)
    (final / OWNER_MARK).unlink(missing_ok=True)


def remove_checkpoint(folder: Path) -> None:
    """A committed one. If this process dies meanwhile, what is left is a left-over of its. Raises OSError, and
    OwnedByOtherError where another process is at it."""
    claim(folder / OWNER_MARK)
    _remove(folder)


def remove_left_over(folder: Path) -> None:
    """Raises OwnedByOtherError unless it carries our mark and its owner is dead, and OSError."""
    _require_left_over(folder)
    _remove(folder)


def _require_left_over(folder: Path) -> None:
    """Raises OwnedByOtherError unless it carries our mark and its owner is dead, or this process."""
    is_folder = stat.S_ISDIR(os.lstat(folder).st_mode)
    mark = mark_of(folder / OWNER_MARK) if is_folder else None
    if mark is None or not mark.host:
        raise OwnedByOtherError(
            "what stands where the output is to be written is not ours, and is left alone",
            found=folder.name,
            expected=f"nothing, or a left-over with a file {OWNER_MARK}",
            where=folder,
            do="move it away, or choose another output",
        )
    if not mark.is_mine and lives(mark, lambda: _written(folder)):
        raise OwnedByOtherError("another process is writing this output", found=mark.told(), where=folder)


def _written(folder: Path) -> object:
    """What changes while somebody writes there."""
    status = [(p.name, s.st_size, s.st_mtime_ns) for p in folder.rglob("*") if (s := _status(p))]
    return sorted(status), mark_of(folder / OWNER_MARK)


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None


def _remove(folder: Path) -> None:
    """Under a name of its own first, so that of two that remove it one does."""
    doomed = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{STAGING_SUFFIX}")
    flush(folder)  # with its mark
    os.rename(folder, doomed)
    flush(doomed.parent)
    for path in doomed.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != OWNER_MARK:  # the last to go: without it the rest would be nobody's
            path.unlink()
    shutil.rmtree(doomed)


def point_to(run_folder: str | Path, pointer: str, tag: str) -> None:
    """Atomically makes `run_folder/pointer` ("latest", "latest_universal", ...) contain `tag`. Raises OutputExistsError
    where a folder has the pointer's name."""
    run_folder = Path(run_folder)
    temporary = run_folder / f".{pointer}.{secrets.token_hex(8)}{STAGING_SUFFIX}"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    try:
        with disk_errors(temporary):
            write_and_flush(handle, tag.encode())
        try:
            os.replace(temporary, run_folder / pointer)
        except (IsADirectoryError, NotADirectoryError):
            raise OutputExistsError(
                f"a folder has the name of the pointer {pointer}",
                where=run_folder / pointer,
                do=f"move it away; {tag} itself is complete",
            ) from None
    finally:
        temporary.unlink(missing_ok=True)
    flush(run_folder)


def checksum_file(path: str | Path) -> FileInfo:
    """Size and CRC-32 of a file of our own."""
    with open(path, "rb", buffering=0) as file:
        return checksum_of(file)


def checksum_of(file: BinaryIO) -> FileInfo:
    """Size and CRC-32 of an open file, from its beginning; reads it once in large blocks, without the GIL."""
    if native.kernel is not None:
        size, crc = native.kernel.checksum(file.fileno())
        return FileInfo(size, f"{crc:08x}")
    crc, size = 0, 0
    block = bytearray(_BLOCK)
    view = memoryview(block)
    while count := file.readinto(block):  # type: ignore[attr-defined]
        crc = zlib.crc32(view[:count], crc)
        size += count
    return FileInfo(size, f"{crc:08x}")


def data_files(folder: str | Path) -> list[str]:
    """Relative paths of every regular file but the manifest, sorted: what its `files` table lists."""
    folder = Path(folder)
    return sorted(
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        # Of a mark that was not finished, too: a process may end while it leaves one.
        if p.is_file() and p.name not in (MANIFEST_NAME, DAMAGE_MARK) and not p.name.startswith(OWNER_MARK)
    )


def flush(path: Path) -> None:
    """A file or folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
