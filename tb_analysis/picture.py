"""Draw a verdict of a few Targets: losses on one axis, and below them |delta| on a log axis beside its bound.

The idea: the Source is a broad pale line and a Target a thin dark one on top of it, so both stay visible
where they coincide. Colours are Okabe and Ito's, which the colour-blind can tell apart; each run has its own
line style as well.

    figure = draw(verdict, Labels(title="", x="Training step", y="LM loss"))
    save(figure, Path("ucp_training_loss.png"))
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from tb_analysis.runs import Run, resumed_at
from tb_analysis.verdict import Comparison, Verdict

DPI = 150

SOURCE_COLOUR = "#8CC5E8"
TARGET_COLOURS = ("#0B3C5D", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
CONTROL_COLOUR = "#7A7A7A"
BOUND_COLOUR = "#B22222"
PASS_COLOUR = "#1B6E3C"

MAX_TARGETS = len(TARGET_COLOURS)
"""More are drawn by ``lanes``, and fewer where --lanes asks for it."""

_LINE_STYLES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (8, 2)))
_MAX_NAMES_IN_TITLE = 3


@dataclass(frozen=True)
class Labels:
    """Texts of the picture; an empty title is made from the runs."""

    title: str = ""
    x: str = "Training step"
    y: str = "LM loss"


def draw(verdict: Verdict, labels: Labels) -> Figure:
    """The figure of a verdict; with no Target only the loss panel is there."""
    if not verdict.comparisons:
        figure, (upper,) = _figure((1.0,), height=4.6)
        _draw_losses(upper, verdict, labels)
        upper.set_xlabel(labels.x)
        figure.suptitle(labels.title or "Training loss", fontsize=13, fontweight="bold")
        return figure
    figure, (upper, lower) = _figure((1.6, 1.0), height=7.2 + 0.2 * (len(verdict.comparisons) + len(verdict.controls)))
    _draw_losses(upper, verdict, labels)
    _draw_deltas(lower, verdict)
    lower.set_xlabel(labels.x)
    figure.suptitle(labels.title or _title(verdict), fontsize=13, fontweight="bold")
    return figure


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def use_seaborn() -> bool:
    """Seaborn's look, for the figures drawn afterwards; False if seaborn is not installed."""
    try:
        import seaborn
    except ImportError:
        return False
    seaborn.set_theme(style="whitegrid")
    return True


def _figure(heights: tuple[float, ...], height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for axis in axes:
        axis.grid(True, which="major", linewidth=0.5, color="#DDDDDD")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=11, integer=True))
    figure.set_layout_engine("constrained", h_pad=0.08, hspace=0.04)
    return figure, list(axes)


def _draw_losses(axis: Axes, verdict: Verdict, labels: Labels) -> None:
    source = verdict.group.source
    curve = source.curve
    axis.plot(
        curve.steps,
        curve.values,
        color=SOURCE_COLOUR,
        linewidth=5.0,
        solid_capstyle="round",
        label=f"Source  {_legend(source)}",
    )
    for i, run in enumerate(verdict.group.targets):
        axis.plot(
            run.curve.steps,
            run.curve.values,
            color=TARGET_COLOURS[i % len(TARGET_COLOURS)],
            linestyle=_LINE_STYLES[i % len(_LINE_STYLES)],
            linewidth=1.3,
            label=f"Target  {_legend(run)}",
        )
    _mark_resume(axis, verdict, with_text=True)
    axis.set_ylabel(labels.y)
    axis.legend(loc="upper right", frameon=True, framealpha=0.95, edgecolor="#CCCCCC", fontsize=10)


def _draw_deltas(axis: Axes, verdict: Verdict) -> None:
    compared = [*verdict.controls, *verdict.comparisons]
    magnitudes = [np.abs(c.deltas[np.isfinite(c.deltas)]) for c in compared]
    bounds = sorted({comparison.bound for comparison in verdict.comparisons})
    positive = np.concatenate([*(m[m > 0] for m in magnitudes), np.array(bounds)])
    # Whole decades. A delta of exactly 0 has no place on a log axis: it is drawn at the bottom, which lies
    # clearly below the smallest other one.
    bottom = 10.0 ** np.floor(np.log10(positive.min() / 2))
    top = 10.0 ** np.ceil(np.log10(positive.max() * 1.5))

    for comparison in verdict.controls:
        _draw_delta(axis, comparison, bottom, CONTROL_COLOUR, "-", "control")
    for i, comparison in enumerate(verdict.comparisons):
        colour = TARGET_COLOURS[i % len(TARGET_COLOURS)]
        style = _LINE_STYLES[i % len(_LINE_STYLES)]
        _draw_delta(axis, comparison, bottom, colour, style, "Target")
    for bound in bounds:
        rule = next(c.bound_rule for c in verdict.comparisons if c.bound == bound)
        label = f"bound  {bound:.2g}  =  {rule}"
        axis.axhline(bound, color=BOUND_COLOUR, linewidth=1.3, linestyle=(0, (7, 3)), label=label)

    axis.set_yscale("log")
    axis.set_ylim(bottom, top)
    axis.yaxis.set_major_locator(LogLocator(numticks=7))
    axis.yaxis.set_minor_formatter(NullFormatter())
    _mark_resume(axis, verdict, with_text=False)
    has_zero = any((m == 0).any() for m in magnitudes)
    axis.set_ylabel("|delta| to the Source" + ("\n(0 drawn at the bottom)" if has_zero else ""))
    # Above the panel and not inside: no corner of it is free for sure.
    legend = axis.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        frameon=False,
        fontsize=9.5,
        title=_stamp(verdict),
        title_fontproperties={"weight": "bold", "size": 11},
        alignment="left",
        borderaxespad=0.3,
        handlelength=3.0,
    )
    legend.get_title().set_color(PASS_COLOUR if verdict.is_pass else BOUND_COLOUR)


def _draw_delta(axis: Axes, comparison: Comparison, bottom: float, colour: str, style: str | tuple, role: str) -> None:
    magnitude = np.abs(comparison.deltas)
    # where(), not maximum(): a NaN must stay a gap in the line.
    shown = np.where(magnitude == 0, bottom, magnitude)
    label = f"{role}  {_short(comparison.run)}:  {_numbers(comparison)}"
    axis.plot(
        comparison.steps,
        shown,
        color=colour,
        linestyle=style,
        linewidth=1.1,
        marker="o",
        markersize=2.6,
        clip_on=False,  # the bottom is the axis itself
        label=label,
    )


def _mark_resume(axis: Axes, verdict: Verdict, with_text: bool) -> None:
    resumed = sorted({resumed_at(run) for run in verdict.group.targets})
    for step in resumed:
        axis.axvline(step + 0.5, color="#555555", linewidth=0.9, linestyle=":")
    if with_text and resumed:
        axis.annotate(
            f"saved and resumed at {resumed[0]}",
            xy=(resumed[0] + 0.5, 0.02),
            xycoords=axis.get_xaxis_transform(),
            xytext=(-6, 2),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color="#444444",
        )


def _title(verdict: Verdict) -> str:
    names = list(dict.fromkeys(run.topology or run.name for run in verdict.group.targets))
    targets = ", ".join(names) if len(names) <= _MAX_NAMES_IN_TITLE else f"{len(names)} topologies"
    source = verdict.group.source
    return f"Universal checkpoint: {source.topology or source.name}  \N{RIGHTWARDS ARROW}  {targets}"


def _stamp(verdict: Verdict) -> str:
    if verdict.is_pass:
        return "PASS: the Target goes on as the Source did" if len(verdict.comparisons) == 1 else "PASS"
    names = sorted({failure.name for c in verdict.comparisons for failure in c.failures})
    return f"FAIL: {', '.join(names)}"


def _numbers(comparison: Comparison) -> str:
    if not comparison.num_common:
        return "no common step"
    first, largest, mean = comparison.first_delta, comparison.max_delta, comparison.mean_delta
    return f"first {_number(first)},  max {_number(largest)},  mean {_number(mean)}"


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _legend(run: Run) -> str:
    return f"{run.label}   steps {run.curve.first_step}-{run.curve.last_step}"


def _short(run: Run) -> str:
    return run.topology or run.name
