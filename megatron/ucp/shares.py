"""A conversion by several processes, on one machine or on many that see the same disk.

Each process takes a share of the tensors, by bytes, and writes their files where all others write theirs:
into the staging folder of the output. Nothing is exchanged over a network. What a process has done it says in a small
file there; share 0 waits for those of all, writes the one ucp.json and makes the folder appear. A process that died
leaves its share undone: it is done again by starting that share, and then share 0, once more; what others did stays.

    convert_share(source_folder, output, Share(0, 4))          # in four processes, with 0, 1, 2, 3

Every process proves the tensors that it writes by the digests of the save, and a part of the source's files by their
checksums.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.ucp.commit import commit, flush, point_to
from megatron.ucp.convert import Conversion, byte_counter, naming_files, opened
from megatron.ucp.digest import total
from megatron.ucp.disk import disk_errors, require_space
from megatron.ucp.errors import CorruptFileError, DigestMismatchError, OutputExistsError, SourceError, UcpError, listed
from megatron.ucp.file_table import require_unchanged
from megatron.ucp.manifest import FileInfo, Manifest, read_manifest, write_manifest
from megatron.ucp.owner import claimed, lives, mark_of
from megatron.ucp.partial_sums import PartialSums
from megatron.ucp.pointers import LATEST_UNIVERSAL
from megatron.ucp.sources import Source
from megatron.ucp.targets.universal import Written, tensor_bytes, tensor_jobs, universal_manifest, write_tensors
from megatron.ucp.unfinished import (
    WORK,
    Job,
    Journal,
    bytes_there,
    end_work,
    plan_in,
    plan_of,
    remove_others,
    staged_again,
    staging_of,
    write_whole,
)

_SPARE_BYTES = 4 << 20
_POLLED_EVERY = 0.1
_MAX_BYTES = 1 << 28
"""Of what one share says."""
MAXWORK = 1 << 16


class UnfinishedSharesError(UcpError):
    """Processes of a conversion did not come or died. What is done stays."""


@dataclass(frozen=True)
class Share:
    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count <= MAXWORK:
            raise UcpError("no such share", found=str(self), expected=f"I/N, where I is 0 to N - 1, N up to {MAXWORK}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Share:
        """ "3/8". Raises UcpError."""
        first, _, second = text.partition("/")
        if not (first.isdecimal() and second.isdecimal() and len(text) < 16):
            raise UcpError("not a share", found=text[:40], expected="I/N, as 0/4")
        return cls(int(first), int(second))


def convert_share(
    input_folder: str | Path,
    output_folder: str | Path,
    share: Share,
    *,
    num_workers: int = 2,
    column_parallel: tuple[str, ...] = (),
    progress: Callable[[int, int], None] | None = None,
    wait_seconds: float = 600.0,
) -> Conversion | None:
    """Does one share; share 0 then waits for the others and commits, and only it returns a Conversion. `progress`:
    bytes of this share. `wait_seconds`: for a process that has not begun; one that has is waited for while it lives.

    Raises what `convert` raises, and UnfinishedSharesError."""
    started = time.perf_counter()
    source, output, identity = opened(input_folder, output_folder, column_parallel)
    jobs = _dealt(source.manifest, share.count)
    plan = plan_of(identity, column_parallel, share.count)
    num_bytes = tensor_bytes(source.manifest)

    def do(staging: Path) -> None:
        if _read(staging, share.index, jobs[share.index]) is None:
            _do(source, staging, share, jobs[share.index], num_workers, progress)
        identity.require_unchanged()

    if share.index:
        staging = _awaited(output, plan, share, source, wait_seconds)
        try:
            if staging is not None:
                do(staging)
        except FileNotFoundError:
            if not _is_made(output, source):  # else it was done before, and share 0 has just ended
                raise
        return None
    require_space(output, num_bytes + _SPARE_BYTES - bytes_there(output, plan))
    with staged_again(output, plan) as staging:
        _forget_failures(staging, jobs)
        do(staging)
        written = _gathered(staging, jobs, output, wait_seconds)
        identity.require_unchanged()
        manifest = universal_manifest(source, written)
        with disk_errors(staging):
            end_work(staging)
            remove_others(staging, written.files)
            write_manifest(staging, manifest)
        commit(staging, output)
    point_to(output.parent, LATEST_UNIVERSAL, output.name)
    return Conversion(
        source.folder, output, manifest, total(manifest.digests), num_bytes, time.perf_counter() - started, 0
    )


def _dealt(manifest: Manifest, count: int) -> list[list[Job]]:
    """The jobs of each share, the same in every process: each, largest first, to the one that has the fewest bytes."""
    dealt: list[list[Job]] = [[] for _ in range(count)]
    held = [(0, index) for index in range(count)]
    for name, state in tensor_jobs(manifest):
        size, index = min(held)
        dealt[index].append((name, state))
        held[index] = size + 4 * manifest.parameters[name].layout_of(state).numel, index
    return dealt


# -- the staging folder ----------------------------------------------------------------------------------------------


def _forget_failures(staging: Path, jobs: list[list[Job]]) -> None:
    """Of an earlier time: what failed then does not count, for its shares may be on their way again."""
    for path in (staging / WORK).iterdir():
        mark = mark_of(path) if path.suffix == ".owner" else None
        if path.suffix == ".failed" or (mark is not None and not lives(mark)):
            path.unlink(missing_ok=True)
    for index, of_share in enumerate(jobs):
        if _read(staging, index, of_share) is None:
            (staging / WORK / f"{index}.json").unlink(missing_ok=True)


def _awaited(output: Path, plan: str, share: Share, source: Source, seconds: float) -> Path | None:
    """None where all is done already: of shares that are started again share 0 may have found nothing missing."""
    staging, until = staging_of(output), time.monotonic() + seconds
    while plan_in(staging) != plan:
        if _is_made(output, source):
            return None
        if os.path.lexists(output):
            raise OutputExistsError(
                "the output is already there", where=output, do="choose another folder, or remove this one yourself"
            )
        if time.monotonic() > until:
            raise UnfinishedSharesError(
                f"share {share} waited {seconds:.0f} s for share 0 to begin",
                found="a conversion of something else, or into other shares" if staging.exists() else "no folder",
                where=staging,
                do="start share 0 with the same folders and as many shares",
            )
        time.sleep(_POLLED_EVERY)
    return staging


def _is_made(output: Path, source: Source) -> bool:
    """Whether the output is a conversion of this Source."""
    try:
        manifest = read_manifest(output)
    except (UcpError, OSError):
        return False
    is_of_it = manifest.kind == "universal" and (manifest.source or {}).get("folder") == source.folder.name
    saved = source.manifest.digests
    return is_of_it and (not saved or total(saved) == total(manifest.digests))


# -- one share -------------------------------------------------------------------------------------------------------


def _do(
    source: Source,
    staging: Path,
    share: Share,
    jobs: list[Job],
    num_workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    told = staging / WORK / f"{share.index}.json"
    failed = staging / WORK / f"{share.index}.failed"
    failed.unlink(missing_ok=True)
    manifest = source.manifest
    size = sum(4 * manifest.parameters[name].layout_of(state).numel for name, state in jobs)
    count, sums = byte_counter(progress, size) or (lambda num_bytes: None), PartialSums()
    with claimed(staging / WORK / f"{share.index}.owner"), _telling(failed), disk_errors(staging):
        try:
            journal = Journal(staging, str(share.index))
            kept = journal.kept(source, jobs, num_workers)
            written = write_tensors(
                source,
                staging,
                jobs,
                kept,
                journal,
                with_rest=share.index == 0,
                num_workers=num_workers,
                progress=count,
                sums=sums,
            )
        except (DigestMismatchError, SourceError, CorruptFileError) as error:
            raise naming_files(error, source) from error
        mine = sorted(manifest.files)[share.index :: share.count]
        require_unchanged(source.folder, manifest, mine, num_workers, sums)
        paths = [staging / name for name in written.files]
        for changed in [*paths, *sorted({path.parent for path in paths})]:
            flush(changed)
        files = {path: [info.bytes, info.crc32] for path, info in written.files.items()}
        digests = [[name, state, digest] for (name, state), digest in written.digests.items()]
        write_whole(told, json.dumps({"files": files, "digests": digests}).encode())


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
    """What goes wrong is told to share 0, so that it does not wait."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(OSError, UcpError):
            write_whole(path, str(error)[:2000].encode(errors="replace"))
        raise


def _read(staging: Path, index: int, jobs: list[Job]) -> Written | None:
    """What a share says that it has done; None where it has not, or where its files are not there any more. Raises
    CorruptFileError where it is not that."""
    path = staging / WORK / f"{index}.json"
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        content: Any = json.loads(path.read_bytes())
        files = {str(name): FileInfo(int(size), str(crc)) for name, (size, crc) in content["files"].items()}
        digests = {(str(name), str(state)): str(digest) for name, state, digest in content["digests"]}
        expected = {f"zero/{name}/{state}.pt" for name, state in jobs}
        if set(digests) != set(jobs) or not expected <= set(files) or (index and expected != set(files)):
            raise ValueError("other tensors than those of the share")
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptFileError(
            "what a process says that it has written is not of its share",
            found=f"{type(error).__name__}: {error}"[:200],
            where=path,
            do="remove it, and do the share again",
        ) from error
    is_there = all(
        (staging / name).is_file() and (staging / name).stat().st_size == i.bytes for name, i in files.items()
    )
    return Written(files, digests) if is_there else None


def _gathered(staging: Path, jobs: list[list[Job]], output: Path, wait_seconds: float) -> Written:
    """Of all shares, waited for. Raises UnfinishedSharesError."""
    files: dict[str, FileInfo] = {}
    digests: dict[Job, str] = {}
    missing, until = set(range(len(jobs))), time.monotonic() + wait_seconds
    while missing:
        for index in sorted(missing):
            # Until it has left the folder, too, which is soon to be gone.
            if (written := _read(staging, index, jobs[index])) and not _is_there(staging, index):
                files.update(written.files)
                digests.update(written.digests)
                missing.discard(index)
        if not missing:
            break
        is_late = time.monotonic() > until
        reasons = {index: _lost(staging, index, jobs[index], is_late) for index in sorted(missing)}
        lost = {index: why for index, why in reasons.items() if why}
        if lost:
            raise UnfinishedSharesError(
                f"{len(lost)} of {len(jobs)} shares will not come",
                found=listed(f"share {index}: {why}" for index, why in lost.items()),
                where=staging,
                do=f"start these again (--share {min(lost)}/{len(jobs)}), and then share 0; what is done stays",
            )
        time.sleep(_POLLED_EVERY)
    return Written(files, digests)


def _is_there(staging: Path, index: int) -> bool:
    mark = mark_of(staging / WORK / f"{index}.owner")
    return mark is not None and not mark.is_mine and lives(mark)


def _lost(staging: Path, index: int, jobs: list[Job], is_late: bool) -> str | None:
    """Why a share will not come; None where it may."""
    failed, mark = staging / WORK / f"{index}.failed", mark_of(staging / WORK / f"{index}.owner")
    if failed.is_file():
        return failed.read_bytes()[:2000].decode(errors="replace")
    if mark is not None and lives(mark):
        return None
    if _read(staging, index, jobs) is not None:  # done since it was looked for
        return None
    if mark is not None:
        return f"its process ({mark.told()}) is gone"
    if (staging / WORK / f"{index}.json").is_file():
        return "it was done, and its files are not there any more"
    return "it did not begin" if is_late else None
