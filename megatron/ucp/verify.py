"""Is this checkpoint whole? Every check that the folder itself allows, all findings at once.

A finding is one line of text, and a sound checkpoint has none. Sizes and checksums of the files, exactly
one holder for every element (no gap, no overlap), equal replicas, and the state digests of the save.

    report = verify("run/global_step100")
    report.is_sound, report.findings, report.is_proven
    verify("run/global_step100", quick=True)        # without reading what is in the files: sizes, and the tiling
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.ucp.commit import data_files
from megatron.ucp.digest import Digest, digest_runs, total
from megatron.ucp.errors import NotACheckpointError, UcpError
from megatron.ucp.execute import chunks
from megatron.ucp.expert_digests import changed_experts
from megatron.ucp.expert_labels import experts_clause, label_of
from megatron.ucp.file_table import file_faults, size_faults
from megatron.ucp.identity import Identity
from megatron.ucp.manifest import Manifest, read_manifest
from megatron.ucp.runs import tiling_faults, whole_runs
from megatron.ucp.sources import Piece, Source, find_checkpoint, open_source


@dataclass(frozen=True)
class Report:
    folder: Path
    findings: tuple[str, ...]
    num_files: int
    num_states: int
    digest: str | None
    """Of the state as it is now; None where not all of it could be read."""
    doubt: str
    """Why soundness is merely absence of contradiction and no proof that this is what was once saved (no checksums, or
    converted from what had none); empty where it is."""

    @property
    def is_proven(self) -> bool:
        return not self.doubt

    @property
    def is_sound(self) -> bool:
        return not self.findings


def verify(
    folder: str | Path, *, num_workers: int = 2, column_parallel: tuple[str, ...] = (), quick: bool = False
) -> Report:
    """Reads everything once; `quick`: no element and no checksum of a file, so that a sound report is no proof. Raises
    only where there is no checkpoint to speak of (NotACheckpointError), or where the folder was replaced meanwhile
    (ChangedWhileReadError)."""
    folder = find_checkpoint(folder)
    findings: list[str] = []
    manifest = None
    try:
        identity = Identity.of(folder)
        if identity.manifest:
            manifest = read_manifest(folder)
            findings += _check_files(folder, manifest, num_workers, quick)
    except UcpError as error:
        return Report(folder, (str(error),), 0, 0, None, "its ucp.json cannot be believed")
    try:
        source = open_source(folder, column_parallel=column_parallel)
    except NotACheckpointError:
        raise
    except UcpError as error:
        identity.require_unchanged()
        num_files = len(manifest.files) if manifest else 0
        return Report(folder, tuple(dict.fromkeys((*findings, str(error)))), num_files, 0, None, "it cannot be read")
    jobs = [(name, state) for name, info in source.manifest.parameters.items() for state in info.states]
    digests: dict[str, dict[str, str]] = {name: {} for name in source.manifest.parameters}
    is_complete = True
    if quick:
        findings += _tiling_faults(source, jobs)
        identity.require_unchanged()
        doubt = "only looked at quickly: nothing that is in the files was read"
        return Report(folder, tuple(dict.fromkeys(findings)), len(source.manifest.files), len(jobs), None, doubt)
    if jobs:
        _check_state(source, *jobs[0])  # builds the index before the threads ask for it
    with ThreadPoolExecutor(num_workers) as pool:
        for (name, state), (digest, fault) in zip(jobs, pool.map(lambda job: _check_state(source, *job), jobs)):
            if fault is not None:
                findings.append(fault)
            if digest is None:
                is_complete = False
            else:
                digests[name][state] = digest.hex()
    findings += _check_side_files(source)
    identity.require_unchanged()
    return Report(
        folder,
        tuple(dict.fromkeys(findings)),
        len(source.manifest.files),
        len(jobs),
        total(digests) if is_complete else None,
        source.manifest.doubt,
    )


def _check_files(folder: Path, manifest: Manifest, num_workers: int, quick: bool) -> list[str]:
    if not manifest.files:
        return []
    extra = [f"{path}: not in the table of files" for path in sorted(set(data_files(folder)) - set(manifest.files))]
    faults = size_faults(folder, manifest) if quick else file_faults(folder, manifest, num_workers)
    return [*(f"{line}{experts_clause(manifest, [path])}" for path, line in faults.items()), *extra]


def _check_side_files(source: Source) -> list[str]:
    """What a conversion would copy beside the parameters can be read."""
    try:
        source.side_files()
        for name in source.manifest.parameters:
            source.step_object(name)
    except UcpError as error:
        return [str(error)]
    return []


def _tiling_faults(source: Source, jobs: list[tuple[str, str]]) -> list[str]:
    """Of all states, each question asked once: layers are alike, and so are the states of a partition."""
    manifest, faults = source.manifest, []
    known: dict[tuple[Any, ...], list[Piece]] = {}
    """Pieces without a fault, by their runs, which are kept so that no others take their place."""
    for name, state in jobs:
        info = manifest.parameters[name]
        is_partitioned = manifest.kind == "native" and manifest.is_partitioned and info.is_trainable
        if is_partitioned and state != info.states[0] and state not in info.shapes:
            continue  # it lies as the masters do
        try:
            pieces = source.pieces(name, state)
        except UcpError as error:
            faults.append(str(error))
            continue
        layout = info.layout_of(state)
        key = layout.numel, layout.is_averaged, *((id(piece.runs), piece.copy) for piece in pieces)
        if key in known:
            continue
        if fault := _tiling_fault(source, name, state, pieces):
            faults.append(fault)
        else:
            known[key] = pieces
    return faults


def _tiling_fault(source: Source, name: str, state: str, pieces: list[Piece]) -> str | None:
    """What is said of one parameter's state that is not held exactly once."""
    layout = source.manifest.parameters[name].layout_of(state)
    for copy in sorted({p.copy for p in pieces}) if layout.is_averaged else [0]:
        missing, doubled = tiling_faults(whole_runs(layout.numel), [p.runs for p in pieces if p.copy == copy])
        if missing or doubled:
            return f"{name} ({state}): missing elements {missing[:3]}, doubled {doubled[:3]}"
    return None


def _check_state(source: Source, name: str, state: str) -> tuple[Digest | None, str | None]:
    """(digest, finding) of one parameter's state."""
    layout = source.manifest.parameters[name].layout_of(state)
    try:
        if fault := _tiling_fault(source, name, state, source.pieces(name, state)):
            return None, fault
        digest = Digest()
        for runs, values in chunks(source, name, state, compares_replicas=True):
            digest += digest_runs(values, runs, name=name, state=state, shape=layout.shape)
    except UcpError as error:
        return None, str(error)  # names the parameter, or the file: then it is one finding for all its parameters
    saved = source.manifest.digests.get(name, {}).get(state)
    if saved is not None and saved != digest.hex():
        experts = label_of(changed_experts(source, name, state))
        return digest, f"{name} ({state}){experts}: state digest {digest.hex()}, {saved} was saved"
    return digest, None
