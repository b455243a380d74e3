"""Say verdicts: as a table for people, as a Markdown page for readers, as JSON for programs.

The idea: a verdict is of one Source; what is said is said of any number of them. Columns for grad norms and state
digests are there where they were judged.

    print(table([verdict]))
    Path("verdict.json").write_text(json.dumps(as_json([verdict]), indent=2))
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tb_analysis.runs import Run, resumed_at
from tb_analysis.verdict import Comparison, Verdict

_COLUMNS = ("role", "run", "topology", "steps", "first common", "common", "|d| first", "max |d|", "mean |d|", "bound")
_LEFT_ALIGNED = 3
_DIGEST_SHOWN = 12


def table(verdicts: Sequence[Verdict]) -> str:
    """One line per run, then the rules, then each failure by name, then PASS or FAIL."""
    with_norms, with_digests = _has_grad_norms(verdicts), _has_digests(verdicts)
    columns = [*_COLUMNS, *["grad norms"] * with_norms, *["digest"] * with_digests, ""]
    rows = [columns]
    for verdict in verdicts:
        compared = [(verdict.group.source, None), *((c.run, c) for c in (*verdict.controls, *verdict.comparisons))]
        rows += [_row(run, comparison, with_norms, with_digests) for run, comparison in compared]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < _LEFT_ALIGNED else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, "", *_rules(verdicts), summary(verdicts)])


def summary(verdicts: Sequence[Verdict]) -> str:
    """The verdicts in one line."""
    comparisons = _comparisons(verdicts)
    if not all(verdict.comparisons for verdict in verdicts):
        return "NO VERDICT: there is no Target to compare with the Source"
    failed = [c for c in comparisons if not c.is_pass]
    if failed:
        names = sorted({failure.name for c in failed for failure in c.failures})
        return f"FAIL: {len(failed)} of {len(comparisons)} Targets ({', '.join(names)})"
    worst = max(comparisons, key=lambda c: c.max_delta / c.bound)
    of_sources = f" of {len(verdicts)} Sources" if len(verdicts) > 1 else ""
    text = (
        f"PASS: {len(comparisons)} Target{'s' if len(comparisons) > 1 else ''}{of_sources}, "
        f"max |delta| {worst.max_delta:.3g} over {worst.num_common} steps, bound {worst.bound:.3g}"
    )
    if _has_grad_norms(verdicts):
        text += f"; grad norms within {max(c.grad_norm_delta or 0 for c in comparisons):.1e} of their size"
    if _has_digests(verdicts):
        text += "; digests equal"
    return text


def markdown(verdicts: Sequence[Verdict], title: str, picture: str | None) -> str:
    """A page: the picture (its file is looked for beside the page), a row per Target, and what the columns mean."""
    with_norms, with_digests = _has_grad_norms(verdicts), _has_digests(verdicts)
    lines = [f"# {title or 'Do the curves join?'}", ""]
    if picture is not None:
        lines += [f"![losses of all runs, and their distances]({picture.rpartition('/')[2]})", ""]
    lines += [f"**{summary(verdicts)}**", ""]
    columns = ["Source", "Target", "resumed", "steps", "first \\|delta\\|", "max \\|delta\\|", "control's max", "bound"]
    columns += ["grad norms", "control's"] * with_norms + ["digest at save", "digest after load"] * with_digests
    rows = [[*columns, "verdict"]]
    rows.append(["---"] * len(rows[0]))
    for verdict in verdicts:
        rows += [_markdown_row(verdict, c, with_norms, with_digests) for c in verdict.comparisons]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines.append("")
    if failed := [f"* {c.run.name}: {f.name}: {f.text}" for c in _comparisons(verdicts) for f in c.failures]:
        lines += [*failed, ""]
    lines += ["\\|delta\\|: distance of the losses to those of the uninterrupted Source. *Control*: the Source resumed"]
    lines += ["under its own topology with another micro batch: only the order of float sums differs. Bound:"]
    lines += [" or ".join(dict.fromkeys(c.bound_rule.replace("|", "\\|") for c in _comparisons(verdicts))) + "."]
    if with_norms:
        lines += ["Grad norms: largest distance to the Source's, relative; the control's beside it."]
    if with_digests:
        lines += [f"Digests: {_DIGEST_SHOWN} of 32 digits, read from the Source's log and from the Target's."]
    return "\n".join(lines) + "\n"


def as_json(verdicts: Sequence[Verdict]) -> dict:
    """Numbers that are not finite become null. One verdict is the object itself, several are its `groups`."""
    if len(verdicts) == 1:
        return _verdict_json(verdicts[0])
    is_pass = all(verdict.is_pass for verdict in verdicts)
    return {"verdict": "PASS" if is_pass else "FAIL", "groups": [_verdict_json(verdict) for verdict in verdicts]}


def _verdict_json(verdict: Verdict) -> dict:
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
    if comparison.grad_norm_delta is not None:
        numbers["grad_norm_delta"] = comparison.grad_norm_delta
    digests = {"digest_saved": comparison.digest_saved, "digest_loaded": comparison.digest_loaded}
    return {
        "run": comparison.run.name,
        "topology": comparison.run.topology,
        "first_common_step": comparison.first_common_step,
        "num_common_steps": comparison.num_common,
        **{key: value if math.isfinite(value) else None for key, value in numbers.items()},
        "bound_rule": comparison.bound_rule,
        **{key: value for key, value in digests.items() if value is not None},
        "failures": [{"name": failure.name, "text": failure.text} for failure in comparison.failures],
    }


def _rules(verdicts: Sequence[Verdict]) -> list[str]:
    """What each Target was held to, once if it is the same for all, and how it failed."""
    rules = {
        c.run.name: f"first step within {c.first_bound:.3g}; all within {c.bound:.3g} = {c.bound_rule}"
        for c in _comparisons(verdicts)
    }
    is_same = len(rules) > 1 and len(set(rules.values())) == 1
    lines = [f"every Target: {next(iter(rules.values()))}"] if is_same else []
    for comparison in _comparisons(verdicts):
        name = comparison.run.name
        if not is_same or comparison.failures:
            lines.append(f"{name}:" if is_same else f"{name}: {rules[name]}")
        lines += [f"  {failure.name}: {failure.text}" for failure in comparison.failures]
    return lines


def _row(run: Run, comparison: Comparison | None, with_norms: bool, with_digests: bool) -> list[str]:
    head = [(run.role or "?").capitalize(), run.name, run.label if run.topology else "?", _span(run)]
    if comparison is None:
        return [*head, *[""] * (len(_COLUMNS) - len(head) + with_norms + with_digests + 1)]
    c = comparison
    numbers = [
        str(c.first_common_step if c.num_common else "-"),
        str(c.num_common),
        f"{c.first_delta:.2e}",
        f"{c.max_delta:.2e}",
        f"{c.mean_delta:.2e}",
        f"{c.bound:.2e}" if math.isfinite(c.bound) else "",
    ]
    is_equal = c.digest_saved is not None and c.digest_saved == c.digest_loaded
    return [
        *head,
        *numbers,
        *[_relative(c.grad_norm_delta)] * with_norms,
        *["equal" if is_equal else "NOT EQUAL"] * with_digests,
        _result(c) if run.role == "target" else "",
    ]


def _markdown_row(verdict: Verdict, c: Comparison, with_norms: bool, with_digests: bool) -> list[str]:
    controls = [control.max_delta for control in verdict.controls]
    norms = [control.grad_norm_delta for control in verdict.controls if control.grad_norm_delta is not None]
    cells = [
        verdict.group.source.label,
        c.run.label,
        f"{c.run.route or ''} at {resumed_at(c.run)}",
        _span(c.run),
        f"{c.first_delta:.1e}",
        f"{c.max_delta:.1e}",
        f"{max(controls):.1e}" if controls else "-",
        f"{c.bound:.1e}",
    ]
    if with_norms:
        cells += [_relative(c.grad_norm_delta), _relative(max(norms, default=None))]
    if with_digests:
        cells += [f"`{(digest or 'none')[:_DIGEST_SHOWN]}`" for digest in (c.digest_saved, c.digest_loaded)]
    return [*cells, _result(c)]


def _comparisons(verdicts: Sequence[Verdict]) -> list[Comparison]:
    return [comparison for verdict in verdicts for comparison in verdict.comparisons]


def _has_grad_norms(verdicts: Sequence[Verdict]) -> bool:
    return any(c.grad_norm_delta is not None for c in _comparisons(verdicts))


def _has_digests(verdicts: Sequence[Verdict]) -> bool:
    return any(c.run.digests is not None for c in _comparisons(verdicts))


def _relative(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _result(comparison: Comparison) -> str:
    return "PASS" if comparison.is_pass else "FAIL"


def _span(run: Run) -> str:
    return f"{run.curve.first_step}-{run.curve.last_step}"
