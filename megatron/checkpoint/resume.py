"""What a run starts from: a pure choice between fresh, native, direct and universal.

    found = find_checkpoints(Path("runs/source"))          # reads folders, loads nothing
    plan = choose_resume(found, wanted)                    # pure
    print(plan.reason)                                     # one line: what and why
    plan = open_planned(plan)                              # collective: on each rank, once; loading goes on from it

| kind | Source | when |
|---|---|---|
| fresh | none | no --load, or nothing whole is saved there |
| native | this folder's own save, same topology | bit-exact continuation, RNG included |
| direct | a native save of another topology | each rank reads the ranges it keeps; nothing is converted |
| universal | a universal folder | --universal-checkpoint, or there is nothing else |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from megatron.checkpoint.opening import OpenCheckpoint, open_everywhere
from megatron.ucp.commit import DAMAGE_MARK, REPLACED_SUFFIX, STAGING_SUFFIX, damage_of
from megatron.ucp.errors import ManifestError, NotACheckpointError, UcpError
from megatron.ucp.manifest import MANIFEST_NAME, read_manifest
from megatron.ucp.pointers import LATEST, LATEST_UNIVERSAL, read_pointer
from megatron.ucp.topology import Topology


class ResumeError(RuntimeError):
    """The checkpoint asked for is not there or is not of the kind asked for."""


@dataclass(frozen=True)
class LoadOptions:
    """Megatron's --finetune and --no-load-*."""

    with_optimizer: bool = True
    with_schedule: bool = True
    with_rng: bool = True
    with_progress: bool = True


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


@dataclass(frozen=True)
class FoundCheckpoints:
    load: Path
    native: Found | None = None
    universal: Found | None = None
    lost: tuple[str, ...] = ()
    """What is wrong with a pointer or with a checkpoint that was passed over; then `native` and `universal` are the
    newest whole ones."""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """Why, by name, of those that a pointer names: then there was something to go on from, and a fresh start is no
    answer."""


@dataclass(frozen=True)
class Wanted:
    topology: Topology
    zero_stage: int
    use_universal: bool = False
    exit_on_missing_checkpoint: bool = False
    load_strict: bool = False


@dataclass(frozen=True)
class ResumePlan:
    kind: str
    folder: Path | None
    reason: str
    notes: tuple[str, ...] = ()
    """What was passed over, and why."""
    opened: OpenCheckpoint | None = None
    """This rank's, once `open_planned` has opened it."""

    @property
    def is_fresh(self) -> bool:
        return self.folder is None


def find_checkpoints(
    load: Path, tag: str | None = None, only_universal: bool = False, damaged: Mapping[str, str] = MappingProxyType({})
) -> FoundCheckpoints:
    """What `load` holds: a run folder with its pointers (or a `tag` in it), or a checkpoint folder itself. With
    `only_universal` the native pointer is not followed: what it names may be gone after a conversion.

    Where a pointer is lost (missing, unreadable, naming nothing) the newest whole checkpoint of its kind is found
    instead; where it names a damaged one, the newest whole that is not newer. `damaged`: why, by name, of those that
    carry no mark. Raises NotACheckpointError for a tag or a folder that is no committed checkpoint.
    """
    if _is_checkpoint_folder(load):
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
    newest, passed_over = _newest_whole(load, set(faults), limits, damaged) if faults else ({}, [])
    if unreadable is not None and not named and not newest:
        raise unreadable
    told = [fault for kind, fault in faults.items() if kind in newest or not fault.startswith("there is no")]
    return dataclasses.replace(
        _sorted_by_kind(load, [*newest.values(), *named]), lost=(*told, *passed_over), damaged=found_damaged
    )


def _is_checkpoint_folder(folder: Path) -> bool:
    """By what lies in it, committed or not: a checkpoint given by mistake must not pass for an empty run folder."""
    return (folder.suffix == STAGING_SUFFIX and folder.is_dir()) or any(
        next(folder.glob(pattern), None) is not None
        for pattern in (MANIFEST_NAME, "zero/", "mp_rank_*_model_states.pt", "*zero_pp_rank_*_optim_states.pt")
    )


def _committed(load: Path) -> list[Path]:
    return sorted(path.parent for path in load.glob(f"*/{MANIFEST_NAME}") if path.parent.suffix != STAGING_SUFFIX)


def _is_replaced(load: Path, name: str) -> bool:
    """A save that was to replace what the pointer names died in between; `_describe` says what to do."""
    return bool(name) and (load / f"{name}{REPLACED_SUFFIX}" / MANIFEST_NAME).is_file()


def _newest_whole(
    load: Path, kinds: set[str], limits: Mapping[str, int], damaged: Mapping[str, str]
) -> tuple[dict[str, Found], list[str]]:
    """By kind, up to its limit in iterations, and why others were passed over. Whole: its ucp.json can be believed, all
    files have their sizes, and nobody has found it damaged."""
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
    if not has_manifest and not is_foreign_universal:
        raise NotACheckpointError(
            f"no {MANIFEST_NAME} in the folder: it was never committed, or another program saved it",
            where=folder,
            do="remove the pointer to it, load an older tag, or convert a foreign DeepSpeed checkpoint with "
            "tools/ds_to_universal.py and load the universal folder",
        )
    opened = OpenCheckpoint.of(folder) if is_foreign_universal else None
    manifest = opened.source.manifest if opened else read_manifest(folder)
    # Of a universal folder a user wants to know what trained it, not that it is whole.
    trained = manifest.source or {"topology": manifest.topology.to_json(), "zero_stage": manifest.zero_stage}
    topology = Topology.from_json(trained["topology"])
    return Found(folder, manifest.kind, int(manifest.iteration or 0), topology, trained["zero_stage"], opened)


def open_planned(plan: ResumePlan) -> ResumePlan:
    """With the checkpoint opened, on each rank. Collective over the world. Raises what `open_everywhere` raises."""
    return plan if plan.folder is None else dataclasses.replace(plan, opened=open_everywhere(plan.folder, plan.opened))


def choose_resume(found: FoundCheckpoints | None, wanted: Wanted) -> ResumePlan:
    """Pure. Raises ResumeError where the flags ask for a checkpoint that is not there."""
    if found is None:
        return ResumePlan("fresh", None, "starting fresh: no --load was given")
    if wanted.load_strict and found.lost:
        raise ResumeError(
            f"--load-strict was given and a pointer in {found.load} is lost: {'; '.join(found.lost)}. What to do: give "
            "--load-tag, write the checkpoint's name into the pointer, or drop --load-strict to go on from the newest "
            "whole checkpoint"
        )
    plan = _choose(found, wanted)
    chosen = next((c for c in (found.native, found.universal) if c and c.folder == plan.folder), None)
    return dataclasses.replace(plan, notes=found.lost, opened=chosen.opened if chosen else None)


def _choose(found: FoundCheckpoints, wanted: Wanted) -> ResumePlan:
    native, universal = found.native, found.universal
    if wanted.use_universal:
        if universal is None:
            raise ResumeError(
                f"--universal-checkpoint was given but {found.load} has no {LATEST_UNIVERSAL}"
                + (f" (there is a native checkpoint, {native.folder.name})" if native else "")
                + ". Convert first with tools/ds_to_universal.py, or drop the flag: a native checkpoint of any "
                "topology is resumed directly."
            )
        return ResumePlan(
            "universal", universal.folder, f"resuming from universal checkpoint {_tell(universal)}: asked for"
        )
    if native is not None:
        if (native.topology, native.zero_stage) == (wanted.topology, wanted.zero_stage):
            return ResumePlan(
                "native", native.folder, f"resuming from native checkpoint {_tell(native)}: same topology"
            )
        return ResumePlan(
            "direct",
            native.folder,
            f"resuming directly from native checkpoint {_tell(native)} as {wanted.topology} "
            f"ZeRO-{wanted.zero_stage}: the topology changed, nothing is converted",
        )
    if universal is not None:
        return ResumePlan(
            "universal", universal.folder, f"resuming from universal checkpoint {_tell(universal)}: the only one there"
        )
    if wanted.exit_on_missing_checkpoint:
        raise ResumeError(
            f"no checkpoint in {found.load} and --exit-on-missing-checkpoint was given. Expected a file named "
            f"{LATEST} or {LATEST_UNIVERSAL} there, or a checkpoint.{''.join(f' {line}.' for line in found.lost)}"
        )
    if found.damaged:
        raise ResumeError(
            f"no checkpoint in {found.load} is whole: {'; '.join(found.lost)}. What to do: copy one again from where "
            f"it was saved and remove its file {DAMAGE_MARK}, or start afresh in another folder"
        )
    if found.lost:
        return ResumePlan("fresh", None, f"starting fresh: no whole checkpoint is in {found.load}")
    return ResumePlan("fresh", None, f"starting fresh: nothing is saved in {found.load} yet")


def _tell(found: Found) -> str:
    return f"{found.folder.name} (iteration {found.iteration}, saved as {found.topology} ZeRO-{found.zero_stage})"
