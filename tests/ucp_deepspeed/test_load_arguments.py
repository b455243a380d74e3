"""`load_checkpoint`'s arguments mean with `install()` what DeepSpeed says they mean."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from ucp_deepspeed.plain_program import TAG, Net, engine_of, save, step
from ucp_deepspeed.seen import Seen, seen_in

from harness.ranks import RankFailure, run_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Seen]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(2, save, str(folder), 2, {})[0]


def load(rank: int, world_size: int, folder: str, stage: int, arguments: dict[str, Any], more: dict | None = None):
    """(before, after, path, keys of the client state), of an engine of other weights that has taken a step."""
    engine = engine_of(stage, world_size, 7, more or {}, True)
    step(engine, 50, rank, world_size)
    before = seen_in(engine)
    path, client_state = engine.load_checkpoint(folder, **arguments)
    return before, seen_in(engine), path, sorted(client_state or ())


def masters(seen: Seen) -> dict[str, torch.Tensor]:
    return {name: value for (name, state), value in seen.state.items() if state == "fp32"}


def moments(seen: Seen) -> dict[tuple[str, str], torch.Tensor]:
    return {key: value for key, value in seen.state.items() if key[1] != "fp32"}


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("stage", [1, 3])
def test_without_the_optimizers_states(stage: int, saved):
    """Masters are those that were saved; stock gives weights rounded to the run's precision."""
    folder, there = saved
    [(before, after, path, client)] = run_ranks(1, load, str(folder), stage, {"load_optimizer_states": False})
    assert path and equal(masters(after), masters(there)) and equal(moments(after), moments(before))
    assert after.counters == there.counters and {"epoch", "note", "optimizer"} <= set(client)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_module_alone(stage: int, saved):
    """Counters and the optimizer go on as they were; under ZeRO-3 stock restores no weight."""
    folder, there = saved
    [(before, after, path, _)] = run_ranks(1, load, str(folder), stage, {"load_module_only": True})
    assert path and equal(masters(after), masters(there)) and equal(moments(after), moments(before))
    assert equal(after.frozen, there.frozen) and equal(after.buffers, there.buffers)
    assert after.counters == before.counters != there.counters


def test_a_tag(saved, tmp_path):
    folder, there = saved
    (tmp_path / "other").symlink_to(folder / TAG)
    [(_, after, path, _)] = run_ranks(1, load, str(tmp_path), 1, {"tag": "other"})
    assert Path(path).parent == tmp_path / "other" and equal(after.state, there.state)


def test_without_a_pointer_nothing_is_loaded(saved, tmp_path):
    """As DeepSpeed answers: (None, None)."""
    (tmp_path / TAG).symlink_to(saved[0] / TAG)
    [(before, after, path, client)] = run_ranks(1, load, str(tmp_path), 1, {})
    assert path is None and client == [] and equal(after.state, before.state)


def test_a_pointer_to_nothing_is_an_error(tmp_path):
    (tmp_path / "latest").write_text("global_step9")
    with pytest.raises(RankFailure, match="CheckpointError.*global_step9"):
        run_ranks(1, load, str(tmp_path), 1, {})


def _into_another_model(rank: int, world_size: int, folder: str) -> list[str]:
    engine = engine_of(1, world_size, 7, {}, True)
    step(engine, 50, rank, world_size)
    own = seen_in(engine)
    engine.param_names = {param: f"{name}.x" if "norm" in name else name for param, name in engine.param_names.items()}
    try:
        engine.load_checkpoint(folder)
    except RuntimeError as error:
        now = seen_in(engine)
        is_untouched = equal(now.frozen, own.frozen) and equal(now.state, own.state) and now.counters == own.counters
        changed = [] if is_untouched else ["something was placed"]
        return [type(error).__name__, str(error), *changed]
    return ["loaded"]


def test_another_model_is_refused_before_anything_is_placed(saved):
    for kind, text, *changed in run_ranks(2, _into_another_model, str(saved[0])):
        assert kind == "SourceMismatchError" and not changed
        assert "parameters the Source lacks: norm.bias.x, norm.weight.x" in text
        assert "parameters only the Source has: norm.bias, norm.weight" in text


class Odd(torch.optim.SGD):
    """Its state has the shape of nothing, so that it cannot be cut."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param].setdefault("table", torch.zeros(3)).add_(1)
        return super().step(closure)


def _left_alone(rank: int, world_size: int, folder: str, stage: int, more: dict) -> tuple[list[str], list[float], int]:
    torch.optim.Odd = Odd
    engine = engine_of(stage, world_size, 0, more, True)
    losses = [step(engine, number, rank, world_size) for number in range(2)]
    engine.save_checkpoint(folder)
    losses.append(step(engine, 2, rank, world_size))
    engine = engine_of(stage, world_size, 7, more, True)
    path, _ = engine.load_checkpoint(folder)
    names = sorted(each.name for each in Path(path).parent.iterdir())
    return names, [*losses[2:], step(engine, 2, rank, world_size)], engine.global_steps


@pytest.mark.parametrize("case", ["ZeRO-0 in bf16", "an optimizer whose state cannot be cut"])
def test_what_is_left_to_deepspeed_works_as_without_us(case: str, tmp_path):
    stage, more = (0, {"bf16": {"enabled": True}}) if case == "ZeRO-0 in bf16" else (1, {"named": "Odd"})
    for names, (went_on, resumed), steps in run_ranks(2, _left_alone, str(tmp_path), stage, more):
        assert "ucp.json" not in names and "mp_rank_00_model_states.pt" in names
        assert resumed == went_on and steps == 3


def _with_a_dynamic_scale(rank: int, world_size: int, folder: str, resumes: bool) -> tuple[Seen, float]:
    more = {"fp16": {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 2}}
    engine = engine_of(2 if not resumes else 1, world_size, 7 if resumes else 0, more, True)
    for number in range(1 if resumes else 3):
        step(engine, 50 + number if resumes else number, rank, world_size)
    if resumes:
        engine.load_checkpoint(folder)
    seen, scale = seen_in(engine), float(engine.optimizer.loss_scale)
    if not resumes:
        engine.save_checkpoint(folder)
    return seen, scale


def test_a_dynamic_loss_scale_goes_on(tmp_path):
    there, scale = run_ranks(2, _with_a_dynamic_scale, str(tmp_path), False)[0]
    [(found, found_scale)] = run_ranks(1, _with_a_dynamic_scale, str(tmp_path), True)
    assert equal(found.state, there.state) and found_scale == scale != 2.0**10


def _warned(rank: int, world_size: int, folder: str, micro_batch: int) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron.ucp_deepspeed").addHandler(handler)
    engine = engine_of(1, world_size, 7, {"train_micro_batch_size_per_gpu": micro_batch}, True)
    engine.load_checkpoint(folder)
    return [line for line in lines if "samples a step" in line]


def test_another_global_batch_is_told(tmp_path):
    """By rank 0, once."""
    run_ranks(2, save, str(tmp_path), 2, {})
    [found] = run_ranks(1, _warned, str(tmp_path), 4)
    assert len(found) == 1 and "trained with 12 samples a step, and 4 are taken here" in found[0]
    assert run_ranks(3, _warned, str(tmp_path), 4) == [[], [], []]


def test_the_net_has_what_these_tests_are_about():
    net = Net(0)
    assert net.out.weight is net.inner[0].weight and not net.frozen.weight.requires_grad
    assert dict(net.named_buffers()).keys() == {"num_calls"}
