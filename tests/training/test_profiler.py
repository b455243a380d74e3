"""--profile: traces that are there, of the steps and ranks that were asked for."""

from __future__ import annotations

import json

import pytest

from harness.ranks import run_ranks
from matrix.recording import command_line, train
from megatron.config.arguments import parse
from megatron.config.errors import ConfigError
from megatron.training.metrics import Throughput, peak_of_card
from megatron.training.profiler import Profiler


def _names(path) -> list[str]:
    return [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]


def test_traces_of_the_ranks_and_steps_that_were_asked_for(data, tmp_path):
    flags = {"dp": 2, "profile": "pt", "profile_steps": "2,3", "tensorboard_dir": tmp_path, "iters": 5}
    argv = [*command_line(data, **{k: v for k, v in flags.items() if k != "dp"}, zero=1), "--profile-ranks", "0", "1"]
    run_ranks(2, train, argv)
    traces = sorted(path.name for path in tmp_path.glob("*.pt.trace.json"))
    assert traces == [f"rank{rank}-steps2-3.pt.trace.json" for rank in (0, 1)]
    names = _names(tmp_path / traces[0])
    assert sum(name == "Optimizer.step#AdamW.step" for name in names) in (2, 4)  # a call for each group, two steps
    assert any("gloo" in name or "all_reduce" in name for name in names)


def test_bare_and_full(data, tmp_path):
    argv = [*command_line(data, tensorboard_dir=tmp_path, iters=2), "--profile_steps", "1,1", "--profile"]
    assert parse(argv).config.run.profile == ()
    run_ranks(1, train, argv)
    (trace,) = tmp_path.glob("*.trace.json")

    def shapes() -> list[dict]:
        return [
            event for event in json.loads(trace.read_text())["traceEvents"] if "Input Dims" in event.get("args", {})
        ]

    assert not shapes()
    run_ranks(1, train, [*argv, "pt-full"])
    assert shapes()


def test_a_run_that_ends_before_the_last_step_writes_what_there_is(data, tmp_path):
    argv = [*command_line(data, tensorboard_dir=tmp_path, iters=3), "--profile_steps", "2,9", "--profile"]
    run_ranks(1, train, argv)
    (trace,) = tmp_path.glob("*.trace.json")
    assert any("AdamW" in name for name in _names(trace))


def test_steps_that_never_come_are_told(caplog):
    run = parse(command_line("a", iters=3, profile_steps="2,3", profile="pt")).config.run
    with caplog.at_level("WARNING", logger="megatron"):
        Profiler.of(run, rank=0).warn_of(1, 3)
        Profiler.of(run, rank=1).warn_of(101, 200)  # writes none anyway
        assert not caplog.records
        Profiler.of(run, rank=0).warn_of(101, 200)
    assert "outside of this run's steps, 101 to 200" in caplog.text


def test_without_the_flag_nothing_is_written(data, tmp_path):
    run_ranks(1, train, command_line(data, tensorboard_dir=tmp_path, iters=3))
    assert not list(tmp_path.glob("*trace*"))


@pytest.mark.parametrize("steps", ["3,2", "0,1", "2", "a,b", "1,2,3"])
def test_no_range_of_steps(steps: str, data):
    with pytest.raises(ConfigError, match="--profile_steps is no range"):
        parse(command_line(data, profile=True, profile_steps=steps)).config.validate(1)


def test_mfu_is_the_models_flops_of_the_peak():
    throughput = Throughput(0, flops_per_token=2e9, world_size=4, peak_tflops=100.0)
    rate = throughput.since_last(1, consumed_tokens=1000)
    assert rate.mfu == pytest.approx(rate.tflops / 100)
    assert rate.tflops == pytest.approx(rate.tokens_per_second * 2e9 / 4 / 1e12)
    assert Throughput(0, 2e9, 4).since_last(1, 1000).mfu is None


@pytest.mark.parametrize(
    "card, peak",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 125),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("a card of tomorrow", None),
    ],
)
def test_peaks_of_cards(card: str, peak: float | None):
    assert peak_of_card(card) == peak
