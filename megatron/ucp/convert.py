"""Convert a checkpoint of any topology into a universal folder.

Open a Source, check everything that can be checked, write the universal Target under a temporary name
in one pass, prove it by the digests of the save, and make it appear at once.

    result = convert("run/global_step100", "run/global_step100_universal", num_workers=2)
    result.digest                                     # one line for the whole state

`main(arguments)` takes what DeepSpeed's own ds_to_universal.main takes and returns an exit code; `convert_as_told`
takes the same and raises.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.ucp.commit import commit, point_to, stage
from megatron.ucp.digest import total
from megatron.ucp.disk import disk_errors, require_space
from megatron.ucp.errors import CorruptFileError, DigestMismatchError, OutputExistsError, SourceError, UcpError, listed
from megatron.ucp.expert_labels import experts_clause
from megatron.ucp.file_table import changed_files, require_unchanged
from megatron.ucp.identity import Identity
from megatron.ucp.manifest import Manifest, write_manifest
from megatron.ucp.pointers import LATEST_UNIVERSAL
from megatron.ucp.sources import Source, find_checkpoint, open_source
from megatron.ucp.targets.universal import tensor_bytes, write_universal
from megatron.ucp.topology import Topology

_SPARE_BYTES = 4 << 20
"""For ucp.json, steps and model states."""


@dataclass(frozen=True)
class Conversion:
    source: Path
    output: Path
    manifest: Manifest
    digest: str
    num_bytes: int
    seconds: float


def convert(
    input_folder: str | Path,
    output_folder: str | Path,
    *,
    num_workers: int = 2,
    column_parallel: tuple[str, ...] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Writes `output_folder` and points `latest_universal` beside it to it. Raises before anything is written where
    the input is incomplete, the output exists or the disk is too small; a failure later leaves no output.

    `progress(done, total)` in bytes, from several threads."""
    started = time.perf_counter()
    # A trailing slash must not put the pointer inside the folder.
    output = Path(str(output_folder).rstrip("/") or "/")
    folder = find_checkpoint(input_folder)
    _require_apart(folder, output)
    identity = Identity.of(folder)
    source = open_source(folder, column_parallel=column_parallel)
    num_bytes = tensor_bytes(source.manifest)
    require_space(output, num_bytes + _SPARE_BYTES)
    staging = stage(output)
    try:
        with disk_errors(staging):
            manifest = _written(source, staging, num_workers, _counter(progress, num_bytes))
        identity.require_unchanged()
        commit(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        identity.require_unchanged()  # what was found wrong may be another save's
        raise
    point_to(output.parent, LATEST_UNIVERSAL, output.name)
    seconds = time.perf_counter() - started
    return Conversion(source.folder, output, manifest, total(manifest.digests), num_bytes, seconds)


def _written(source: Source, staging: Path, num_workers: int, count: Callable[[int], None] | None) -> Manifest:
    """The whole universal folder but for its name. Raises what was found wrong with the files, by their names."""
    try:
        manifest = write_universal(source, staging, num_workers=num_workers, progress=count or (lambda n: None))
    except (DigestMismatchError, SourceError, CorruptFileError) as error:
        raise _naming_files(error, source) from error
    # The digests prove the tensors; what else was copied or read out of the files is proven by their checksums.
    require_unchanged(source.folder, source.manifest, num_workers=num_workers)
    write_manifest(staging, manifest)
    return manifest


def _require_apart(folder: Path, output: Path) -> None:
    source, target = folder.resolve(), output.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise OutputExistsError(
            "the output and the input are one folder, or one lies in the other",
            found=output,
            expected=f"a folder beside {folder}",
            where=folder,
            do="choose another output folder",
        )


def parser() -> argparse.ArgumentParser:
    """The flags of DeepSpeed's ds_to_universal and ours."""
    p = argparse.ArgumentParser(
        prog="ds_to_universal.py", description="Convert a DeepSpeed checkpoint of any topology to a universal one."
    )
    p.add_argument("--input_folder", required=True, help="a checkpoint (global_stepN), or the run folder: `latest`")
    p.add_argument("--output_folder", required=True, help="must not exist")
    p.add_argument("--num_workers", type=int, help="threads; default: what the two flags below ask for, at most 4")
    p.add_argument("--num_extract_workers", type=int, default=4, help="as DeepSpeed's: one pass here, so a hint only")
    p.add_argument("--num_merge_workers", type=int, default=2, help="as DeepSpeed's: one pass here, so a hint only")
    p.add_argument("--keep_temp_folder", action="store_true", help="accepted; no temporary folder is made")
    p.add_argument("--no_strict", dest="strict", action="store_false", help="accepted; nothing is matched by pattern")
    p.add_argument("--inject_missing_state", action="store_true", help="accepted; nothing has to be injected")
    p.add_argument(
        "--column_parallel",
        action="append",
        default=[],
        metavar="REGEX",
        help="for checkpoints without ucp.json under tensor parallelism: parameters cut along dimension 0",
    )
    return p


def convert_as_told(arguments: Any) -> Conversion:
    """`convert` for a program that has DeepSpeed's arguments: `input_folder` and `output_folder` of any object or
    mapping, and whatever else of `parser` is there. Raises what `convert` raises."""

    def given(name: str) -> Any:
        return arguments.get(name) if isinstance(arguments, Mapping) else getattr(arguments, name, None)

    if missing := [name for name in ("input_folder", "output_folder") if given(name) is None]:
        raise TypeError(f"the arguments of a conversion ({type(arguments).__name__}) lack {', '.join(missing)}")
    folder = given("input_folder")
    found = find_checkpoint(folder)
    if found != Path(folder):
        print(f"{folder} is no checkpoint itself; converting its latest one, {os.path.relpath(found, folder)}")
    hints = given("num_extract_workers") or 4, given("num_merge_workers") or 2
    return convert(
        found,
        given("output_folder"),
        num_workers=given("num_workers") or max(1, min(4, *hints)),
        column_parallel=tuple(given("column_parallel") or ()),
        progress=ProgressLine(),
    )


def main(arguments: Any = None) -> int:
    """Command line (a list of words, or None for the process's own), or arguments as DeepSpeed's `main` takes them: a
    namespace of any kind. Prints what was done; 0, or 1 after an error. `convert_as_told` raises instead."""
    if arguments is None or isinstance(arguments, (list, tuple)):
        arguments = parser().parse_args(arguments)
    try:
        result = convert_as_told(arguments)
    except (UcpError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    source = result.manifest.source or {}
    size = result.num_bytes / 2**20
    print(
        f"{result.source} (ZeRO-{source['zero_stage']}, {Topology.from_json(source['topology'])}) -> {result.output}\n"
        f"{len(result.manifest.parameters)} parameters, {size:.1f} MiB in {result.seconds:.2f} s "
        f"({size / max(result.seconds, 1e-9):.0f} MiB/s); state digest {result.digest}"
    )
    return 0


class ProgressLine:
    """Bytes, rate and time left: one line that is redrawn on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, stream=None):
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._started = self._shown = time.monotonic()

    def __call__(self, done: int, total_bytes: int) -> None:
        now = time.monotonic()
        is_last = done >= total_bytes
        if now - self._shown < (0.2 if self._is_terminal else 10) and not (is_last and self._is_terminal):
            return
        self._shown = now
        rate = done / max(now - self._started, 1e-9)
        left = (total_bytes - done) / max(rate, 1)
        text = f"{done / 2**20:.0f} / {total_bytes / 2**20:.0f} MiB, {rate / 2**20:.0f} MiB/s, {left:.0f} s left"
        start, end = ("\r", "\n" if is_last else "") if self._is_terminal else ("", "\n")
        print(f"{start}{text:<60}", end=end, file=self._stream, flush=True)


def _naming_files(error: UcpError, source: Source) -> UcpError:
    """What was found names parameters; whoever has to mend the folder needs files."""
    changed = changed_files(source.folder, source.manifest)
    if not changed:
        return error
    return type(error)(
        f"{error.what}; {len(changed)} file(s) changed since they were written: {listed(changed)}"
        + experts_clause(source.manifest, changed),
        found=error.found,
        expected=error.expected,
        where=error.where,
        do="copy these files again from where they were saved",
    )


def _counter(progress: Callable[[int, int], None] | None, total_bytes: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    lock, done = threading.Lock(), 0

    def add(num_bytes: int) -> None:
        nonlocal done
        with lock:
            done += num_bytes
            progress(done, total_bytes)

    return add
