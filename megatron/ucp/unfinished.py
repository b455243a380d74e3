"""What a conversion that was killed has left, and going on from it.

A staging folder says of what it is a conversion (its plan), and a journal in it has a line for each tensor's file that
is complete. Who starts the same conversion again takes the folder over. No line is believed: its file is read, and kept
where its checksum is the line's and the digest of its values is that of the save. All else is written anew.

    with staged_again(output, plan_of(identity, column_parallel, 0)) as staging:
        journal = Journal(staging, "tensors")
        kept = journal.kept(source, jobs)                 # of an earlier process; {} where there was none
        journal.add(written)                              # from several threads, when its file is complete
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron import __version__
from megatron.ucp.commit import OWNER_MARK, STAGING_SUFFIX, checksum_of, flush, require_absent, stage
from megatron.ucp.digest import Digest, digest_runs
from megatron.ucp.disk import disk_errors, write_and_flush
from megatron.ucp.errors import UcpError
from megatron.ucp.identity import Identity
from megatron.ucp.manifest import FileInfo
from megatron.ucp.owner import claim, mark_of, renewed
from megatron.ucp.runs import whole_runs
from megatron.ucp.safe_paths import existing_file, open_file
from megatron.ucp.sources.source import FileCache, Source
from megatron.ucp.stored import FLOAT32

WORK = ".conversion"
"""In the staging folder: what is known of the work, until the folder is whole."""
_PLAN = "plan"
_MAX_BYTES = 1 << 28
"""Of a journal."""

Job = tuple[str, str]
"""(parameter, state)."""


@dataclass(frozen=True)
class WrittenTensor:
    name: str
    state: str
    info: FileInfo
    digest: str

    @property
    def path(self) -> str:
        return f"zero/{self.name}/{self.state}.pt"


def staging_of(output: Path) -> Path:
    return output.with_name(output.name + STAGING_SUFFIX)


def plan_of(identity: Identity, column_parallel: Sequence[str], count: int) -> str:
    """What processes agree in that write one folder, now or after one another: the checkpoint as it was opened, how it
    is read, and how many share the work (0: one process does all). Inodes and devices are other ones on other machines;
    times are not, but some tell them less finely."""
    files = [(path, size, time // 1000) for path, _, size, time in identity.files]
    plan = [__version__, identity.manifest, files, list(column_parallel), count]
    return hashlib.sha256(json.dumps(plan).encode()).hexdigest()


def plan_in(staging: Path) -> str | None:
    with contextlib.suppress(UcpError, OSError, UnicodeDecodeError), open_file(staging, f"{WORK}/{_PLAN}") as file:
        return file.read(100).decode()
    return None


@contextlib.contextmanager
def staged_again(output: Path, plan: str) -> Iterator[Path]:
    """The staging folder of `output`, this process's until the block ends: what a dead one has left of the same plan,
    else a fresh one. Raises what `commit.stage` raises."""
    staging = staging_of(output)
    if plan_in(staging) == plan:
        require_absent(output)
        claim(staging / OWNER_MARK)
    else:
        stage(output)  # with this process's mark
        (staging / WORK).mkdir()
        write_whole(staging / WORK / _PLAN, plan.encode())
    mark = mark_of(staging / OWNER_MARK)
    assert mark is not None
    with renewed(mark):
        yield staging


def bytes_there(output: Path, plan: str) -> int:
    """On the disk, of what `staged_again` would go on with."""
    staging = staging_of(output)
    if plan_in(staging) != plan:
        return 0
    num_bytes = 0
    for root, _, names in os.walk(staging):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # another share, at work, has renamed it
                num_bytes += (Path(root) / name).lstat().st_blocks * 512
    return num_bytes


def end_work(staging: Path) -> None:
    """Before the folder is committed."""
    shutil.rmtree(staging / WORK)


def remove_others(staging: Path, kept: Collection[str]) -> None:
    """Whatever is neither one of the kept files nor the work's own: half-written files, links, pipes. Follows no
    link."""
    for root, folders, files in os.walk(staging):
        here = Path(root)
        if here == staging:
            folders[:] = [name for name in folders if name != WORK]
            files = [name for name in files if name != OWNER_MARK]
        for name in files + [name for name in folders if (here / name).is_symlink()]:
            if (here / name).relative_to(staging).as_posix() not in kept:
                (here / name).unlink()


def write_whole(path: Path, content: bytes) -> None:
    """Appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    with disk_errors(path):
        write_and_flush(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), content)
    os.replace(temporary, path)
    flush(path.parent)


class Journal:
    """Of the tensors that one process writes, in the order in which they became whole. Thread-safe."""

    def __init__(self, staging: Path, name: str):
        self._folder, self._relative = staging, f"{WORK}/{name}.journal"

    def add(self, tensor: WrittenTensor) -> None:
        path = self._folder / self._relative
        with disk_errors(path):
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:  # at once: lines of several threads do not mix
                os.write(handle, _line(tensor).encode())
            finally:
                os.close(handle)

    def kept(self, source: Source, jobs: Sequence[Job], num_workers: int = 2) -> dict[Job, WrittenTensor]:
        """Those of `jobs` whose files are whole and hold what was saved. Reads them. What is wrong with a line or a
        file is no error: it is not kept. To be called before `add`."""
        listed = self._listed(set(jobs))
        with ThreadPoolExecutor(max(1, num_workers)) as pool:
            are_whole = pool.map(lambda tensor: _is_whole(source, self._folder, tensor), listed.values())
            kept = {job: tensor for (job, tensor), is_whole in zip(listed.items(), are_whole, strict=True) if is_whole}
        # Anew: whatever else stood there, a pipe even, is not what lines are added to.
        path = self._folder / self._relative
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        write_whole(path, "".join(map(_line, kept.values())).encode())
        return kept

    def _listed(self, jobs: set[Job]) -> dict[Job, WrittenTensor]:
        listed = {}
        try:
            if existing_file(self._folder, self._relative).stat().st_size > _MAX_BYTES:
                return {}
            with open_file(self._folder, self._relative) as file:
                lines = file.read(_MAX_BYTES).decode(errors="replace").splitlines()
        except (UcpError, OSError):
            return {}
        for line in lines:
            tensor = _parsed(line)
            if tensor is not None and (tensor.name, tensor.state) in jobs:
                listed[tensor.name, tensor.state] = tensor
        return listed


def _line(tensor: WrittenTensor) -> str:
    return json.dumps([tensor.name, tensor.state, tensor.info.bytes, tensor.info.crc32, tensor.digest]) + "\n"


def _parsed(line: str) -> WrittenTensor | None:
    """None for what is no line of a journal: the last one of a machine that lost its power may be cut."""
    try:
        fields: Any = json.loads(line)
        name, state, size, crc, digest = fields
        Digest.from_hex(digest)
    except (ValueError, TypeError, RecursionError):
        return None
    if not (isinstance(name, str) and isinstance(state, str) and type(size) is int and isinstance(crc, str)):
        return None
    return WrittenTensor(name, state, FileInfo(size, crc), digest)


def _is_whole(source: Source, staging: Path, tensor: WrittenTensor) -> bool:
    saved = source.manifest.digests.get(tensor.name, {}).get(tensor.state, tensor.digest)
    layout = source.manifest.parameters[tensor.name].layout_of(tensor.state)
    try:
        with open_file(staging, tensor.path) as file:
            if checksum_of(file) != tensor.info:
                return False
        flat = FileCache().tensor(staging / tensor.path, ("param",))
        if flat.dtype is not FLOAT32 or flat.numel() != layout.numel:
            return False
        runs = whole_runs(layout.numel)
        found = digest_runs(flat.array(), runs, name=tensor.name, state=tensor.state, shape=layout.shape).hex()
    except (UcpError, OSError):
        return False
    return found == tensor.digest == saved
