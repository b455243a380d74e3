"""Draw verdicts of many Targets, of one Source or of several: all losses in one plot, and a lane for each Target below.

The idea: curves that lie on one another cannot be told apart by colour alone, so they share the line: each draws
its own dashes, in the gaps of the others, and its own marks at every n-th step. Distances are small multiples of
one float rounding and would cover each other on any axis, so each Target has a lane: a cell per step, dark as
|delta| nears its bound and red beyond, and beside it the largest on a log axis with the control's as a band.

    figure = draw_lanes(verdicts, Labels(title="Figure 7a"))
    save(figure, Path("fig7a.png"))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from tb_analysis.picture import BOUND_COLOUR, MAX_TARGETS, PASS_COLOUR, SOURCE_COLOUR, Labels
from tb_analysis.report import summary
from tb_analysis.runs import Run, resumed_at
from tb_analysis.verdict import Comparison, Verdict

# Twelve hues of different lightness; with the marks they also stay apart for the colour-blind and in grey.
_COLOURS = (
    "#0B3C5D",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#B8860B",
    "#56B4E9",
    "#882255",
    "#117733",
    "#7B68C8",
    "#E4572E",
    "#6B6B6B",
    "#2F9599",
)
_MARKS = ("o", "s", "^", "v", "D", "P", "X", "<", ">", "d", "h", "p")
_DASH = 3.5
"""Length of a dash, in line widths."""
_SHARE = LinearSegmentedColormap.from_list("share", ["#F3F6F9", "#9DBFDC", "#1F4E79"]).with_extremes(over=BOUND_COLOUR)
_NOT_FINITE_COLOUR = "#000000"


@dataclass(frozen=True)
class _Lane:
    verdict: Verdict
    comparison: Comparison
    label: str
    style: int
    """Index of colour and mark: the same for the same Target topology of the same Source."""

    @property
    def colour(self) -> str:
        return _COLOURS[self.style % len(_COLOURS)]

    @property
    def mark(self) -> str:
        return _MARKS[self.style % len(_MARKS)]


def draw_lanes(verdicts: Sequence[Verdict], labels: Labels) -> Figure:
    """Every Target of every verdict; there must be one at least."""
    lanes = _lanes(verdicts)
    lanes_height = 1.25 + 0.27 * len(lanes)
    figure = Figure(figsize=(11.0, 5.4 + lanes_height))
    figure.set_layout_engine("constrained", h_pad=0.06, w_pad=0.06)
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(5.4, lanes_height))  # type: ignore[misc]
    is_pass = all(verdict.is_pass for verdict in verdicts)
    above.suptitle(labels.title or "Universal checkpoint", fontsize=14, fontweight="bold")
    losses = above.subplots()
    losses.set_title(summary(verdicts), fontsize=10.5, color=PASS_COLOUR if is_pass else BOUND_COLOUR)
    _draw_losses(losses, verdicts, lanes, labels)
    cells, largest = below.subplots(1, 2, width_ratios=(3.4, 1.0), sharey=True)
    _draw_cells(cells, lanes, labels)
    _draw_largest(largest, lanes)
    return figure


def _lanes(verdicts: Sequence[Verdict]) -> list[_Lane]:
    """Named by what differs: the Targets of one Source, or the Sources of one Target."""
    names = _names(verdicts)
    routes = {c.run.route for verdict in verdicts for c in verdict.comparisons}
    styles = {name: i for i, name in enumerate(dict.fromkeys(names.values()))}
    return [
        _Lane(verdict, c, f"{name} \N{MIDDLE DOT} {c.run.route}" if len(routes) > 1 else name, styles[name])
        for verdict in verdicts
        for c in verdict.comparisons
        for name in [names[verdict.group.source.name, c.run.name]]
    ]


def _names(verdicts: Sequence[Verdict]) -> dict[tuple[str, str], str]:
    """By the names of Source and Target."""
    pairs = [(verdict.group.source, run) for verdict in verdicts for run in verdict.group.targets]
    if len(verdicts) == 1:
        return {(source.name, run.name): run.label for source, run in pairs}
    if len({run.label for _, run in pairs}) == 1:
        return {(source.name, run.name): f"from {source.label}" for source, run in pairs}
    arrow = "\N{RIGHTWARDS ARROW}"
    return {(source.name, run.name): f"{source.label} {arrow} {run.label}" for source, run in pairs}


def _draw_losses(axis: Axes, verdicts: Sequence[Verdict], lanes: list[_Lane], labels: Labels) -> None:
    for i, verdict in enumerate(verdicts):
        curve = verdict.group.source.curve
        whose = f"Source {verdict.group.source.label}" if len(verdicts) == 1 else "each Source"
        label = None if i else f"{whose}, uninterrupted"
        axis.plot(
            curve.steps, curve.values, color=SOURCE_COLOUR, linewidth=8.0, solid_capstyle="round", label=label, zorder=1
        )
    drawn = list({lane.style: lane for lane in reversed(lanes)}.values())[::-1]
    # Where there is room the legend says what the marks are; eleven times would say less.
    resumed = "resumed as " if len(verdicts) == 1 and len(drawn) <= MAX_TARGETS else ""
    for i, lane in enumerate(drawn):
        if len(verdicts) > 1:
            _draw_share(axis, lane.verdict.group.source, lane, i, len(drawn), last=resumed_at(lane.comparison.run))
        label = resumed + lane.label.partition(" \N{MIDDLE DOT}")[0]
        _draw_share(axis, lane.comparison.run, lane, i, len(drawn), label=label)
    for step in sorted({resumed_at(lane.comparison.run) for lane in lanes}):
        axis.axvline(step + 0.5, color="#333333", linewidth=1.1, linestyle=(0, (4, 3)), zorder=2)
        axis.annotate(
            f"saved and resumed at {step}",
            xy=(step + 0.5, 0.03),
            xycoords=axis.get_xaxis_transform(),
            xytext=(-6, 0),
            textcoords="offset points",
            ha="right",
            fontsize=9.5,
            color="#333333",
        )
    axis.set_xlabel(labels.x)
    axis.set_ylabel(labels.y)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=13, integer=True))
    axis.margins(x=0.015)
    axis.grid(True, linewidth=0.5, color="#E2E2E2")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper right", ncols=2, fontsize=9.5, framealpha=0.95, edgecolor="#CCCCCC", handlelength=2.6)


def _draw_share(
    axis: Axes, run: Run, lane: _Lane, index: int, count: int, label: str | None = None, last: int | None = None
) -> None:
    """This run's part of a line that `count` runs draw together."""
    curve = run.curve if last is None else run.curve.up_to(last)
    dashes = ((count - index) % count * _DASH, (_DASH, (count - 1) * _DASH)) if count > 1 else "-"
    axis.plot(curve.steps, curve.values, color=lane.colour, linewidth=2.0, linestyle=dashes, zorder=3)
    # A line of its own for the marks: in the legend they stand on a plain piece of line.
    axis.plot(
        curve.steps[index::count],
        curve.values[index::count],
        color=lane.colour,
        marker=lane.mark,
        markersize=6.5,
        markeredgecolor="white",
        markeredgewidth=0.7,
        linestyle="none",
        label=label,
        zorder=4,
    )


def _draw_cells(axis: Axes, lanes: list[_Lane], labels: Labels) -> None:
    steps = np.unique(np.concatenate([lane.comparison.steps for lane in lanes]))
    shares = np.ma.masked_all((len(lanes), len(steps)))
    for row, lane in enumerate(lanes):
        shares[row, np.isin(steps, lane.comparison.steps)] = np.abs(lane.comparison.deltas) / lane.comparison.bound
    edges = np.append(steps - 0.5, steps[-1] + 0.5)
    mesh = axis.pcolormesh(
        edges,
        np.arange(len(lanes) + 1) - 0.5,
        np.ma.masked_invalid(shares),
        cmap=_SHARE,
        vmin=0.0,
        vmax=1.0,
        edgecolors="white",
        linewidth=1.0,
    )
    for row, column in zip(*np.nonzero(~np.isfinite(shares.filled(0.0)))):
        axis.plot(steps[column], row, marker="x", color=_NOT_FINITE_COLOUR, markersize=6)
    axis.set_ylim(len(lanes) - 0.5, -0.5)
    axis.set_yticks(range(len(lanes)), [lane.label for lane in lanes], fontsize=9.5)
    for lane, tick in zip(lanes, axis.get_yticklabels()):
        tick.set_color(lane.colour)
        tick.set_fontweight("bold")
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=11, integer=True))
    axis.spines[:].set_visible(False)
    axis.set_xlabel(labels.x)
    axis.set_title("|delta| of the loss at each step, as a share of its bound", fontsize=10)
    bar = axis.figure.colorbar(mesh, ax=axis, orientation="horizontal", aspect=60, pad=0.01, extend="max")
    bar.set_ticks([0.0, 0.5, 1.0], labels=["0", "half", "bound"])
    bar.ax.tick_params(labelsize=8.5, length=2)
    bar.outline.set_visible(False)


def _draw_largest(axis: Axes, lanes: list[_Lane]) -> None:
    controls = [max((c.max_delta for c in lane.verdict.controls), default=0.0) for lane in lanes]
    numbers = [lane.comparison.max_delta for lane in lanes]
    bounds = [lane.comparison.bound for lane in lanes]
    positive = [n for n in (*controls, *numbers, *bounds) if np.isfinite(n) and n > 0]
    # A distance of exactly 0 has no place on a log axis: it is drawn at its left end.
    left, right = 10.0 ** np.floor(np.log10(min(positive) / 1.5)), max(positive) * 2.0
    axis.set_xscale("log")
    axis.set_xlim(left, right)
    for row, lane in enumerate(lanes):
        if controls[row] > 0:
            axis.barh(row, controls[row] - left, left=left, height=1.0, color="#DCDCDC", zorder=1)
        axis.plot([bounds[row]] * 2, [row - 0.5, row + 0.5], color=BOUND_COLOUR, linewidth=1.8, zorder=2)
        if np.isfinite(numbers[row]):
            at = max(numbers[row], left)
            axis.plot(at, row, lane.mark, color=lane.colour, markersize=7, clip_on=False, zorder=3)
        is_pass = lane.comparison.is_pass
        axis.annotate(
            f"{'0' if numbers[row] == 0 else f'{numbers[row]:.1e}'}  {'PASS' if is_pass else 'FAIL'}",
            xy=(1.03, row),
            xycoords=axis.get_yaxis_transform(),
            va="center",
            fontsize=9.5,
            color=PASS_COLOUR if is_pass else BOUND_COLOUR,
            annotation_clip=False,
        )
    axis.xaxis.set_major_locator(LogLocator(numticks=5))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="y", length=0, labelleft=False)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_title("largest |delta|", fontsize=10)
    has_control = any(control > 0 for control in controls)
    axis.set_xlabel("grey: the control's    red: bound" if has_control else "red: bound", fontsize=9)
