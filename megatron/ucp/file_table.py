"""The `files` table of a manifest against the folder: which files are not the ones that were written?

The one idea: sizes cost nothing, so every opening compares them; checksums read everything, so they are for `verify`
and for an error that has to say which file is to blame.

    require_sizes(folder, manifest)            # raises, naming every file that is missing or of another size
    changed_files(folder, manifest)            # ["zero_pp_rank_1_mp_rank_00_optim_states.pt"]
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron.ucp.commit import checksum_file
from megatron.ucp.errors import CorruptFileError, MissingFileError, listed
from megatron.ucp.experts import holding
from megatron.ucp.manifest import Manifest


def require_sizes(folder: str | Path, manifest: Manifest) -> None:
    """Raises MissingFileError or CorruptFileError with all that is wrong."""
    missing, faults = _size_faults(Path(folder), manifest)
    if not missing and not faults:
        return
    names = [*missing, *faults]
    kind, what = (MissingFileError, "missing") if missing else (CorruptFileError, "not as long as they were written")
    raise kind(
        f"{len(missing) or len(faults)} file(s) of the checkpoint are {what}",
        found=listed([*(f"{path}: missing" for path in missing), *faults.values()]) + holding(manifest, names),
        where=folder,
        do="bring the files of every node, of this save, into this folder",
    )


def changed_files(folder: str | Path, manifest: Manifest, num_workers: int = 2) -> list[str]:
    """Listed files that are missing or whose size or checksum differs. Reads them all."""
    return sorted(file_faults(folder, manifest, num_workers))


def file_faults(folder: str | Path, manifest: Manifest, num_workers: int = 2) -> dict[str, str]:
    """Path -> what is wrong with it, one line."""
    folder = Path(folder)
    missing, faults = _size_faults(folder, manifest)
    rest = sorted(set(manifest.files) - set(missing) - set(faults))

    def check(path: str) -> str | None:
        known, found = manifest.files[path], checksum_file(folder / path)
        return None if found == known else f"{path}: checksum {found.crc32}, {known.crc32} was written"

    with ThreadPoolExecutor(num_workers) as pool:
        changed = {path: line for path, line in zip(rest, pool.map(check, rest), strict=True) if line}
    return {**{path: f"{path}: missing" for path in missing}, **faults, **changed}


def _size_faults(folder: Path, manifest: Manifest) -> tuple[list[str], dict[str, str]]:
    missing, faults = [], {}
    for path, known in sorted(manifest.files.items()):
        try:
            size = (folder / path).stat().st_size
        except FileNotFoundError:
            missing.append(path)
            continue
        if size != known.bytes:
            faults[path] = f"{path}: {size} bytes, {known.bytes} were written"
    return missing, faults
