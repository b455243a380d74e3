"""The `files` table of a manifest against the folder: which files are not the ones that were written?

Sizes cost nothing, so every opening compares them; checksums read everything, so they are for `verify`
and for an error that has to say which file is to blame.

    require_sizes(folder, manifest)            # raises, naming every file that is missing or of another size
    changed_files(folder, manifest)            # ["zero_pp_rank_1_mp_rank_00_optim_states.pt"]
    require_unchanged(folder, manifest)        # raises, naming every file that is not the one that was written
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron.ucp.commit import checksum_of
from megatron.ucp.errors import CorruptFileError, ManifestError, MissingFileError, UnsafePathError, listed
from megatron.ucp.expert_labels import experts_clause
from megatron.ucp.manifest import Manifest
from megatron.ucp.partial_sums import PartialSums
from megatron.ucp.safe_paths import existing_file, open_file


def require_sizes(folder: str | Path, manifest: Manifest) -> None:
    """Raises MissingFileError or CorruptFileError with all that is wrong."""
    missing, faults = _size_faults(Path(folder), manifest, manifest.files)
    if not missing and not faults:
        return
    names = [*missing, *faults]
    kind, what = (MissingFileError, "missing") if missing else (CorruptFileError, "not as long as they were written")
    raise kind(
        f"{len(missing) or len(faults)} file(s) of the checkpoint are {what}",
        found=listed([*(f"{path}: missing" for path in missing), *faults.values()]) + experts_clause(manifest, names),
        where=folder,
        do="bring the files of every node, of this save, into this folder",
    )


def require_listed(folder: str | Path, manifest: Manifest, paths: Iterable[str]) -> None:
    """Raises ManifestError where a file that is going to be read has no checksum. Nothing without any table."""
    unlisted = sorted(set(paths) - set(manifest.files))
    if manifest.files and unlisted:
        raise ManifestError(
            f"{len(unlisted)} file(s) of the checkpoint are not in the table of files of ucp.json",
            found=unlisted,
            where=folder,
            do="the folder was changed after it was written: use another checkpoint",
        )


def require_unchanged(
    folder: str | Path,
    manifest: Manifest,
    paths: Iterable[str] | None = None,
    num_workers: int = 2,
    sums: PartialSums | None = None,
) -> None:
    """Reads the listed files (or these of them), but for what `sums` knows already, and raises MissingFileError or
    CorruptFileError with all that are not the ones that were written. Nothing where the manifest has no table of
    files."""
    faults = file_faults(folder, manifest, num_workers, paths, sums)
    if faults:
        raise CorruptFileError(
            f"{len(faults)} file(s) of the checkpoint are not the ones that were written",
            found=listed(faults.values()) + experts_clause(manifest, faults),
            where=folder,
            do="copy these files again from where they were saved",
        )


def changed_files(folder: str | Path, manifest: Manifest, num_workers: int = 2) -> list[str]:
    """Listed files that are missing or whose size or checksum differs. Reads them all."""
    return sorted(file_faults(folder, manifest, num_workers))


def file_faults(
    folder: str | Path,
    manifest: Manifest,
    num_workers: int = 2,
    paths: Iterable[str] | None = None,
    sums: PartialSums | None = None,
) -> dict[str, str]:
    """Path -> what is wrong with it, one line; of all listed files, or of these. What `sums` knows is not read."""
    folder = Path(folder)
    chosen = set(manifest.files) if paths is None else set(manifest.files) & set(paths)
    missing, faults = _size_faults(folder, manifest, chosen)
    rest = sorted(chosen - set(missing) - set(faults))

    def check(path: str) -> str | None:
        known = manifest.files[path]
        with open_file(folder, path) as file:
            found = checksum_of(file) if sums is None else sums.checksum_of(folder / path, file)
        return None if found == known else f"{path}: checksum {found.crc32}, {known.crc32} was written"

    with ThreadPoolExecutor(num_workers) as pool:
        changed = {path: line for path, line in zip(rest, pool.map(check, rest), strict=True) if line}
    return {**{path: f"{path}: missing" for path in missing}, **faults, **changed}


def size_faults(folder: str | Path, manifest: Manifest) -> dict[str, str]:
    """Path -> what is wrong with it, one line; of all listed files, by their sizes alone."""
    missing, faults = _size_faults(Path(folder), manifest, manifest.files)
    return {**{path: f"{path}: missing" for path in missing}, **faults}


def _size_faults(folder: Path, manifest: Manifest, paths: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    missing, faults = [], {}
    for path in sorted(paths):
        try:
            size = existing_file(folder, path).stat().st_size
        except MissingFileError:
            missing.append(path)
            continue
        except UnsafePathError as error:
            faults[path] = f"{path}: {error.what}" + (f" ({error.found})" if error.found else "")
            continue
        if size != manifest.files[path].bytes:
            faults[path] = f"{path}: {size} bytes, {manifest.files[path].bytes} were written"
    return missing, faults
