"""What a run folder holds to go on from: its pointers, and where they lead nowhere the newest whole checkpoint.

found = find_checkpoints(Path("runs/a"))           # reads ucp.json and sizes, loads nothing
found.native, found.universal, found.lost          # each the newest; and why others were passed over
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from megatron.ucp.commit import REPLACED_SUFFIX, STAGING_SUFFIX, damage_of
from megatron.ucp.errors import ManifestError, NotACheckpointError, UcpError
from megatron.ucp.huggingface.folder import is_model_folder
from megatron.ucp.identity import Identity
from megatron.ucp.manifest import MANIFEST_NAME, read_manifest
from megatron.ucp.pointers import LATEST, LATEST_UNIVERSAL, POINTERS, read_megatron_pointer, read_pointer
from megatron.ucp.sources import Source, open_source
from megatron.ucp.sources.megatron.common_file import is_core
from megatron.ucp.topology import Topology

_HUGGING_FACE, _MEGATRON_CORE = "a model folder of Hugging Face's", "a checkpoint of Megatron-Core's"


@dataclass(frozen=True, eq=False)
class OpenCheckpoint:
    """A Source, and what its folder was when it was opened."""

    source: Source
    identity: Identity

    @classmethod
    def of(cls, folder: Path, optimizer_order: Sequence[str] = ()) -> OpenCheckpoint:
        """`optimizer_order`: see open_source. Raises what opening raises. Local."""
        identity = Identity.of(folder)
        return cls(open_source(folder, optimizer_order=optimizer_order), identity)


@dataclass(frozen=True)
class Found:
    """One committed checkpoint, as much of it as the choice needs."""

    folder: Path
    kind: str
    """native or universal"""
    iteration: int
    topology: Topology
    zero_stage: int
    opened: OpenCheckpoint | None = None
    """Where it had to be opened to find out."""
    program: str = ""
    """Whose it is, where another program's folder is read as it is: its topology is not known then."""


@dataclass(frozen=True)
class FoundCheckpoints:
    load: Path
    native: Found | None = None
    universal: Found | None = None
    lost: tuple[str, ...] = ()
    """What is wrong with a pointer or with a checkpoint that was passed over; then `native` and `universal` are the
    newest whole ones."""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """Why, by name, of those that a pointer names or that would have been the newest: then there was something to go on
    from, and a fresh start is no answer."""


def find_checkpoints(
    load: Path, tag: str | None = None, only_universal: bool = False, damaged: Mapping[str, str] = MappingProxyType({})
) -> FoundCheckpoints:
    """What `load` holds: a run folder with its pointers (or a `tag` in it), or a checkpoint folder itself. With
    `only_universal` the native pointer is not followed: what it names may be gone after a conversion.

    Where a pointer is lost (missing, unreadable, naming nothing) the newest whole checkpoint of its kind is found
    instead; where it names a damaged one, the newest whole that is not newer. `damaged`: why, by name, of those that
    carry no mark. Raises NotACheckpointError for a tag or a folder that is no committed checkpoint.
    """
    if is_checkpoint_folder(load):
        return _sorted_by_kind(load, [_describe(load)])
    if tag is not None:
        if not (load / tag).is_dir():
            raise NotACheckpointError(
                f"--load-tag {tag}: there is no such folder",
                found=[folder.name for folder in _committed(load)] or "no checkpoint at all",
                where=load,
                do="name one of the checkpoints found",
            )
        return _sorted_by_kind(load, [_describe(load / tag)])
    theirs = read_megatron_pointer(load)  # a run of Megatron-Core's, in which this program has saved nothing yet
    if theirs is not None and is_core(theirs) and not _has_pointers(load) and not _committed(load):
        return _sorted_by_kind(load, [_describe(theirs)])
    kinds = {LATEST_UNIVERSAL: "universal"} if only_universal else {LATEST: "native", LATEST_UNIVERSAL: "universal"}
    named: list[Found] = []
    faults: dict[str, str] = {}
    limits: dict[str, int] = {}
    found_damaged: dict[str, str] = {}
    unreadable: ManifestError | None = None
    for pointer, kind in kinds.items():
        found = read_pointer(load, pointer)
        if found.folder is not None or _is_replaced(load, found.named):
            why = damaged.get(found.named) or damage_of(load / found.named)
            try:
                described = _describe(load / found.named)
            except ManifestError as error:
                described, why, unreadable = None, why or error.what, error
            if described is not None and not why:
                named.append(described)
                continue
            faults[kind] = f"{pointer} names {found.named}, which is damaged ({why})"
            found_damaged[found.named] = why
            if described is not None:
                limits[kind] = described.iteration
        elif found.fault:
            faults[kind] = found.fault
    if not named:  # a folder with one of the pointers does not need the other
        faults = {kind: faults.get(kind, f"there is no {pointer}") for pointer, kind in kinds.items()}
    newest, passed_over = dict[str, Found](), list[str]()
    if faults:
        newest, passed_over = _newest_whole(load, set(faults), limits, damaged, found_damaged)
    if unreadable is not None and not named and not newest:
        raise unreadable
    told = [fault for kind, fault in faults.items() if kind in newest or not fault.startswith("there is no")]
    return dataclasses.replace(
        _sorted_by_kind(load, [*newest.values(), *named]), lost=(*told, *passed_over), damaged=found_damaged
    )


def is_checkpoint_folder(folder: Path) -> bool:
    """By what lies in it, committed or not: a checkpoint given by mistake must not pass for an empty run folder."""
    is_checkpoint = (folder.suffix == STAGING_SUFFIX and folder.is_dir()) or any(
        next(folder.glob(pattern), None) is not None
        for pattern in (MANIFEST_NAME, "zero/", "mp_rank_*_model_states.pt", "*zero_pp_rank_*_optim_states.pt")
    )
    return is_checkpoint or is_core(folder) or _is_model_folder(folder)


def _is_model_folder(folder: Path) -> bool:
    """Of Hugging Face's, and not the folder of a run that has one beside its checkpoints."""
    return is_model_folder(folder) and not _has_pointers(folder)


def _has_pointers(folder: Path) -> bool:
    return any(os.path.lexists(folder / pointer) for pointer in POINTERS)


def _committed(load: Path) -> list[Path]:
    return sorted(path.parent for path in load.glob(f"*/{MANIFEST_NAME}") if path.parent.suffix != STAGING_SUFFIX)


def _is_replaced(load: Path, name: str) -> bool:
    """A save that was to replace what the pointer names died in between; `_describe` says what to do."""
    return bool(name) and (load / f"{name}{REPLACED_SUFFIX}" / MANIFEST_NAME).is_file()


def _newest_whole(
    load: Path, kinds: set[str], limits: Mapping[str, int], damaged: Mapping[str, str], found_damaged: dict[str, str]
) -> tuple[dict[str, Found], list[str]]:
    """By kind, up to its limit in iterations, and why others were passed over. Whole: its ucp.json can be believed, all
    files have their sizes, and nobody has found it damaged; who has joins `found_damaged`."""
    candidates: list[Found] = []
    newest: dict[str, Found] = {}
    passed_over: list[str] = []
    for folder in _committed(load):
        try:
            candidates.append(_describe(folder))
        except (UcpError, OSError) as error:
            passed_over.append(_passed(folder, error))
    for found in sorted(candidates, key=lambda candidate: -candidate.iteration):
        if found.kind not in kinds or found.kind in newest or found.iteration > limits.get(found.kind, 1 << 62):
            continue
        if why := damaged.get(found.folder.name) or damage_of(found.folder):
            passed_over.append(f"{found.folder.name} is passed over: it is damaged ({why})")
            found_damaged[found.folder.name] = why
            continue
        try:
            newest[found.kind] = dataclasses.replace(found, opened=found.opened or OpenCheckpoint.of(found.folder))
        except (UcpError, OSError) as error:
            passed_over.append(_passed(found.folder, error))
    return newest, passed_over


def _passed(folder: Path, error: Exception) -> str:
    found = getattr(error, "found", None)
    return f"{folder.name} is passed over: {getattr(error, 'what', error)}" + (
        f" ({str(found)[:200]})" if found else ""
    )


def _sorted_by_kind(load: Path, found: list[Found]) -> FoundCheckpoints:
    by_kind = {checkpoint.kind: checkpoint for checkpoint in found}
    return FoundCheckpoints(load, by_kind.get("native"), by_kind.get("universal"))


def _describe(folder: Path) -> Found:
    replaced = folder.with_name(folder.name + REPLACED_SUFFIX)
    if not folder.exists() and (replaced / MANIFEST_NAME).is_file():
        raise NotACheckpointError(
            "a save that was to replace this checkpoint died between its two renames",
            where=folder,
            do=f"rename {replaced.name}, which is whole, to {folder.name}",
        )
    has_manifest = (folder / MANIFEST_NAME).is_file()
    is_foreign_universal = not has_manifest and (folder / "zero").is_dir()  # written by DeepSpeed's own converter
    is_model = not has_manifest and not is_foreign_universal and _is_model_folder(folder)
    if not has_manifest and not is_foreign_universal and not is_model and not is_core(folder):
        raise NotACheckpointError(
            f"no {MANIFEST_NAME} in the folder: it was never committed, or another program saved it",
            where=folder,
            do="remove the pointer to it, load an older tag, or convert a foreign DeepSpeed checkpoint with "
            "tools/ds_to_universal.py and load the universal folder",
        )
    opened = None if has_manifest else OpenCheckpoint.of(folder)
    manifest = opened.source.manifest if opened else read_manifest(folder)
    # Of a universal folder a user wants to know what trained it, not that it is whole.
    trained = manifest.source or {"topology": manifest.topology.to_json(), "zero_stage": manifest.zero_stage}
    topology = Topology.from_json(trained["topology"])
    iteration = int(manifest.iteration or 0)
    program = _HUGGING_FACE if is_model else _MEGATRON_CORE if not has_manifest and is_core(folder) else ""
    return Found(folder, manifest.kind, iteration, topology, trained["zero_stage"], opened, program)
