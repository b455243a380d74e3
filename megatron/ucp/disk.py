"""Room on the disk: asked before anything is written, and told by what the system says when it ran out.

    require_space(output, num_bytes)               # raises NotEnoughSpaceError
    with disk_errors(path):                        # the same, of whatever goes wrong in here for want of room
        torch.save(content, path)

torch's writer says "unexpected pos 576 vs 534" of a full disk, and an OSError of `write` names no file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron.ucp.errors import NotEnoughSpaceError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_ASKED_BYTES = 4 << 20
"""A disk that takes so many more is not full."""


def require_space(folder: str | Path, num_bytes: int) -> None:
    """NotEnoughSpaceError unless the disk that will hold `folder` has room, with 1 % to spare."""
    parent = _existing(Path(folder).absolute())
    free = shutil.disk_usage(parent).free
    if free < num_bytes * 1.01:
        raise NotEnoughSpaceError(
            "the disk is too full",
            found=f"{free / 2**20:.0f} MiB free",
            expected=f"{num_bytes * 1.01 / 2**20:.0f} MiB",
            where=parent,
        )


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Raises NotEnoughSpaceError for an error in the block, if the disk of `path` (the file that is written there, or
    its folder) takes no more; any other error as it is."""
    path = Path(path)
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _no_space(error, path) from error
        raise
    except RuntimeError as error:  # torch's writer, which does not say why
        if told := _asked(path):
            raise _no_space(told, path) from error
        raise


def write_and_flush(handle: int, content: bytes) -> None:
    """All of it, onto the disk, and closes the handle. Raises OSError; `write` alone may stop short."""
    try:
        while content:
            content = content[os.write(handle, content) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def _asked(path: Path) -> OSError | None:
    """What the system says of a few more bytes there; None where it takes them."""
    is_file = path.is_file()
    asked = path if is_file else path / ".is_there_room"
    try:
        with open(asked, "ab", buffering=0) as file:
            for _ in range(0, _ASKED_BYTES, 1 << 16):
                file.write(bytes(1 << 16))
            os.fsync(file.fileno())
    except OSError as error:
        return error if error.errno in _FULL else None
    finally:
        if not is_file:
            asked.unlink(missing_ok=True)
    return None


def _no_space(error: OSError, path: Path) -> NotEnoughSpaceError:
    parent = _existing(path.absolute())
    found = f"{shutil.disk_usage(parent).free} bytes free"
    if error.errno == errno.EFBIG:
        found = f"no file may be longer than {resource.getrlimit(resource.RLIMIT_FSIZE)[0]} bytes (ulimit -f); {found}"
    return NotEnoughSpaceError(
        f"cannot write: {os.strerror(error.errno or 0)}",
        found=found,
        where=path,
        do="make room there, or save to another disk; what was there before is untouched",
    )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path if path.is_dir() else path.parent
