"""What is written beside the curves, read back with TensorBoard's own reader: upstream's keys, the true values."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.ranks import run_ranks
from matrix.recording import RecordingLog, command_line, write_dataset

KEYS = {
    "lm-loss-training/lm loss",
    "lm-loss-training/lm loss vs samples",
    "lm-loss-training/lm loss vs tokens",
    "lm-loss-validation/lm loss validation",
    "lm-loss-validation/lm loss validation ppl",
    "learning-rate/learning-rate",
    "grad-norm/grad-norm",
    "batch-size/batch-size",
    "iteration-time/iteration-time",
}


class _Both(RecordingLog):
    """Records what goes to the real log."""

    def __init__(self, real):
        super().__init__()
        self.real = real

    def step(self, metrics):
        super().step(metrics)
        self.real.step(metrics)

    def rate(self, iteration, rate):
        self.real.rate(iteration, rate)

    def expert_shares(self, step):
        self.real.expert_shares(step)

    def validation(self, *values):
        super().validation(*values)
        self.real.validation(*values)


def _train(rank: int, world_size: int, argv: list[str]):
    from megatron.config.arguments import parse
    from megatron.training.build import build_run
    from megatron.training.launch import LaunchInfo
    from megatron.training.loop import fit

    run = build_run(
        parse(argv).config.validate(world_size), LaunchInfo(rank=rank, local_rank=rank, world_size=world_size)
    )
    with run.run_log as real:
        run.run_log = both = _Both(real)
        fit(run)
    return both.steps, both.validations


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = write_dataset(folder / "log_text_document")
    flags = {"iters": 6, "log_interval": 2, "eval_iters": 1, "eval_interval": 2, "zero": 1}
    source = command_line(data, **flags, exit_interval=3, save=folder / "save", tensorboard_dir=folder / "source")
    recorded = run_ranks(2, _train, source)
    target = command_line(data, **flags, tp=2, load=folder / "save", tensorboard_dir=folder / "target")
    run_ranks(2, _train, target)
    return folder, recorded


def _scalars(folder: Path, key: str) -> dict[int, float]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(key)}


def test_upstreams_keys(made):
    events = EventAccumulator(str(made[0] / "source"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= KEYS


def test_values_are_those_of_the_steps(made):
    folder, recorded = made
    steps, validations = recorded[0]
    assert recorded[1][0] == steps, "ranks must agree on every metric"
    assert [s.iteration for s in steps] == [1, 2, 3]
    for key, value in (
        ("lm-loss-training/lm loss", lambda s: s.loss),
        ("grad-norm/grad-norm", lambda s: s.grad_norm),
        ("learning-rate/learning-rate", lambda s: s.learning_rate),
    ):
        assert _scalars(folder / "source", key) == pytest.approx({s.iteration: value(s) for s in steps}, rel=1e-6)
        by_samples = _scalars(folder / "source", f"{key} vs samples")
        assert by_samples == pytest.approx({8 * s.iteration: value(s) for s in steps}, rel=1e-6)
    losses = _scalars(folder / "source", "lm-loss-validation/lm loss validation")
    assert losses == pytest.approx(dict(validations), rel=1e-6) and list(losses) == [2]


def test_run_json_says_what_run_it_was(made):
    folder, _ = made
    source, target = (json.loads((folder / name / "run.json").read_text()) for name in ("source", "target"))
    assert (source["role"], source["resumed_from"]) == ("source", None)
    assert source["topology"] == "tp1 pp1 dp2" and source["zero_stage"] == 1 and source["precision"] == "fp32"
    assert target["role"] == "target" and target["topology"] == "tp2 pp1 dp1"
    assert target["resumed_from"]["iteration"] == 3 and target["resumed_from"]["kind"] == "direct"
    assert target["resumed_from"]["folder"].endswith("global_step3")
    assert target["config"]["parallel"]["tensor_model_parallel_size"] == 2
    assert {"commit", "versions"} <= set(target)


def test_the_analysis_reads_it(made):
    """The join is judged by tb_analysis from nothing but these files."""
    from tb_analysis.tb_analysis_script import main

    folder, _ = made
    key = ["--tb_dir", str(folder), "--tb_event_key", "lm-loss-training/lm loss", "--skip_plot", "--skip_csv"]
    # The Source stopped at 3 and the Target starts at 4: no common step, so no verdict can be a PASS.
    assert main(key) != 0


EXPERTS = {
    "num_experts": 4,
    "topk": 2,
    "expert_interval": 2,
    "moe_train_capacity_factor": 1.0,
    "moe_min_capacity": 1,
    "iters": 2,
    "log_interval": 1,
}


@pytest.fixture(scope="module")
def with_experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    data = write_dataset(folder / "log_text_document")
    one = run_ranks(1, _train, command_line(data, **EXPERTS, tensorboard_dir=folder / "tensorboard"))[0][0]
    return folder, data, one


def test_router_statistics_are_written(with_experts):
    folder, _, steps = with_experts
    last = steps[-1]
    assert [layer.layer for layer in last.experts] == [1, 3]
    tensorboard = folder / "tensorboard"
    balance = sum(layer.load_balancing_loss for layer in last.experts) / 2
    assert _scalars(tensorboard, "moe-training/load balancing loss")[2] == pytest.approx(balance, rel=1e-6)
    for layer in last.experts:
        assert sum(layer.shares) == pytest.approx(1.0) and layer.largest_load >= 1.0 >= layer.smallest_load
        assert 0 < layer.dropped < 1 and 0 < layer.entropy <= 1.3863
        for expert, share in enumerate(layer.shares):
            key = f"moe-layer-{layer.layer}/share of expert {expert}"
            assert _scalars(tensorboard, key)[2] == pytest.approx(share, rel=1e-6)
        assert _scalars(tensorboard, f"moe-layer-{layer.layer}/largest load")[2] == pytest.approx(layer.largest_load)


@pytest.mark.parametrize(
    "world_size, flags",
    [
        (2, {"moe_expert_parallel_size": 2, "zero": 1, "micro_batch": 2}),
        (2, {"pp": 2, "zero": 1}),
        (2, {"tp": 2, "sequence_parallel": True, "zero": 3}),
        (2, {"ds_sequence_parallel_size": 2, "moe_expert_parallel_size": 2, "zero": 2}),
        (1, {"recompute_granularity": "full"}),
    ],
    ids=["ep2", "pp2", "tp2-cut", "sp2ep2", "recomputed"],
)
def test_router_statistics_are_those_of_one_process(with_experts, world_size, flags):
    """The same tokens are counted, once each, and the same are dropped."""
    _, data, expected = with_experts
    for steps, _ in run_ranks(world_size, _train, command_line(data, **{**EXPERTS, **flags})):
        for step, one in zip(steps, expected, strict=True):
            for layer, truth in zip(step.experts, one.experts, strict=True):
                assert layer.shares == pytest.approx(truth.shares, abs=1e-12)
                for name in ("layer", "load_balancing_loss", "z_loss", "entropy", "dropped"):
                    assert getattr(layer, name) == pytest.approx(getattr(truth, name), abs=1e-6), name


# -- a run that goes on from an earlier step ------------------------------------------------------------------------


def _shown(folder: Path) -> dict[str, list[int]]:
    """Steps of every curve, as TensorBoard's reader of whole events gives them."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def _served(folder: Path) -> dict[str, list[int]]:
    """The same as its reader of tensors gives them: what `tensorboard --load_fast=false` serves."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as Served

    events = Served(str(folder), tensor_size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tags in events.Tags().values() if isinstance(tags, list) for tag in tags]
    return {tag: [event.step for event in events.Tensors(tag)] for tag in tags}


def _by_data_server(folder: Path) -> dict[str, list[int]]:
    """The same from TensorBoard's data server, the program behind `tensorboard` where nothing else is asked for."""
    from tensorboard import context
    from tensorboard.data.server_ingester import NoDataServerError, SubprocessServerDataIngester, get_server_binary
    from tensorboard.util.grpc_util import ChannelCredsType

    try:
        binary = get_server_binary()
    except NoDataServerError:
        pytest.skip("there is no data server for this platform")
    server = SubprocessServerDataIngester(
        server_binary=binary,
        logdir=str(folder),
        reload_interval=1,
        channel_creds_type=ChannelCredsType.LOCAL,
        samples_per_plugin={"scalars": 0},
    )
    server.start()
    try:
        seen = []
        # It reads behind our back, file by file: until it has had nothing new to say for a while.
        while len(seen) < 5 or not seen[-1] or any(shown != seen[-1] for shown in seen[-5:]):
            assert len(seen) < 100, "the data server does not come to rest"
            time.sleep(0.4)
            runs = server.data_provider.read_scalars(
                context.RequestContext(), experiment_id="", plugin_name="scalars", downsample=10_000
            )
            seen.append(
                {tag: [point.step for point in curve] for curves in runs.values() for tag, curve in curves.items()}
            )
        return seen[-1]
    finally:
        server._stdin_handle.close()  # its sign to end


@pytest.mark.parametrize("reader", [_shown, _served, _by_data_server], ids=["scalars", "tensors", "data-server"])
@pytest.mark.parametrize("kind", ["plain", "experts"])
def test_one_branch_is_shown_after_a_resume_from_an_earlier_step(reader, kind, tmp_path):
    """On every axis; also of curves that the resumed run has nothing to say of."""
    data = write_dataset(tmp_path / "log_text_document")
    flags = {
        "log_interval": 1,
        "eval_iters": 1,
        "eval_interval": 2,
        "save_interval": 2,
        "tensorboard_dir": tmp_path / "tb",
    }
    flags |= {**EXPERTS, "iters": 6} if kind == "experts" else {"iters": 6}
    run_ranks(1, _train, command_line(data, **flags, save=tmp_path / "save"))
    before = reader(tmp_path / "tb")
    (tmp_path / "save" / "latest").write_text("global_step2")
    argv = command_line(data, **flags | {"eval_interval": 100}, load=tmp_path / "save", exit_interval=3)
    run_ranks(1, _train, argv)
    after = reader(tmp_path / "tb")
    assert set(after) == set(before) and len(before) > 20
    for tag, steps in before.items():
        unit = 8 if tag.endswith(" vs samples") else 128 if tag.endswith(" vs tokens") else 1
        is_validation = "validation" in tag
        assert steps == [unit * i for i in ((2, 4, 6) if is_validation else range(1, 7))], tag
        assert after[tag] == [unit * i for i in ((2,) if is_validation else (1, 2, 3))], tag


@pytest.mark.parametrize("reader", [_shown, _served, _by_data_server], ids=["scalars", "tensors", "data-server"])
def test_what_a_run_went_back_over_is_shown_once(reader, tmp_path):
    """In one event file. A curve's step 3 is what it was the second time."""
    from megatron.checkpoint.progress import Progress
    from megatron.training.metrics import StepMetrics
    from megatron.training.tensorboard import RunLog

    with RunLog.open(str(tmp_path), {}, 0, Progress()) as run_log:
        for number, iteration in enumerate((1, 2, 3, 4, 5, 3, 4)):
            if number == 5:
                run_log.go_back(Progress(2, 16, consumed_train_tokens=256))
            run_log.step(
                StepMetrics(iteration, 8 * iteration, 128 * iteration, float(number), 0.1, 1.0, None, False, 8)
            )
    for tag, steps in reader(tmp_path).items():
        unit = 8 if tag.endswith(" vs samples") else 128 if tag.endswith(" vs tokens") else 1
        assert steps == [unit * i for i in (1, 2, 3, 4)], tag
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("lm-loss-training/lm loss")] == [0, 1, 5, 6]


def test_the_analysis_sees_the_branch_that_goes_on(tmp_path):
    from tb_analysis.event_files import read_curve

    data = write_dataset(tmp_path / "log_text_document")
    flags = {"iters": 6, "save_interval": 2, "tensorboard_dir": tmp_path / "tb"}
    run_ranks(1, _train, command_line(data, **flags, save=tmp_path / "save"))
    (tmp_path / "save" / "latest").write_text("global_step2")
    run_ranks(1, _train, command_line(data, **flags, load=tmp_path / "save", exit_interval=3))
    for suffix, unit in (("", 1), (" vs samples", 8), (" vs tokens", 128)):
        curve = read_curve(tmp_path / "tb", f"lm-loss-training/lm loss{suffix}")
        assert list(curve.steps) == [unit * i for i in (1, 2, 3)]
