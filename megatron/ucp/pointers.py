"""The pointer files of a run folder: `latest`, `latest_universal`. One line each, the name of a checkpoint folder.
Other Megatrons have `latest_checkpointed_iteration.txt`, with a number.

A pointer is a stranger's file too. It may be missing, a folder, a FIFO, no text, or name nothing; then
the reason is told, and nothing is read that could wait or lead out of the folder.

    found = read_pointer(run, "latest")
    found.folder, found.fault            # (run/global_step100, "") or (None, "latest is a FIFO")
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megatron.ucp.errors import CorruptFileError, MissingFileError, UcpError, UnsafePathError
from megatron.ucp.safe_paths import MAX_PATH_BYTES, open_file, path_fault

LATEST = "latest"
"""The newest native checkpoint."""
LATEST_UNIVERSAL = "latest_universal"
POINTERS = (LATEST, LATEST_UNIVERSAL)
_MEGATRONS = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Pointer:
    folder: Path | None
    """That it names, a folder that is there."""
    fault: str = ""
    """Why there is none; empty also where there is no pointer."""
    named: str = ""
    """The name, which may be a folder's that is gone."""


def read_megatron_pointer(run_folder: str | Path) -> Path | None:
    """The folder of the iteration that it names, or of a release; None where there is none."""
    try:
        with open_file(run_folder, _MEGATRONS) as file:
            text = file.read(32).decode("utf-8").strip()
    except (UcpError, OSError, UnicodeDecodeError):
        return None
    is_number = text.isascii() and text.isdigit() and len(text) <= 18
    name = f"iter_{int(text):07d}" if is_number else "release"
    folder = Path(run_folder) / name
    return folder if (is_number or text == "release") and folder.is_dir() else None


def read_pointer(run_folder: str | Path, pointer: str) -> Pointer:
    run_folder = Path(run_folder)
    if not os.path.lexists(run_folder / pointer):
        return Pointer(None)
    try:
        with open_file(run_folder, pointer) as file:
            text = file.read(MAX_PATH_BYTES + 1).decode("utf-8").strip()
    except UnsafePathError as error:
        return Pointer(None, f"{pointer} is {error.found}")
    except (MissingFileError, CorruptFileError, OSError) as error:
        return Pointer(None, f"{pointer} cannot be read ({getattr(error, 'what', error)})")
    except UnicodeDecodeError:
        return Pointer(None, f"{pointer} is not text")
    if not text:
        return Pointer(None, f"{pointer} is empty")
    if fault := path_fault(text):
        return Pointer(None, f"what {pointer} names {fault}: {text[:60]!r}")
    if not (run_folder / text).is_dir():
        return Pointer(None, f"{pointer} names {text}, which is not there", text)
    return Pointer(run_folder / text, named=text)
