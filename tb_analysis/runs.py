"""A run: a curve with its role (Source, Target or control), topology and precision.

The idea: a run says what it is. The words are looked for in this order, first found wins:

1. the folder's name begins with ``source``, ``target`` or ``control``: a person named it;
2. ``role`` in the ``run.json`` that training writes beside the events;
3. ``resumed_from`` there: a run that was resumed is a Target;
4. a word in the folder's name that resumed runs carry by custom (``universal``, ``resume``, ``load``);
5. a run without any of these that begins later than the others is a Target, else a Source.

    runs = [describe(folder, read_curve(folder, key)) for folder in folders]
    source, targets, controls = group(settle_roles(runs))
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from tb_analysis.curves import Curve
from tb_analysis.errors import RolesError, RunFileError
from tb_analysis.logs import StateDigests

ROLES = ("source", "target", "control")
RUN_FILE = "run.json"

_DEGREES = ("tp", "pp", "dp", "sp", "ep")


@dataclass(frozen=True)
class Run:
    """One training run as its event folder (or CSV file) tells it."""

    name: str
    """The folder's name."""
    curve: Curve
    role: str | None = None
    """One of ROLES; None until ``settle_roles``."""
    topology: str = ""
    """For instance ``tp2 pp1 dp1``; empty if nothing tells."""
    zero_stage: int | None = None
    precision: str | None = None
    """fp32, bf16 or fp16; None if nothing tells."""
    resumed_iteration: int | None = None
    """The iteration of the checkpoint the run was resumed from."""
    route: str | None = None
    """How it was resumed: native (same topology), direct (another, nothing converted) or universal."""
    grad_norm: Curve | None = None
    """Only where it is judged as well."""
    digests: StateDigests | None = None
    """Only where the run's log is read as well."""

    @property
    def label(self) -> str:
        """For instance ``tp2 pp1 dp1 ZeRO-1``."""
        zero = f" ZeRO-{self.zero_stage}" if self.zero_stage is not None else ""
        return f"{self.topology or self.name}{zero}"


@dataclass(frozen=True)
class Group:
    """The runs of one comparison: one Source and all that is held against it."""

    source: Run
    targets: tuple[Run, ...]
    controls: tuple[Run, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        return (self.source, *self.targets, *self.controls)


def describe(name: str, curve: Curve, folder: Path | None = None) -> Run:
    """A run from its name, and from ``folder``/run.json if there is one."""
    facts = _read_run_file(folder / RUN_FILE) if folder is not None else {}
    resumed_from = facts.get("resumed_from")
    role = _role_by_prefix(name) or facts.get("role")
    if role is None and resumed_from:
        role = "target"
    return Run(
        name=name,
        curve=curve,
        role=role or _role_by_custom(name),
        topology=facts.get("topology") or topology_in(name),
        zero_stage=facts.get("zero_stage", _zero_stage_in(name)),
        precision=facts.get("precision") or _precision_in(name),
        resumed_iteration=resumed_from.get("iteration") if resumed_from else None,
        route=resumed_from.get("kind") if resumed_from else None,
    )


def settle_roles(runs: list[Run]) -> list[Run]:
    """Give every run without a role one: of the runs, those that begin later are Targets."""
    earliest = min((run.curve.first_step for run in runs), default=0)
    return [
        run if run.role is not None else replace(run, role="target" if run.curve.first_step > earliest else "source")
        for run in runs
    ]


def group(runs: list[Run], source_name: str | None = None) -> Group:
    """The one Source and what is compared with it; ``source_name`` chooses among several Sources."""
    sources = [run for run in runs if run.role == "source"]
    if source_name is not None:
        chosen = [run for run in runs if run.name == source_name]
        if len(chosen) != 1:
            raise RolesError(
                f"--source {source_name}: {len(chosen)} runs of that name; found: {_names(runs)}. "
                "Give the name of one run's folder."
            )
        sources = [replace(chosen[0], role="source")]
    if not sources:
        raise RolesError(
            f"no Source among the runs ({_names(runs)}): name the folder of the uninterrupted run source_*, "
            "or choose it with --source."
        )
    if len(sources) > 1:
        raise RolesError(
            f"{len(sources)} Sources: {_names(sources)}. Choose one with --source, or give a --tb_dir that "
            "holds one comparison."
        )
    others = [run for run in runs if run.name != sources[0].name]
    return Group(
        sources[0],
        tuple(run for run in others if run.role == "target"),
        tuple(run for run in others if run.role == "control"),
    )


def resumed_at(run: Run) -> int:
    """The last iteration before the run's own: of the checkpoint, or as its curve tells."""
    return run.resumed_iteration if run.resumed_iteration is not None else run.curve.first_step - 1


def topology_in(name: str) -> str:
    """``tp1 pp2 dp1`` out of names such as ``source_tp1_pp2_dp1`` or upstream's ``tp_1_pp_2_dp_1_sp_1``."""
    found = []
    for degree in _DEGREES:
        match = re.search(rf"(?:^|[^a-z]){degree}_?(\d+)", name)
        if match and (degree in ("tp", "pp", "dp") or match.group(1) != "1"):
            found.append(f"{degree}{match.group(1)}")
    return " ".join(found)


def _read_run_file(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        facts = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RunFileError(f"{file}: not readable as JSON ({error}). Restore it, or remove it.") from error
    if not isinstance(facts, dict):
        raise RunFileError(f"{file}: found a {type(facts).__name__}, expected an object. Restore or remove it.")
    if facts.get("role") not in (None, *ROLES):
        raise RunFileError(f"{file}: role {facts['role']!r} is none of {', '.join(ROLES)}. Correct it.")
    resumed_from = facts.get("resumed_from")
    if resumed_from is not None and not isinstance(resumed_from, dict):
        raise RunFileError(
            f"{file}: resumed_from is {resumed_from!r}, expected null or an object with folder and "
            "iteration. Correct it."
        )
    topology = facts.get("topology")
    if isinstance(topology, dict):
        facts["topology"] = " ".join(
            f"{degree}{topology[f'{degree}_size']}" for degree in _DEGREES if f"{degree}_size" in topology
        )
    return facts


def _role_by_prefix(name: str) -> str | None:
    match = re.match(r"(source|target|control)(?![a-z])", name.lower())
    return match.group(1) if match else None


def _role_by_custom(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    if "control" in words:
        return "control"
    if {"target", "universal", "uni", "uc", "resume", "resumed", "load"} & set(words):
        return "target"
    return "source" if {"source", "save"} & set(words) else None


def _precision_in(name: str) -> str | None:
    match = re.search(r"(fp32|bf16|fp16)", name.lower())
    return match.group(1) if match else None


def _zero_stage_in(name: str) -> int | None:
    match = re.search(r"(?:^|[_-])z(?:ero)?[_-]?([0-3])(?:$|[_-])", name.lower())
    return int(match.group(1)) if match else None


def _names(runs: list[Run]) -> str:
    return ", ".join(sorted(run.name for run in runs)) or "none"
