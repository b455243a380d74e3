"""Are two checkpoints the same training state, and if not, where and by how much?

Both sides are Sources, so any kind and topology compares with any other: by digest first, and only where
digests differ (or are not there) element by element.

    difference = diff("run/global_step100", "run/global_step100_universal")
    difference.is_equal, difference.lines
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.ucp.execute import chunks
from megatron.ucp.identity import Identity
from megatron.ucp.sources import Source, find_checkpoint, open_source


@dataclass(frozen=True)
class StateDelta:
    name: str
    state: str
    num_different: int
    max_delta: float
    """Largest |a - b|; nan where either is."""


@dataclass(frozen=True)
class Difference:
    left: Path
    right: Path
    deltas: tuple[StateDelta, ...]
    lines: tuple[str, ...]
    """What else differs: parameters, states, shapes, steps, hyper-parameters, iteration."""
    num_states: int

    @property
    def is_equal(self) -> bool:
        return not self.deltas and not self.lines


def diff(
    left: str | Path, right: str | Path, *, trust_digests: bool = True, column_parallel: tuple[str, ...] = ()
) -> Difference:
    """With `trust_digests` states whose saved digests are equal are not read. Raises ChangedWhileReadError where a save
    replaced one of them meanwhile."""
    identities = [Identity.of(find_checkpoint(folder)) for folder in (left, right)]
    a = open_source(left, column_parallel=column_parallel)
    b = open_source(right, column_parallel=column_parallel)
    lines, common = _compare_tables(a, b)
    deltas = []
    for name, state in common:
        saved = a.manifest.digests.get(name, {}).get(state)
        if trust_digests and saved is not None and saved == b.manifest.digests.get(name, {}).get(state):
            continue
        delta = _compare_state(a, b, name, state)
        if delta.num_different:
            deltas.append(delta)
    for identity in identities:
        identity.require_unchanged()
    return Difference(a.folder, b.folder, tuple(deltas), tuple(lines), len(common))


def _compare_tables(a: Source, b: Source) -> tuple[list[str], list[tuple[str, str]]]:
    ours, theirs = a.manifest.parameters, b.manifest.parameters
    lines = [f"{name}: only on the left" for name in sorted(set(ours) - set(theirs))]
    lines += [f"{name}: only on the right" for name in sorted(set(theirs) - set(ours))]
    common: list[tuple[str, str]] = []
    for name in ours:
        if name not in theirs:
            continue
        left, right = ours[name], theirs[name]
        if left.layout.shape != right.layout.shape:
            lines.append(f"{name}: shape {left.layout.shape} and {right.layout.shape}")
            continue
        if set(left.states) != set(right.states):
            lines.append(f"{name}: states {', '.join(left.states)} and {', '.join(right.states)}")
        numbers = [{"step": info.step, **info.scalars} for info in (left, right)]
        for key in sorted(set(numbers[0]) | set(numbers[1])):
            if numbers[0].get(key) != numbers[1].get(key):
                lines.append(f"{name}: {key} {numbers[0].get(key)} and {numbers[1].get(key)}")
        for state in left.states:
            shapes = [info.layout_of(state).shape for info in (left, right) if state in info.states]
            if len(set(shapes)) > 1:
                lines.append(f"{name} ({state}): shape {shapes[0]} and {shapes[1]}")
            elif len(shapes) == 2:
                common.append((name, state))
    if a.manifest.iteration != b.manifest.iteration:
        lines.append(f"iteration {a.manifest.iteration} and {b.manifest.iteration}")
    sides = ("common", a.manifest.common, b.manifest.common), ("model", a.manifest.model, b.manifest.model)
    for what, here, there in sides:
        # The random streams are per rank, and what a foreign folder does not say is no difference.
        for key in sorted((set(here) & set(there)) - {"rng", "iteration"}):
            if here[key] != there[key]:
                lines.append(f"{what}: {key} {here[key]} and {there[key]}")
    groups_a, groups_b = a.manifest.optimizer.groups, b.manifest.optimizer.groups
    if groups_a and groups_b and set(groups_a) != set(groups_b):
        lines.append(f"parameter groups {', '.join(sorted(groups_a))} and {', '.join(sorted(groups_b))}")
    for group in sorted(set(groups_a) & set(groups_b)):
        for key in sorted(set(groups_a[group]) & set(groups_b[group])):
            if groups_a[group][key] != groups_b[group][key]:
                lines.append(f"group {group}: {key} {groups_a[group][key]} and {groups_b[group][key]}")
    return lines, common


def _compare_state(a: Source, b: Source, name: str, state: str) -> StateDelta:
    num_different, max_delta = 0, 0.0
    for (_, x), (_, y) in zip(chunks(a, name, state), chunks(b, name, state), strict=True):
        is_different = x.view(np.int32) != y.view(np.int32)
        if bool(is_different.any()):
            num_different += int(is_different.sum())
            with np.errstate(invalid="ignore"):  # inf - inf
                worst = float(np.abs(x.astype(np.float64) - y.astype(np.float64)).max())
            # A nan must win over every number, which max() alone would not promise.
            if max_delta == max_delta:
                max_delta = worst if worst != worst else max(max_delta, worst)
    return StateDelta(name, state, num_different, max_delta)
