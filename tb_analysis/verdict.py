"""Judge whether each Target goes on as the Source did.

The idea: two numbers per Target, |delta| at its first common step and the largest |delta| over all common
steps, each against a bound whose origin is printed; and a name for every other way a resume goes wrong.
Where asked, two more: the largest relative distance of the grad norms, and whether the digest of the state that
was loaded equals the one at save.

The bound of the first step is ``--first_tolerance``, else by precision: it can be tight, since the state was
just loaded and only one forward pass lies between. The bound of the largest is, first found wins:

1. ``--tolerance``, if given;
2. with control runs (the Source's topology, only the order of float sums changed): twice the largest
   |delta| of any control on the steps judged, at least two float32 roundings of the largest loss,
   because an event file keeps float32 and a control may agree to the last bit by luck;
3. by precision: fp32 5e-4, fp16 5e-2, bf16 1e-1. An unknown precision is judged as fp32.

    verdict = judge(group, Limits())
    print(verdict.is_pass, verdict.comparisons[0].max_delta)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from tb_analysis.curves import Curve
from tb_analysis.runs import Group, Run, resumed_at

FIRST_TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 2e-2}
TOLERANCE = {"fp32": 5e-4, "fp16": 5e-2, "bf16": 1e-1}
CONTROL_FACTOR = 2.0

_COARSENESS = ("fp32", "fp16", "bf16")
_MAX_STEPS_NAMED = 6


@dataclass(frozen=True)
class Limits:
    """What the user asked for; None = by rule."""

    first_tolerance: float | None = None
    tolerance: float | None = None
    precision: str | None = None
    """Overrides what the runs say of themselves."""
    last_step: int | None = None
    """Judge up to this step; None = the Source's last."""
    grad_norm_tolerance: float | None = None
    """Bound of the relative distance of the grad norms; None = they are not judged."""
    with_digests: bool = False
    """Whether the digest at save and that after the load must be known and equal."""


@dataclass(frozen=True)
class Failure:
    """One named reason to fail. ``name`` is stable, for scripts; ``text`` is for people."""

    name: str
    text: str


@dataclass(frozen=True)
class Comparison:
    """One Target (or control) held against the Source."""

    run: Run
    steps: np.ndarray
    deltas: np.ndarray
    """target - source at ``steps``, signed."""
    bound: float
    first_bound: float
    bound_rule: str
    failures: tuple[Failure, ...] = field(default=())
    grad_norm_delta: float | None = None
    """Largest relative distance of the grad norms on the common steps; None = not judged."""
    digest_saved: str | None = None
    """Of the Source's state at the iteration that was resumed from; None = not known."""
    digest_loaded: str | None = None

    @property
    def is_pass(self) -> bool:
        return not self.failures

    @property
    def num_common(self) -> int:
        return len(self.steps)

    @property
    def first_common_step(self) -> int | None:
        return int(self.steps[0]) if self.num_common else None

    @property
    def first_delta(self) -> float:
        return float(abs(self.deltas[0])) if self.num_common else float("nan")

    @property
    def max_delta(self) -> float:
        """NaN if any delta is."""
        return float(np.max(np.abs(self.deltas))) if self.num_common else float("nan")

    @property
    def mean_delta(self) -> float:
        return float(np.mean(np.abs(self.deltas))) if self.num_common else float("nan")


@dataclass(frozen=True)
class Verdict:
    group: Group
    comparisons: tuple[Comparison, ...]
    """One per Target."""
    controls: tuple[Comparison, ...]

    @property
    def is_pass(self) -> bool:
        return bool(self.comparisons) and all(c.is_pass for c in self.comparisons)


def judge(group: Group, limits: Limits) -> Verdict:
    """Compare every Target of the group; a group without Targets has no PASS."""
    last_step = limits.last_step if limits.last_step is not None else group.source.curve.last_step
    source = group.source.curve.up_to(last_step)
    targets = tuple(_judge_target(group, run, source, last_step, limits) for run in group.targets)
    controls = tuple(_judge_control(group, run, source, last_step, limits) for run in group.controls)
    return Verdict(group, targets, controls)


def _judge_target(group: Group, run: Run, source: Curve, last_step: int, limits: Limits) -> Comparison:
    curve = run.curve.up_to(last_step)
    steps, deltas = source.delta(curve)
    first_bound = _first_bound(group, run, limits)
    bound, rule = _bound(group, run, source, steps, limits)
    failures = _continuity_failures(group.source, run, source, curve)
    if len(steps):
        failures += _control_failures(group, source, steps, limits)
        failures += _size_failures(steps, deltas, first_bound, bound, rule)
        failures += _shift_failures(source, curve, _float32_floor(source))
    comparison = _with_state(group, Comparison(run, steps, deltas, bound, first_bound, rule), last_step)
    failures += _state_failures(comparison, limits)
    return replace(comparison, failures=tuple(failures))


def _judge_control(group: Group, run: Run, source: Curve, last_step: int, limits: Limits) -> Comparison:
    """A control sets the bound, it is not judged by it; what makes it useless fails the Targets."""
    steps, deltas = source.delta(run.curve.up_to(last_step))
    comparison = Comparison(run, steps, deltas, float("nan"), _first_bound(group, run, limits), "control")
    return _with_state(group, comparison, last_step)


def _with_state(group: Group, comparison: Comparison, last_step: int) -> Comparison:
    """What speaks for a resume beside its losses, as far as the runs tell it."""
    run, source = comparison.run, group.source
    grad_norm_delta = None
    if run.grad_norm is not None and source.grad_norm is not None:
        norms = source.grad_norm.up_to(last_step)
        steps, deltas = norms.delta(run.grad_norm)
        relative = np.abs(deltas) / norms.values[np.isin(norms.steps, steps)]
        grad_norm_delta = float(np.max(relative)) if len(relative) else float("nan")
    return replace(
        comparison,
        grad_norm_delta=grad_norm_delta,
        digest_saved=source.digests.saved.get(resumed_at(run)) if source.digests else None,
        digest_loaded=run.digests.loaded if run.digests else None,
    )


def _precision(group: Group, run: Run, limits: Limits) -> str:
    if limits.precision is not None:
        return limits.precision
    known = [p for p in (group.source.precision, run.precision) if p in _COARSENESS]
    return max(known, key=_COARSENESS.index, default="fp32")


def _first_bound(group: Group, run: Run, limits: Limits) -> float:
    if limits.first_tolerance is not None:
        return limits.first_tolerance
    return FIRST_TOLERANCE[_precision(group, run, limits)]


def _bound(group: Group, run: Run, source: Curve, steps: np.ndarray, limits: Limits) -> tuple[float, str]:
    if limits.tolerance is not None:
        return limits.tolerance, "--tolerance"
    spreads = [spread for control in group.controls if (spread := _spread(source, control, steps)) is not None]
    if spreads:
        floor = _float32_floor(source)
        if CONTROL_FACTOR * max(spreads) < floor:
            return floor, f"two float32 roundings of the loss (control differs by {max(spreads):.2g} only)"
        return CONTROL_FACTOR * max(spreads), f"{CONTROL_FACTOR:g} x the control's max |delta|"
    precision = _precision(group, run, limits)
    return TOLERANCE[precision], f"default for {precision}, no control run"


def _spread(source: Curve, control: Run, steps: np.ndarray) -> float | None:
    """Largest |delta| of a control on the judged steps; None if it has none of them or is not finite."""
    common, deltas = source.delta(control.curve)
    deltas = deltas[np.isin(common, steps)]
    return float(np.max(np.abs(deltas))) if len(deltas) and np.isfinite(deltas).all() else None


def _float32_floor(source: Curve) -> float:
    finite = source.values[np.isfinite(source.values)]
    return 2.0 * float(np.spacing(np.float32(np.max(np.abs(finite), initial=1.0))))


def _continuity_failures(source_run: Run, run: Run, source: Curve, curve: Curve) -> list[Failure]:
    """Everything that is wrong with the steps and values themselves, before any delta is looked at."""
    failures = []
    for who, one in (("Source", source), ("Target", curve)):
        if bad := one.non_finite_steps():
            failures.append(Failure("not-finite", f"{who} has NaN or infinite values at {_steps(bad)}"))

    resumed = run.resumed_iteration
    if not len(curve):
        return [*failures, Failure("no-overlap", f"no step at or before {source.last_step} in {run.name}")]
    if resumed is not None and curve.first_step <= resumed:
        failures.append(
            Failure("started-again", f"resumed from iteration {resumed}, but the first step is {curve.first_step}")
        )
    if resumed is None and curve.first_step <= source_run.curve.first_step:
        failures.append(
            Failure(
                "started-again",
                f"the first step is {curve.first_step}, as in the Source: trained from scratch, not resumed",
            )
        )
    common = np.intersect1d(source.steps, curve.steps)
    if not len(common):
        text = (
            f"Source has steps {source.first_step}..{source.last_step}, "
            f"Target {curve.first_step}..{curve.last_step}: none in common"
        )
        return [*failures, Failure("no-overlap", text)]

    begin = curve.first_step if resumed is None else min(resumed + 1, curve.first_step)
    missing = np.setdiff1d(source.steps[source.steps >= begin], curve.steps)
    if len(missing):
        failures.append(Failure("missing-steps", f"Target lacks {_steps(missing)}, which the Source has"))
    return failures


def _control_failures(group: Group, source: Curve, steps: np.ndarray, limits: Limits) -> list[Failure]:
    """A control that is off at its first step has more changed than the order of sums: no yardstick."""
    if limits.tolerance is not None:
        return []
    failures = []
    for control in group.controls:
        common, deltas = source.delta(control.curve)
        if _spread(source, control, steps) is None:
            text = f"{control.name} has no finite value on the steps judged: remove it, or run it again"
            failures.append(Failure("bad-control", text))
        elif abs(deltas[0]) > (first_bound := _first_bound(group, control, limits)):
            text = (
                f"{control.name} differs by {abs(deltas[0]):.2g} already at step {common[0]} "
                f"(bound {first_bound:.2g}): more than the order of float sums was changed in it"
            )
            failures.append(Failure("bad-control", text))
    return failures


def _size_failures(steps: np.ndarray, deltas: np.ndarray, first_bound: float, bound: float, rule: str) -> list[Failure]:
    # Written as "not <=", so that a NaN fails.
    failures = []
    first, largest = abs(deltas[0]), np.max(np.abs(deltas))
    if not first <= first_bound:
        text = f"|delta| {first:.3g} at the first common step {steps[0]}, bound {first_bound:.3g}"
        failures.append(Failure("first-step", text))
    if not largest <= bound:
        where = steps[np.argmax(np.abs(deltas))]
        text = f"max |delta| {largest:.3g} at step {where}, bound {bound:.3g} ({rule})"
        failures.append(Failure("too-far", text))
    return failures


def _state_failures(comparison: Comparison, limits: Limits) -> list[Failure]:
    failures = []
    bound = limits.grad_norm_tolerance
    if bound is not None:
        distance = comparison.grad_norm_delta
        if distance is None:
            failures.append(Failure("no-grad-norm", "no grad norms to compare"))
        elif not distance <= bound:  # a NaN fails
            failures.append(
                Failure("grad-norm", f"grad norms differ by {distance:.3g} of their size, bound {bound:.3g}")
            )
    if limits.with_digests:
        saved, loaded = comparison.digest_saved, comparison.digest_loaded
        if saved is None or loaded is None:
            at = resumed_at(comparison.run)
            text = f"at save of iteration {at}: {saved or 'none found'}; after the load: {loaded or 'none found'}"
            failures.append(Failure("no-digest", text))
        elif saved != loaded:
            failures.append(Failure("digest", f"{saved} at save, {loaded} after the load: another state was resumed"))
    return failures


def _shift_failures(source: Curve, curve: Curve, floor: float) -> list[Failure]:
    """A Target that fits better one step off is off by one, however loose the bounds are."""
    interval = int(np.median(np.diff(source.steps))) if len(source) > 1 else 1
    distance = {}
    for shift in (0, -interval, interval):
        steps, deltas = source.delta(curve, shift)
        if len(steps) >= 5 and np.isfinite(deltas).all():
            distance[shift] = float(np.mean(np.abs(deltas)))
    if 0 not in distance:
        return []
    best = min(distance, key=distance.__getitem__)
    if best == 0 or distance[0] <= 10 * floor or distance[best] > distance[0] / 2:
        return []
    text = (
        f"shifted by {best:+d} step the Target fits the Source better "
        f"(mean |delta| {distance[best]:.2g} instead of {distance[0]:.2g})"
    )
    return [Failure("shifted", text)]


def _steps(steps: list[int] | np.ndarray) -> str:
    named = ", ".join(str(int(step)) for step in steps[:_MAX_STEPS_NAMED])
    more = f" and {len(steps) - _MAX_STEPS_NAMED} more" if len(steps) > _MAX_STEPS_NAMED else ""
    return f"step{'s' if len(steps) > 1 else ''} {named}{more}"
