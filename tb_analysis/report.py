"""Say a verdict: as a table for people, as JSON for programs.

print(table(verdict))
Path("verdict.json").write_text(json.dumps(as_json(verdict), indent=2))
"""

from __future__ import annotations

import math

from tb_analysis.runs import Group, Run
from tb_analysis.verdict import Comparison, Verdict

_COLUMNS = (
    "role",
    "run",
    "topology",
    "steps",
    "first common",
    "common",
    "|d| first",
    "max |d|",
    "mean |d|",
    "bound",
    "",
)
_LEFT_ALIGNED = 3


def table(verdict: Verdict) -> str:
    """One line per run, then the rule, then each failure by name, then PASS or FAIL."""
    rows = [_COLUMNS, _row(verdict.group.source, None, "")]
    rows += [_row(c.run, c, "") for c in verdict.controls]
    rows += [_row(c.run, c, "PASS" if c.is_pass else "FAIL") for c in verdict.comparisons]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < _LEFT_ALIGNED else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    lines.append("")
    for comparison in verdict.comparisons:
        lines.append(
            f"{comparison.run.name}: first step within {comparison.first_bound:.3g}; "
            f"all within {comparison.bound:.3g} = {comparison.bound_rule}"
        )
        lines += [f"  {failure.name}: {failure.text}" for failure in comparison.failures]
    lines.append(summary(verdict))
    return "\n".join(lines)


def summary(verdict: Verdict) -> str:
    """The verdict in one line."""
    if not verdict.comparisons:
        return "NO VERDICT: there is no Target to compare with the Source"
    failed = [c for c in verdict.comparisons if not c.is_pass]
    if failed:
        names = sorted({failure.name for c in failed for failure in c.failures})
        return f"FAIL: {len(failed)} of {len(verdict.comparisons)} Targets ({', '.join(names)})"
    worst = max(verdict.comparisons, key=lambda c: c.max_delta)
    return (
        f"PASS: {len(verdict.comparisons)} Target{'s' if len(verdict.comparisons) > 1 else ''}, "
        f"max |delta| {worst.max_delta:.3g} over {worst.num_common} steps, bound {worst.bound:.3g}"
    )


def listing(group: Group) -> str:
    return "\n".join(f"{run.role:8}{run.name}: {_span(run)}" for run in group.runs)


def as_json(verdict: Verdict) -> dict:
    """Numbers that are not finite become null."""
    return {
        "verdict": "PASS" if verdict.is_pass else "FAIL",
        "source": verdict.group.source.name,
        "source_topology": verdict.group.source.topology,
        "targets": [_comparison_json(c) for c in verdict.comparisons],
        "controls": [_comparison_json(c) for c in verdict.controls],
    }


def _comparison_json(comparison: Comparison) -> dict:
    numbers = {
        "first_delta": comparison.first_delta,
        "max_delta": comparison.max_delta,
        "mean_delta": comparison.mean_delta,
        "first_bound": comparison.first_bound,
        "bound": comparison.bound,
    }
    return {
        "run": comparison.run.name,
        "topology": comparison.run.topology,
        "first_common_step": comparison.first_common_step,
        "num_common_steps": comparison.num_common,
        **{key: value if math.isfinite(value) else None for key, value in numbers.items()},
        "bound_rule": comparison.bound_rule,
        "failures": [{"name": failure.name, "text": failure.text} for failure in comparison.failures],
    }


def _row(run: Run, comparison: Comparison | None, result: str) -> tuple[str, ...]:
    head = ((run.role or "?").capitalize(), run.name, run.label if run.topology else "?", _span(run))
    if comparison is None:
        return (*head, "", "", "", "", "", "", "")
    bound = f"{comparison.bound:.2e}" if math.isfinite(comparison.bound) else ""
    return (
        *head,
        str(comparison.first_common_step if comparison.num_common else "-"),
        str(comparison.num_common),
        f"{comparison.first_delta:.2e}",
        f"{comparison.max_delta:.2e}",
        f"{comparison.mean_delta:.2e}",
        bound,
        result,
    )


def _span(run: Run) -> str:
    return f"{run.curve.first_step}-{run.curve.last_step}"
