"""The pictures, looked at as figure objects: what is drawn, and that no two texts cover each other."""

from itertools import combinations

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.text import Text

from tb_analysis.curves import Curve
from tb_analysis.lanes import draw_lanes
from tb_analysis.picture import BOUND_COLOUR, Labels, draw, save
from tb_analysis.runs import Run, group
from tb_analysis.verdict import Limits, judge

STEPS = np.arange(1, 201)
LOSSES = 6 + 4.8 * np.exp(-STEPS / 45)


def verdict(num_targets: int = 1, extra: float = 2e-6, with_control: bool = True):
    tail = STEPS[100:]
    runs = [Run("source", Curve(STEPS, LOSSES), "source", "tp1 pp2 dp1", 1)]
    for i in range(num_targets):
        offset = extra * np.linspace(0, i + 1, len(tail))
        runs.append(Run(f"target{i}", Curve(tail, LOSSES[100:] + offset), "target", f"tp{2**i} pp1 dp1", 1))
    if with_control:
        runs.append(Run("control", Curve(tail, LOSSES[100:] + 2e-6), "control", "tp1 pp2 dp1", 1))
    return judge(group(runs), Limits())


def lines(axis) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()}


def test_upper_panel_holds_both_runs_on_one_axis():
    upper, _ = draw(verdict(), Labels()).axes
    drawn = lines(upper)
    source = next(data for label, data in drawn.items() if label.startswith("Source  tp1 pp2 dp1"))
    target = next(data for label, data in drawn.items() if label.startswith("Target  tp1 pp1 dp1"))
    assert source[0] == STEPS.tolist() and source[1] == LOSSES.tolist()
    assert target[0] == STEPS[100:].tolist()
    assert upper.get_ylabel() == "LM loss"


def test_lower_panel_holds_deltas_control_and_bound_on_a_log_axis():
    made = verdict()
    _, lower = draw(made, Labels()).axes
    assert lower.get_yscale() == "log"
    drawn = lines(lower)
    target = next(data for label, data in drawn.items() if label.startswith("Target"))
    assert target[1][1:] == np.abs(made.comparisons[0].deltas)[1:].tolist()
    assert target[1][0] > 0, "a delta of 0 is drawn, at the bottom"
    assert any(label.startswith("control  tp1 pp2 dp1") for label in drawn)
    bound = next(data for label, data in drawn.items() if label.startswith("bound"))
    assert set(bound[1]) == {made.comparisons[0].bound}
    assert lower.get_ylim()[0] <= min(target[1]) and lower.get_ylim()[1] > made.comparisons[0].bound


@pytest.mark.parametrize(("extra", "stamp"), [(2e-6, "PASS"), (1e-3, "FAIL: too-far")])
def test_the_verdict_and_its_number_are_in_the_picture(extra, stamp):
    made = verdict(extra=extra)
    legend = draw(made, Labels()).axes[1].get_legend()
    assert legend.get_title().get_text().startswith(stamp)
    assert any(f"max {made.comparisons[0].max_delta:.1e}" in text.get_text() for text in legend.get_texts())


def test_a_title_given_is_the_title():
    figure = draw(verdict(), Labels(title="Mine", x="iteration", y="loss"))
    assert figure.get_suptitle() == "Mine"
    assert (figure.axes[1].get_xlabel(), figure.axes[0].get_ylabel()) == ("iteration", "loss")


@pytest.mark.parametrize("num_targets", [0, 1, 3])
@pytest.mark.parametrize("extra", [0.0, 2e-6, 1e-3])
def test_no_two_texts_overlap(tmp_path, num_targets, extra):
    figure = draw(verdict(num_targets, extra), Labels())
    save(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert faults_of_texts(figure) == []


def test_the_overlap_check_sees_a_covered_and_a_cut_off_text():
    figure = draw(verdict(), Labels())
    upper = figure.axes[0]
    upper.text(0.8, 0.9, "in the way", transform=upper.transAxes)
    figure.text(0.95, 0.5, "too long for the place it has")
    faults = faults_of_texts(figure)
    assert any("in the way" in fault and "covers" in fault for fault in faults)
    assert any("too long" in fault and "leaves" in fault for fault in faults)


def panels(figure):
    """Losses, cells and largest distances of a picture with lanes."""
    above, below = figure.subfigs
    return above.axes[0], below.axes[0], below.axes[1]


@pytest.mark.parametrize(("num_targets", "extra"), [(1, 0.0), (11, 2e-7), (11, 1e-3)])
def test_lanes_overlap_nowhere(num_targets, extra):
    figure = draw_lanes([verdict(num_targets, extra)], Labels(title="Figure 7a"))
    assert faults_of_texts(figure) == []


def test_each_target_has_marks_on_the_shared_line_and_a_lane():
    made = verdict(11, 2e-7)
    losses, cells, largest = panels(draw_lanes([made], Labels()))
    marked = {label: data for label, data in lines(losses).items() if label.startswith("tp")}
    assert len(marked) == 11
    # Together the marks are on every step once: none hides another's.
    assert sorted(step for steps, _ in marked.values() for step in steps) == STEPS[100:].tolist()
    shares = np.abs([c.deltas / c.bound for c in made.comparisons])
    assert np.allclose(cells.collections[0].get_array().reshape(11, -1), shares)
    assert [tick.get_text() for tick in cells.get_yticklabels()] == list(marked)
    results = [text.get_text() for text in largest.texts]
    assert results == [f"{c.max_delta:.1e}  {'PASS' if c.is_pass else 'FAIL'}" for c in made.comparisons]


def test_a_few_targets_are_called_resumed():
    losses, cells, _ = panels(draw_lanes([verdict(2, 2e-7)], Labels()))
    texts = [text.get_text() for text in losses.get_legend().get_texts()]
    assert texts[1:] == [f"resumed as {tick.get_text()}" for tick in cells.get_yticklabels()]


def test_a_lane_beyond_its_bound_is_red_and_a_nan_is_crossed_out():
    made = verdict(6, 1e-3)
    made.comparisons[2].deltas[7] = np.nan
    _, cells, largest = panels(draw_lanes([made], Labels()))
    mesh = cells.collections[0]
    rgb = mesh.cmap(mesh.norm(np.array([0.5, 1.0, 1.01])))
    assert matplotlib.colors.to_hex(rgb[2]) == BOUND_COLOUR.lower() != matplotlib.colors.to_hex(rgb[1])
    assert mesh.get_array().reshape(6, -1)[0, -1] > 1
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in cells.get_lines()] == [([108], [2])]
    assert all(text.get_text().endswith("FAIL") for text in largest.texts)


def test_lanes_of_several_sources_are_named_by_the_source():
    verdicts = []
    for name in ("tp1 pp1 dp1", "tp1 pp2 dp1"):
        runs = [
            Run(f"source {name}", Curve(STEPS, LOSSES), "source", name, 1),
            Run(f"target {name}", Curve(STEPS[100:], LOSSES[100:]), "target", "tp2 pp2 dp2", 1),
        ]
        verdicts.append(judge(group(runs), Limits()))
    figure = draw_lanes(verdicts, Labels())
    losses, cells, _ = panels(figure)
    names = ["from tp1 pp1 dp1 ZeRO-1", "from tp1 pp2 dp1 ZeRO-1"]
    assert [tick.get_text() for tick in cells.get_yticklabels()] == names
    assert set(names) | {"each Source, uninterrupted"} == {text.get_text() for text in losses.get_legend().get_texts()}
    # Before the save the Sources share the line as the Targets do after it.
    assert {min(line.get_xdata()) for line in losses.get_lines()[2:]} >= {1, 101}
    assert faults_of_texts(figure) == []


def faults_of_texts(figure) -> list[str]:
    figure.canvas.draw()
    drawn = [(text.get_text(), text.get_window_extent()) for text in shown_texts(figure)]
    assert len(drawn) > 10
    inside = figure.bbox
    cut = [f"{text!r} leaves the picture" for text, b in drawn if b.x0 < inside.x0 or b.x1 > inside.x1]
    covered = [
        f"{a!r} covers {b!r}"
        for (a, box_a), (b, box_b) in combinations(drawn, 2)
        if box_a.padded(-1).overlaps(box_b.padded(-1))
    ]
    return cut + covered


def shown_texts(figure) -> list[Text]:
    """Every text that is drawn. (Tick labels beyond the view exist too, with a place, but are not drawn.)"""
    texts = list(figure.texts)
    for part in figure.subfigs:
        texts += part.texts
    for axes in figure.axes:
        legend = axes.get_legend()
        texts += [axes.xaxis.label, axes.yaxis.label, axes.title, *axes.texts]
        texts += [legend.get_title(), *legend.get_texts()] if legend is not None else []
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            places = axis.get_majorticklocs()
            labels = [tick.label1 for tick in axis.get_major_ticks()]
            texts += [text for at, text in zip(places, labels) if low <= at <= high]
    return [text for text in texts if text.get_visible() and text.get_text().strip()]
