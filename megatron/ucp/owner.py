"""Who owns a folder that is being written, so that nobody else removes it or writes into it.

The owner leaves a mark that says where and when its process was started. On the same machine the
process table says whether it lives. From elsewhere it is watched for a minute: what changes meanwhile lives (an owner
renews its mark every ten seconds, a writer writes files), what does not is dead. No clocks are compared. What carries
no mark is not ours.

    with claimed(folder / ".owner"): ...              # renewed until the end; raises OwnedByOtherError
    mark = claim(staging / ".writing")                # not renewed: for who is seen to write
    mark_of(staging / ".writing")                     # Mark, or None where there is none
    lives(mark, lambda: ...)                          # with what changes while its owner works
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.ucp.disk import write_and_flush
from megatron.ucp.errors import OwnedByOtherError

RENEWED_EVERY = 10.0
"""Seconds."""
WATCHED_FOR = 60.0
"""Seconds: six renewals, so that a process that is merely busy is not taken for dead."""
_MAX_BYTES = 4096


@dataclass(frozen=True)
class Mark:
    path: Path
    host: str
    """Empty for what is no mark of ours."""
    pid: int
    place: str
    """The boot and the namespace that the pid belongs to: in another container it is another process."""
    started: str
    """When the process was started, in the kernel's ticks since boot: a pid that is used again is another process."""
    token: str

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname() and self.place in ("", _place())

    @property
    def is_mine(self) -> bool:
        return self.is_here and self.pid == os.getpid() and self.started in ("", _started(os.getpid()))

    def told(self) -> str:
        return f"pid {self.pid} on {self.host}"


def mark_of(path: str | Path) -> Mark | None:
    """None where there is nothing; a Mark without host where there is something else."""
    path = Path(path)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return _no_mark(path)
    try:
        data = json.loads(os.read(handle, _MAX_BYTES))
        texts = [str(data.get(key, "")) for key in ("place", "started", "token")]
        mark = Mark(path, str(data["host"]), int(data["pid"]), *texts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return _no_mark(path)
    finally:
        os.close(handle)
    return mark if mark.pid > 0 else _no_mark(path)


def lives(mark: Mark, sign: Callable[[], object] | None = None) -> bool:
    """Whether the owner does. `sign` gives what changes while it works; by default, that it renews the mark."""
    if mark.is_here:
        return _is_running(mark.pid, mark.started)
    sign = sign or (lambda: _renewal(mark.path))
    before, until = sign(), time.monotonic() + WATCHED_FOR
    while time.monotonic() < until:
        time.sleep(min(1.0, WATCHED_FOR / 10))
        if sign() != before:
            return True
    return False


def claim(path: str | Path) -> Mark:
    """Leaves this process's mark, which appears whole or not at all. The mark of a dead owner is replaced. Raises
    OwnedByOtherError where another lives, or where there is something that is no mark."""
    path, token = Path(path), secrets.token_hex(8)
    temporary = path.with_name(f"{path.name}.{token}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    me = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "place": _place(),
        "started": _started(os.getpid()),
        "token": token,
    }
    try:
        write_and_flush(handle, json.dumps(me).encode())
        with _alone(path.parent):
            if _is_dead(path):
                os.replace(temporary, path)  # at no moment is there none: the folder would be nobody's
            else:
                os.link(temporary, path)  # fails where there is one already, unlike a rename
    except FileExistsError:
        raise _owned(path, mark_of(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
    mark = mark_of(path)
    if mark is None or mark.token != token:
        raise _owned(path, mark)
    return mark


@contextlib.contextmanager
def claimed(path: str | Path) -> Iterator[Mark]:
    """`claim`, renewed until the block ends, and then released."""
    mark = claim(path)
    try:
        with renewed(mark):
            yield mark
    finally:
        with contextlib.suppress(OSError):
            release(mark)


@contextlib.contextmanager
def renewed(mark: Mark) -> Iterator[None]:
    """By a thread until the block ends. A mark that somebody removes meanwhile stays away."""
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEWED_EVERY):
            with contextlib.suppress(OSError):
                os.utime(mark.path, follow_symlinks=False)

    thread = threading.Thread(target=renew, name=f"owner of {mark.path.parent.name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def release(mark: Mark) -> None:
    """Removes the mark, if it is still this one."""
    now = mark_of(mark.path)
    if now is not None and now.token == mark.token:
        mark.path.unlink(missing_ok=True)


def _is_dead(path: Path) -> bool:
    """Whether there is a mark of a dead owner, or of this process; False where there is none. Raises
    OwnedByOtherError where another lives, or where there is something that is no mark."""
    mark = mark_of(path)
    if mark is not None and (not mark.host or (not mark.is_mine and lives(mark))):
        raise _owned(path, mark)
    return mark is not None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of the processes of a machine one at a time, so that none removes the mark with which another has just replaced a
    dead one's. The lock ends with the process."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # not every network file system has locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _owned(path: Path, mark: Mark | None) -> OwnedByOtherError:
    if mark is None or not mark.host:
        return OwnedByOtherError(
            f"{path.name} is in the place of an owner's mark and is none",
            where=path,
            do="look at it, and remove it if nothing needs it",
        )
    return OwnedByOtherError(
        "another process owns this folder",
        found=mark.told(),
        where=path.parent,
        do=f"stop it, or use another folder. If it is gone for certain, remove {path.name}",
    )


def _no_mark(path: Path) -> Mark:
    return Mark(path, "", 0, "", "", "")


def _renewal(path: Path) -> object:
    """Opened, not only looked at: a network file system asks its server anew only then."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns, file.read(_MAX_BYTES)
    except OSError:
        return None


def _is_running(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    now = _started(pid)
    return now != _ENDED and (not now or not started or now == started)


_ENDED = "ended"


def _started(pid: int) -> str:
    """Empty where the system does not say (no /proc); _ENDED for a process that only waits for its parent to notice."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return _ENDED if fields[0] in (b"Z", b"X") else fields[19].decode()
    except (OSError, IndexError):
        return ""


def _place() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
