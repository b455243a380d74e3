"""The rules of the verdict on arrays, without event files; each with numbers a reader can check."""

import math

import numpy as np
import pytest

from tb_analysis.curves import Curve, Point
from tb_analysis.runs import Run, describe, group, settle_roles, topology_in
from tb_analysis.verdict import Limits, judge


def curve(first: int, values) -> Curve:
    values = np.asarray(values, dtype=np.float64)
    return Curve(np.arange(first, first + len(values)), values)


def wave(first: int, last: int, extra: float = 0.0) -> Curve:
    steps = np.arange(first, last + 1)
    return curve(first, 6.0 + np.sin(steps * 1.7) + extra)


def judged(target: Curve, *controls: Curve, limits: Limits = Limits(), precision: str | None = None):  # noqa: B008
    runs = [Run("s", wave(1, 40), "source", precision=precision), Run("t", target, "target", precision=precision)]
    runs += [Run(f"c{i}", control, "control") for i, control in enumerate(controls)]
    return judge(group(runs), limits).comparisons[0]


def names(comparison) -> set[str]:
    return {failure.name for failure in comparison.failures}


def test_numbers_of_a_comparison():
    target = wave(21, 40)
    target.values[3] += 4e-6
    target.values[7] -= 6e-6
    comparison = judged(target)
    assert comparison.is_pass
    assert (comparison.first_common_step, comparison.num_common, comparison.first_delta) == (21, 20, 0.0)
    assert comparison.max_delta == pytest.approx(6e-6)
    assert comparison.mean_delta == pytest.approx(5e-7)


def test_bound_is_twice_the_largest_control():
    controls = (wave(21, 40, 1e-6), wave(1, 40, 3e-6))
    assert judged(wave(21, 40, 5.9e-6), *controls).is_pass
    comparison = judged(wave(21, 40, 6.1e-6), *controls)
    assert comparison.bound == pytest.approx(6e-6)
    assert names(comparison) == {"too-far"}


def test_bound_counts_the_control_only_on_the_judged_steps():
    control = wave(1, 40, 1e-6)
    control.values[5] += 1.0
    assert judged(wave(21, 40), control).bound == pytest.approx(2e-6)


def test_control_equal_to_the_bit_leaves_two_float32_roundings():
    comparison = judged(wave(21, 40, 9e-7), wave(21, 40))
    assert comparison.bound == 2 * 2.0**-21  # the largest loss lies between 4 and 8
    assert comparison.is_pass
    assert names(judged(wave(21, 40, 1e-6), wave(21, 40))) == {"too-far"}


def test_control_with_more_changed_than_sum_order_is_no_yardstick():
    assert names(judged(wave(21, 40, 1e-6), wave(21, 40, 1e-2))) == {"bad-control"}
    assert names(judged(wave(21, 40, 1e-6), wave(41, 60))) == {"bad-control"}
    assert names(judged(wave(21, 40, 1e-6), curve(21, [math.nan] * 20))) == {"bad-control"}


@pytest.mark.parametrize(
    ("precision", "passes", "fails"),
    [(None, 9e-6, 1.1e-5), ("fp32", 9e-6, 1.1e-5), ("fp16", 4e-3, 6e-3), ("bf16", 1.5e-2, 2.5e-2)],
)
def test_first_step_bound_goes_with_the_precision(precision, passes, fails):
    assert judged(wave(21, 40, passes), precision=precision).is_pass
    assert "first-step" in names(judged(wave(21, 40, fails), precision=precision))


def test_tolerance_given_by_hand_goes_before_the_control():
    comparison = judged(wave(21, 40, 8e-6), wave(21, 40), limits=Limits(tolerance=1e-5))
    assert (comparison.is_pass, comparison.bound, comparison.bound_rule) == (True, 1e-5, "--tolerance")


def test_shift_is_found_however_loose_the_bounds():
    source = wave(21, 40)
    late = Curve(source.steps[1:], source.values[:-1])
    comparison = judged(late, limits=Limits(first_tolerance=10, tolerance=10, last_step=40))
    assert names(comparison) == {"shifted"}


def test_last_step_limits_what_is_judged():
    assert names(judged(wave(21, 30))) == {"missing-steps"}
    assert judged(wave(21, 30), limits=Limits(last_step=30)).is_pass


def test_merge_takes_the_latest_wall_time_whatever_the_order():
    points = [Point(2, 10.0, 2.0), Point(1, 5.0, 1.0), Point(1, 9.0, 1.5), Point(2, 8.0, 2.5)]
    for order in (points, points[::-1]):
        merged = Curve.from_points(order)
        assert merged.steps.tolist() == [1, 2] and merged.values.tolist() == [1.5, 2.0]


@pytest.mark.parametrize(
    ("name", "topology", "role"),
    [
        ("source_tp1_pp2_dp1", "tp1 pp2 dp1", "source"),
        ("control_tp1_pp2_dp1_mbs1", "tp1 pp2 dp1", "control"),
        ("target-tp2_pp1_dp2_sp2", "tp2 pp1 dp2 sp2", "target"),
        ("tp_2_pp_4_dp_16_sp_1_hd_64", "tp2 pp4 dp16", None),
        ("gpt_tp2_pp2_dp2_sp1_z1_toy_save", "tp2 pp2 dp2", "source"),
        ("gpt_tp2_pp2_dp2_universal", "tp2 pp2 dp2", "target"),
        ("sourcecode", "", None),
    ],
)
def test_names_of_folders(name, topology, role):
    run = describe(name, wave(1, 2))
    assert (run.topology, topology_in(name), run.role) == (topology, topology, role)


def test_roles_by_first_step_when_nothing_else_tells():
    runs = settle_roles([describe("a", wave(1, 9)), describe("b", wave(5, 9))])
    assert [run.role for run in runs] == ["source", "target"]
