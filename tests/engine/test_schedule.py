"""The schedule against formulas written here in closed form, hand-computed points, and resumes."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.config.optimizer import OptimizerConfig
from megatron.engine.schedule import LearningRateCurve, LearningRateSchedule, ScheduleError

MAX, MIN, INIT = 6e-3, 6e-4, 1e-4
WARMUP, DECAY, WSD = 40, 200, 60


def fake_optimizer(*groups: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(param_groups=[dict(group) for group in groups] or [{"lr": 0.0}])


def expected(style: str, wsd_style: str, n: int) -> float:
    """Megatron's rule, said once more: warm-up is linear and includes its end; after DECAY it is MIN."""
    if n <= WARMUP:
        return INIT + (MAX - INIT) * n / WARMUP
    if style == "constant":
        return MAX
    if n > DECAY:
        return MIN
    if style == "inverse-square-root":
        return max(MIN, MAX * (WARMUP / n) ** 0.5)
    if style == "WSD":
        x = max(0.0, (n - (DECAY - WSD)) / WSD)
        y = {
            "linear": 1 - x,
            "cosine": math.cos(math.pi * x / 2) ** 2,
            "exponential": 2 ** (1 - x) - 1,
            "minus_sqrt": 1 - x**0.5,
        }[wsd_style]
    else:
        x = (n - WARMUP) / (DECAY - WARMUP)
        y = {"linear": 1 - x, "cosine": math.cos(math.pi * x / 2) ** 2}[style]
    return MIN + (MAX - MIN) * y


STYLES = [("constant", "linear"), ("linear", "linear"), ("cosine", "linear"), ("inverse-square-root", "linear")]
STYLES += [("WSD", wsd) for wsd in ("exponential", "linear", "cosine", "minus_sqrt")]


@pytest.mark.parametrize(("style", "wsd_style"), STYLES, ids=["-".join(pair) for pair in STYLES])
def test_curve_is_megatrons_formula(style: str, wsd_style: str) -> None:
    curve = LearningRateCurve(MAX, MIN, INIT, WARMUP, DECAY, style, WSD, wsd_style)
    for n in range(DECAY + 30):
        assert curve.learning_rate(n) == pytest.approx(expected(style, wsd_style, n), rel=1e-12), n


def test_points_by_hand() -> None:
    curve = LearningRateCurve(max_lr=1.0, min_lr=0.0, warmup=10, decay=110, style="cosine")
    points = {0: 0.0, 5: 0.5, 10: 1.0, 35: 0.5 * (1 + math.sqrt(0.5)), 60: 0.5, 110: 0.0, 111: 0.0}
    for n, lr in points.items():
        assert curve.learning_rate(n) == pytest.approx(lr, abs=1e-12)
    wsd = LearningRateCurve(max_lr=1.0, min_lr=0.1, decay=100, style="WSD", wsd_decay=20, wsd_style="exponential")
    assert [wsd.learning_rate(n) for n in (0, 80, 100, 101)] == pytest.approx([1.0, 1.0, 0.1, 0.1])
    assert wsd.learning_rate(90) == pytest.approx(0.1 + 0.9 * (math.sqrt(2) - 1))
    root = LearningRateCurve(max_lr=1.0, min_lr=0.3, warmup=4, decay=100, style="inverse-square-root")
    assert [root.learning_rate(n) for n in (4, 16, 64)] == pytest.approx([1.0, 0.5, 0.3])


def test_a_wrong_formula_would_be_seen() -> None:
    """Planted fault: the decay counted from 0 and not from the end of the warm-up."""
    curve = LearningRateCurve(MAX, MIN, INIT, WARMUP, DECAY, "cosine")
    wrong = dataclasses.replace(curve, warmup=0)
    n = (WARMUP + DECAY) // 2
    assert wrong.learning_rate(n) != pytest.approx(expected("cosine", "linear", n), rel=1e-3)


@pytest.mark.parametrize(("style", "half"), [("linear", 0.15), ("cosine", 0.15), ("constant", 0.2)])
def test_weight_decay_rises(style: str, half: float) -> None:
    start = 0.2 if style == "constant" else 0.1
    curve = LearningRateCurve(
        1.0, start_weight_decay=start, end_weight_decay=0.2, weight_decay_length=100, weight_decay_style=style
    )
    assert [curve.weight_decay(n) for n in (0, 50, 100, 101)] == pytest.approx([start, half, 0.2, 0.2])


def test_weight_decay_cosine_is_slow_at_first() -> None:
    curve = LearningRateCurve(
        1.0, start_weight_decay=0.0, end_weight_decay=1.0, weight_decay_length=3, weight_decay_style="cosine"
    )
    assert curve.weight_decay(1) == pytest.approx(0.25)  # (1 - cos(60 degrees)) / 2


def config(**values: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"lr": MAX, "min_lr": MIN, "lr_decay_style": "cosine", "lr_warmup_iters": 5, **values})


def test_lengths_in_iterations_become_samples() -> None:
    curve = LearningRateCurve.from_config(config(lr_decay_iters=20, lr_wsd_decay_iters=3), 400, 8)
    assert (curve.warmup, curve.decay, curve.wsd_decay, curve.weight_decay_length) == (40, 160, 24, 400)
    assert LearningRateCurve.from_config(config(), 400, 8).decay == 400
    assert LearningRateCurve.from_config(config(lr_warmup_iters=0, lr_warmup_fraction=0.1), 400, 8).warmup == 40
    in_samples = config(lr_warmup_iters=0, lr_warmup_samples=33, lr_decay_samples=333)
    curve = LearningRateCurve.from_config(in_samples, 400, 8)
    assert (curve.warmup, curve.decay) == (33, 333)


def test_step_sets_every_group() -> None:
    optimizer = fake_optimizer({"weight_decay": 0.1}, {"weight_decay": 0.0, "lr_mult": 0.5})
    schedule = LearningRateSchedule(config(), 320, 8).attach(optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    schedule.step(8)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([MAX / 5, MAX / 10])
    schedule.step()  # as DeepSpeed calls it: one global batch
    assert schedule.num_samples == 16
    assert schedule.get_last_lr() == schedule.get_lr() == pytest.approx([2 * MAX / 5, MAX / 5])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_decoupled_learning_rate_is_megatrons() -> None:
    """The group's own peak and end on the same curve (megatron/core/optimizer_param_scheduler.py, get_lr)."""
    optimizer = fake_optimizer({"name": "decay"}, {"name": "decoupled"}, {"name": "decoupled_since_3"})
    own = config(lr_warmup_init=MIN, decoupled_lr=10 * MAX, decoupled_min_lr=2 * MIN)
    schedule = LearningRateSchedule(own, 320, 8).attach(optimizer)
    schedule.step(16)  # two of five iterations of warm-up
    warm = MIN + 0.4 * (10 * MAX - MIN)
    assert schedule.get_lr() == pytest.approx([MIN + 0.4 * (MAX - MIN), warm, warm])
    schedule.step(24 + 35 * 4)  # half of the 35 iterations that follow
    half = (10 * MAX + 2 * MIN) / 2
    assert schedule.get_lr() == pytest.approx([(MAX + MIN) / 2, half, half])
    assert schedule.learning_rate == schedule.get_lr()[0]
    schedule.step(8 * 100)
    assert schedule.get_lr() == pytest.approx([MIN, 2 * MIN, 2 * MIN])
    saved = LearningRateSchedule(own, 320, 8).state_dict()
    with pytest.raises(ScheduleError, match="decoupled_max_lr: saved"):
        LearningRateSchedule(config(lr_warmup_init=MIN), 320, 8).load_state_dict(saved)


def test_decoupled_minimum_is_the_others_by_default() -> None:
    curve = LearningRateCurve.from_config(config(decoupled_lr=10 * MAX), 400, 8)
    assert (curve.decoupled_max_lr, curve.decoupled_min_lr) == (10 * MAX, MIN)


def test_rising_weight_decay_spares_what_is_not_decayed() -> None:
    rising = config(weight_decay_incr_style="linear", start_weight_decay=0.0, end_weight_decay=0.4)
    optimizer = fake_optimizer(
        {"name": "decay", "weight_decay": 0.0},
        {"name": "no_decay", "weight_decay": 0.0},
        {"weight_decay": 0.0},
        {"name": "other", "wd_mult": 0.5},
        {"name": "experts", "weight_decay": 0.0},
        {"name": "experts_no_decay_since_20", "weight_decay": 0.0},
    )
    LearningRateSchedule(rising, 320, 8).attach(optimizer).step(160)
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.0, 0.0, 0.1, 0.2, 0.0])


def run(schedule: LearningRateSchedule, num_steps: int, increment: int) -> list[float]:
    lrs = []
    for _ in range(num_steps):
        schedule.step(increment)
        lrs.append(schedule.get_last_lr()[0])
    return lrs


def test_resume_is_exact() -> None:
    whole = run(LearningRateSchedule(config(), 320, 8).attach(fake_optimizer()), 40, 8)
    first = LearningRateSchedule(config(), 320, 8).attach(fake_optimizer())
    head = run(first, 17, 8)
    second = LearningRateSchedule(config(), 320, 8).attach(fake_optimizer())
    second.load_state_dict(first.state_dict())
    assert second.get_last_lr() == first.get_last_lr()
    assert head + run(second, 23, 8) == whole


def test_resume_with_another_global_batch_size_goes_on_at_the_same_sample() -> None:
    by_8 = LearningRateSchedule(config(lr_warmup_iters=0, lr_warmup_samples=40, lr_decay_samples=320), 320, 8)
    run(by_8.attach(fake_optimizer()), 20, 8)
    by_16 = LearningRateSchedule(config(lr_warmup_iters=0, lr_warmup_samples=40, lr_decay_samples=320), 320, 16)
    by_16.attach(fake_optimizer())
    by_16.load_state_dict(by_8.state_dict())
    assert run(by_16, 1, 16) == run(by_8, 2, 8)[-1:]


def test_lengths_in_iterations_under_another_batch_size_are_refused_unless_asked_for() -> None:
    saved = LearningRateSchedule(config(), 320, 8).attach(fake_optimizer())
    run(saved, 20, 8)
    with pytest.raises(ScheduleError, match="warmup: saved 40, now 80; decay: saved 320, now 640"):
        LearningRateSchedule(config(), 640, 16).load_state_dict(saved.state_dict())
    kept = LearningRateSchedule(config(use_checkpoint_opt_param_scheduler=True), 640, 16).attach(fake_optimizer())
    kept.load_state_dict(saved.state_dict())
    assert run(kept, 1, 16) == run(saved, 2, 8)[-1:]
    new = LearningRateSchedule(config(override_opt_param_scheduler=True), 640, 16).attach(fake_optimizer())
    new.load_state_dict(saved.state_dict())
    assert (new.num_samples, new.curve.decay) == (176, 640)


def test_a_longer_run_with_the_same_decay_goes_on() -> None:
    """What does not shape the curve may differ: here only the length that a rising weight decay would have."""
    short, long = (LearningRateSchedule(config(lr_decay_iters=40), 8 * iters, 8) for iters in (40, 80))
    long.load_state_dict(short.state_dict())
    rising = {"weight_decay_incr_style": "linear", "start_weight_decay": 0.0, "end_weight_decay": 0.1}
    short, long = (LearningRateSchedule(config(lr_decay_iters=40, **rising), 8 * iters, 8) for iters in (40, 80))
    with pytest.raises(ScheduleError, match="weight_decay_length: saved 320, now 640"):
        long.load_state_dict(short.state_dict())


def test_only_what_differs_is_told() -> None:
    """From a constant rate to a decaying one: that the other values matter now is no news where they are equal."""
    saved = LearningRateSchedule(config(lr_decay_style="constant"), 320, 8).state_dict()
    with pytest.raises(ScheduleError) as caught:
        LearningRateSchedule(config(lr_decay_style="cosine"), 320, 8).load_state_dict(saved)
    assert "style: saved constant, now cosine" in str(caught.value)
    assert "decay:" not in str(caught.value) and "min_lr:" not in str(caught.value)


def test_state_is_plain_json() -> None:
    import json

    state = LearningRateSchedule(config(), 320, 8).state_dict()
    assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"style": "cosin"}, "cosin"),
        ({"min_lr": 2.0}, "min_lr 2"),
        ({"warmup": 10, "decay": 10}, "warm-up of 10"),
        ({"style": "WSD", "decay": 10}, "last part of 0"),
    ],
)
def test_impossible_curve_is_refused(values: dict[str, Any], part: str) -> None:
    with pytest.raises(ScheduleError, match=part):
        LearningRateCurve(**{"max_lr": 1.0, **values})


def test_unresolved_configuration_is_refused() -> None:
    with pytest.raises(ScheduleError, match="config.validate"):
        LearningRateSchedule(config(lr_decay_tokens=100), 320, 8)
