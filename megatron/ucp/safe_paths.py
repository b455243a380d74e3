"""What a name that comes out of a file may become: a part of a path, and a regular file below the folder, or nothing.

The names of parameters, states and files in a checkpoint are a stranger's. Every reader and every writer
asks here before it makes a path of one; whatever is absolute, leaves the folder, is a link or no regular file is
refused by name, and what is opened is what was checked.

    if fault := part_fault(name): ...                       # "holds a '/'", for messages that list all faults at once
    path = existing_file(folder, "zero/w/fp32.pt")          # raises UnsafePathError

The folder itself is the user's and may be reached through links. That others write into it at the same time with
intent is not defended against (SECURITY.md).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from megatron.ucp.errors import CorruptFileError, MissingFileError, UnsafePathError

MAX_PART_BYTES = 200
"""Of a parameter's or state's name in UTF-8: the longest file name that Linux takes is 255, and suffixes come to it."""
MAX_PATH_BYTES = 1024
MAX_DEPTH = 8
"""Parts of a relative path."""


def part_fault(name: object) -> str | None:
    """Why `name` cannot be one part of a path (a parameter's or state's name); None where it can."""
    if not isinstance(name, str):
        return f"is not text but {type(name).__name__}"
    if not name:
        return "is empty"
    if name in (".", ".."):
        return "leads to another folder"
    if "/" in name or "\\" in name:
        return "holds a '/' or a backslash"
    if not name.isprintable():
        return "holds characters that do not print"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "is not valid Unicode"
    return f"is {size} bytes long, more than {MAX_PART_BYTES}" if size > MAX_PART_BYTES else None


def path_fault(relative: object) -> str | None:
    """Why `relative` cannot be a file of the folder; None where it can. Pure: looks at no disk."""
    if not isinstance(relative, str):
        return f"is not text but {type(relative).__name__}"
    if relative.startswith("/"):
        return "is absolute"
    parts = relative.split("/")
    if len(parts) > MAX_DEPTH or len(relative) > MAX_PATH_BYTES:
        return f"is deeper than {MAX_DEPTH} parts or longer than {MAX_PATH_BYTES} characters"
    faults = [fault for part in parts if (fault := part_fault(part))]
    return faults[0] if faults else None


def existing_file(folder: str | Path, relative: str) -> Path:
    """`folder`/`relative`, which is a regular file reached without a link below `folder`. Raises UnsafePathError, or
    MissingFileError where nothing is there."""
    path = Path(folder)
    if fault := path_fault(relative):
        raise UnsafePathError(f"a file's name {fault}", found=repr(relative)[:200], where=folder)
    parts = relative.split("/")
    for index, part in enumerate(parts):
        path = path / part
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            raise MissingFileError("no such file", where=path) from None
        is_last = index == len(parts) - 1
        if stat.S_ISLNK(mode):
            raise UnsafePathError(
                "a link where a file or folder of the checkpoint should be",
                found=f"link to {os.readlink(path)}",
                where=path,
                do="copy what it leads to into the folder",
            )
        if not (stat.S_ISREG(mode) if is_last else stat.S_ISDIR(mode)):
            raise UnsafePathError(f"not a regular {'file' if is_last else 'folder'}", found=kind_of(mode), where=path)
    return path


def open_file(folder: str | Path, relative: str) -> BinaryIO:
    """The file `existing_file` allows, open for reading: what was checked is what is opened, even where something else
    takes its place in between. A FIFO or a device is never waited for."""
    path = existing_file(folder, relative)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CorruptFileError(f"cannot be opened: {error.strerror}", where=path) from error
    file = os.fdopen(handle, "rb")
    if not stat.S_ISREG(mode := os.fstat(handle).st_mode):
        file.close()
        raise UnsafePathError("not a regular file", found=kind_of(mode), where=path)
    return file


def kind_of(mode: int) -> str:
    kinds = (
        (stat.S_ISLNK, "a link"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    )
    return next((text for test, text in kinds if test(mode)), "a file")
