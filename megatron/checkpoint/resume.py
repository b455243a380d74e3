"""What a run starts from: a pure choice between fresh, native, direct and universal.

    plan = choose_resume(found, wanted)                    # pure; `found` by ucp/run_folder.py
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
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.opening import OpenCheckpoint, open_everywhere
from megatron.ucp.commit import DAMAGE_MARK
from megatron.ucp.pointers import LATEST, LATEST_UNIVERSAL
from megatron.ucp.run_folder import Found, FoundCheckpoints
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
class Wanted:
    topology: Topology
    zero_stage: int
    use_universal: bool = False
    exit_on_missing_checkpoint: bool = False
    load_strict: bool = False
    finetune: bool = False


@dataclass(frozen=True)
class ResumePlan:
    kind: str
    folder: Path | None
    reason: str
    notes: tuple[str, ...] = ()
    """What was passed over, and why."""
    opened: OpenCheckpoint | None = None
    """This rank's, once `open_planned` has opened it."""
    weights_only: bool = False
    """As --finetune asks: the run begins at iteration 0."""

    @property
    def is_fresh(self) -> bool:
        return self.folder is None


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
    opened = chosen.opened if chosen else None
    return dataclasses.replace(plan, notes=found.lost, opened=opened, weights_only=wanted.finetune)


def choose_pretrained(found: FoundCheckpoints, wanted: Wanted) -> ResumePlan:
    """Of --pretrained-checkpoint, where --load holds nothing yet. Pure. Raises ResumeError where nothing is there."""
    plan = choose_resume(found, dataclasses.replace(wanted, exit_on_missing_checkpoint=False, finetune=True))
    if plan.folder is None:
        raise ResumeError(
            f"no checkpoint in {found.load}, which --pretrained-checkpoint names. What to do: give a model folder of "
            "Hugging Face's, a universal folder, or a run folder"
        )
    return dataclasses.replace(plan, reason=f"{plan.reason} (--pretrained-checkpoint: weights only)")


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
            "universal",
            universal.folder,
            f"starting from {universal.folder.name}, {universal.program} (iteration {universal.iteration})"
            if universal.program
            else f"resuming from universal checkpoint {_tell(universal)}: the only one there",
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
