"""Durability: a folder becomes a checkpoint in one step, or never.

The one idea: write everything under a temporary name, ucp.json last, flush it to the disk, rename, and only then move
the pointer file (`latest`), itself by an atomic replace. Whoever dies in between leaves the previous state intact.

    staging = stage(run / "global_step100")            # run/global_step100.tmp, empty, ours
    ...                                                # write files, then write_manifest(staging, ...)
    commit(staging, run / "global_step100")
    point_to(run, "latest", "global_step100")

In a distributed save rank 0 calls these, with a barrier before `commit`.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from megatron.ucp.errors import NotACheckpointError, NotEnoughSpaceError, OutputExistsError
from megatron.ucp.manifest import MANIFEST_NAME, FileInfo

STAGING_SUFFIX = ".tmp"
REPLACED_SUFFIX = ".replaced"
"""What a checkpoint is called while another takes its place."""
_OWNER = ".writing"
_BLOCK = 1 << 20


def stage(final: str | Path, replace: bool = False) -> Path:
    """A fresh, empty staging folder for `final`. A left-over of a dead run is removed; OutputExistsError if `final`
    exists (unless it is to be replaced) or another live process of this machine is writing it."""
    final = Path(final)
    staging = final.with_name(final.name + STAGING_SUFFIX)
    if final.exists() and not replace:
        raise OutputExistsError(
            "the output is already there",
            where=final,
            do="choose another folder, or remove this one yourself",
        )
    if staging.exists():
        owner = _live_owner(staging)
        if owner is not None:
            raise OutputExistsError("another process is writing this output", found=f"pid {owner}", where=staging)
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    (staging / _OWNER).write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    return staging


def commit(staging: str | Path, final: str | Path, replace: bool = False) -> None:
    """Makes `staging`, complete with its ucp.json, the checkpoint `final`; on return it is on the disk.

    With `replace` an older `final` is moved aside first and removed last, so that a whole one always exists."""
    staging, final = Path(staging), Path(final)
    if not (staging / MANIFEST_NAME).is_file():
        raise NotACheckpointError(f"nothing to commit: {MANIFEST_NAME} was not written", where=staging)
    if final.exists() and not replace:
        raise OutputExistsError("the output is already there", where=final)
    (staging / _OWNER).unlink(missing_ok=True)
    folders = [staging, *(p for p in staging.rglob("*") if p.is_dir())]
    files = [p for p in staging.rglob("*") if p.is_file()]
    # Many small files: the flushes wait on the device, not on the processor.
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_flush, files))
        list(pool.map(_flush, folders))
    aside = final.with_name(final.name + REPLACED_SUFFIX)
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    os.rename(staging, final)
    _flush(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def point_to(run_folder: str | Path, pointer: str, tag: str) -> None:
    """Atomically makes `run_folder/pointer` ("latest", "latest_universal", ...) contain `tag`."""
    run_folder = Path(run_folder)
    temporary = run_folder / f".{pointer}{STAGING_SUFFIX}"
    with open(temporary, "w") as file:
        file.write(tag)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, run_folder / pointer)
    _flush(run_folder)


def require_space(folder: str | Path, num_bytes: int) -> None:
    """NotEnoughSpaceError unless the disk that will hold `folder` has room, with 1 % to spare."""
    parent = Path(folder).absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < num_bytes * 1.01:
        raise NotEnoughSpaceError(
            "the disk is too full",
            found=f"{free / 2**20:.0f} MiB free",
            expected=f"{num_bytes * 1.01 / 2**20:.0f} MiB",
            where=parent,
        )


def checksum_file(path: str | Path) -> FileInfo:
    """Size and CRC-32 of a file of our own."""
    with open(path, "rb", buffering=0) as file:
        return checksum_of(file)


def checksum_of(file: BinaryIO) -> FileInfo:
    """Size and CRC-32 of an open file; reads it once in large blocks, without the GIL while it counts."""
    crc, size = 0, 0
    block = bytearray(_BLOCK)
    view = memoryview(block)
    while count := file.readinto(block):
        crc = zlib.crc32(view[:count], crc)
        size += count
    return FileInfo(size, f"{crc:08x}")


def checksum_folder(folder: str | Path, num_workers: int = 2) -> dict[str, FileInfo]:
    """The `files` table of a folder: every regular file but the manifest, by relative path, sorted."""
    folder = Path(folder)
    paths = data_files(folder)
    with ThreadPoolExecutor(num_workers) as pool:
        return dict(zip(paths, pool.map(lambda p: checksum_file(folder / p), paths)))


def data_files(folder: str | Path) -> list[str]:
    """Relative paths of every regular file but the manifest, sorted: what its `files` table lists."""
    folder = Path(folder)
    return sorted(
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in (MANIFEST_NAME, _OWNER)
    )


def _live_owner(staging: Path) -> int | None:
    try:
        owner = json.loads((staging / _OWNER).read_text())
        pid = int(owner["pid"])
        is_here = owner["host"] == socket.gethostname()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not is_here or pid == os.getpid():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return pid


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
