"""Convert a checkpoint of any topology into a universal folder.

Open a Source, check everything that can be checked, write the universal Target under a temporary name
in one pass, prove it by the digests of the save, and make it appear at once.

    result = convert("run/global_step100", "run/global_step100_universal", num_workers=2)
    result.digest                                     # one line for the whole state

Its command line is convert_command.py. DeepSpeed's own files for other ranks are made by reshape.py.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.ucp.commit import commit, point_to
from megatron.ucp.digest import total
from megatron.ucp.disk import disk_errors, require_space
from megatron.ucp.errors import CorruptFileError, DigestMismatchError, OutputExistsError, SourceError, UcpError, listed
from megatron.ucp.expert_labels import experts_clause
from megatron.ucp.file_table import changed_files, require_unchanged
from megatron.ucp.huggingface.adapter import AdapterFolder
from megatron.ucp.identity import Identity
from megatron.ucp.manifest import MANIFEST_NAME, Manifest, write_manifest
from megatron.ucp.partial_sums import PartialSums
from megatron.ucp.pointers import LATEST_UNIVERSAL
from megatron.ucp.sources import Source, find_checkpoint, open_source
from megatron.ucp.sources.huggingface import HuggingFaceSource
from megatron.ucp.sources.renamed import with_names_of
from megatron.ucp.sources.with_base import is_of_peft, with_adapters_of
from megatron.ucp.targets.universal import tensor_bytes, tensor_jobs, write_universal
from megatron.ucp.unfinished import Journal, bytes_there, end_work, plan_of, staged_again

log = logging.getLogger(__name__)
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
    num_kept: int
    """Tensors that one that was killed had written, and that this one found whole."""

    def told_kept(self) -> str:
        """For the end of a line; empty where nothing was kept."""
        if not self.num_kept:
            return ""
        count = sum(len(info.states) for info in self.manifest.parameters.values())
        return f"; gone on from where it was interrupted: {self.num_kept} of {count} tensors were there and are right"


def convert(
    input_folder: str | Path,
    output_folder: str | Path,
    *,
    num_workers: int = 2,
    column_parallel: tuple[str, ...] = (),
    like: str | Path | None = None,
    vocab_size: int | None = None,
    program: str | None = None,
    adapter: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Writes `output_folder` and points `latest_universal` beside it to it. Raises before anything is written where
    the input is incomplete, the output exists or the disk is too small; a failure later leaves no output. What was
    killed (or its machine) is gone on with: see unfinished.py.

    `like`: a folder with a config.json of Hugging Face's; parameters that have its names get ours. `vocab_size`,
    `program`: see open_source. `adapter`: a folder of PEFT's adapters; the input is then their base, a model folder, or
    with `like` a program's save of a PEFT model, whose base `like` is.
    `progress(done, total)` in bytes, from several threads."""
    started = time.perf_counter()
    source, output, identity = opened(input_folder, output_folder, column_parallel, vocab_size, program)
    is_peft = like is not None and is_of_peft(source)
    beside = [Identity.of(folder) for folder in (adapter, like if is_peft else None) if folder is not None]
    if like is not None:
        source = with_adapters_of(source, like, adapter) if is_peft else with_names_of(source, like)
    elif adapter is not None:
        source = HuggingFaceSource.open(source.folder, adapter)
    num_bytes = tensor_bytes(source.manifest)
    asked = list(column_parallel)
    asked += [f"like {source.manifest.model}"] if like else []
    asked += [f"vocabulary {vocab_size}"] if vocab_size else []
    asked += [f"of {program}"] if program else []
    asked += [f"beside {folder}" for folder in beside]
    plan = plan_of(identity, asked, 0)
    require_space(output, num_bytes + _SPARE_BYTES - bytes_there(output, plan))
    with staged_again(output, plan) as staging, whole_or_not_at_all(staging, output, identity):
        journal = Journal(staging, "tensors")
        kept = journal.kept(source, tensor_jobs(source.manifest), num_workers)
        write = functools.partial(write_universal, journal=journal, kept=kept)
        manifest = write_proven(write, source, staging, num_workers, byte_counter(progress, num_bytes))
        for folder in beside:
            folder.require_unchanged()
        warning = AdapterFolder.open(Path(adapter)).require_base(manifest) if adapter and like is None else None
        if warning is not None:
            log.warning("warning: %s", warning)
        end_work(staging)
    point_to(output.parent, LATEST_UNIVERSAL, output.name)
    seconds = time.perf_counter() - started
    return Conversion(source.folder, output, manifest, total(manifest.digests), num_bytes, seconds, len(kept))


def opened(
    input_folder: str | Path,
    output_folder: str | Path,
    column_parallel: tuple[str, ...],
    vocab_size: int | None = None,
    program: str | None = None,
) -> tuple[Source, Path, Identity]:
    """(the checkpoint that is meant, where its conversion goes, what it was when it was opened). Nothing is made."""
    # A trailing slash must not put the pointer inside the folder.
    output = Path(str(output_folder).rstrip("/") or "/")
    folder = find_checkpoint(input_folder)
    require_apart(folder, output)
    identity = Identity.of(folder)
    return open_source(folder, None, column_parallel, vocab_size=vocab_size, program=program), output, identity


@contextlib.contextmanager
def whole_or_not_at_all(
    staging: Path, output: Path, input_identity: Identity, marker: str = MANIFEST_NAME
) -> Iterator[None]:
    """The staging folder becomes `output` where the block ends well and the input is the one that was opened; else it
    is removed. `marker`: see commit."""
    try:
        with disk_errors(staging):
            yield
        input_identity.require_unchanged()
        commit(staging, output, marker=marker)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        input_identity.require_unchanged()  # what was found wrong may be another save's
        raise


def write_proven(
    write: Callable[..., Manifest], source: Source, staging: Path, num_workers: int, count: Callable[[int], None] | None
) -> Manifest:
    """The whole folder but for its name. `write`: fills it with all but ucp.json, as write_universal does. Raises what
    was found wrong with the Source's files, by their names."""
    sums = PartialSums()
    try:
        manifest = write(source, staging, num_workers=num_workers, progress=count or (lambda n: None), sums=sums)
    except (DigestMismatchError, SourceError, CorruptFileError) as error:
        raise naming_files(error, source) from error
    # The digests prove the tensors; what else was copied or read out of the files is proven by their checksums.
    require_unchanged(source.folder, source.manifest, num_workers=num_workers, sums=sums)
    write_manifest(staging, manifest)
    return manifest


def require_apart(folder: Path, output: Path) -> None:
    source, target = folder.resolve(), output.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise OutputExistsError(
            "the output and the input are one folder, or one lies in the other",
            found=output,
            expected=f"a folder beside {folder}",
            where=folder,
            do="choose another output folder",
        )


def naming_files(error: UcpError, source: Source) -> UcpError:
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


def byte_counter(progress: Callable[[int, int], None] | None, total_bytes: int) -> Callable[[int], None] | None:
    """What adds up bytes for `progress(done, total)`, from any thread."""
    if progress is None:
        return None
    lock, done = threading.Lock(), 0

    def add(num_bytes: int) -> None:
        nonlocal done
        with lock:
            done += num_bytes
            progress(done, total_bytes)

    return add
