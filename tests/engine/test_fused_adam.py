"""Which Adam steps on CUDA: what is importable is simulated; torch's fused one runs on a CPU too."""

from __future__ import annotations

import sys
import types
from functools import partial
from pathlib import Path

import deepspeed.git_version_info
import deepspeed.ops.adam
import pytest
import torch

from harness.ranks import run_ranks
from matrix.cells import Cell
from matrix.recording import command_line, train, write_dataset
from megatron.config.optimizer import OptimizerConfig
from megatron.engine import cpu_adam, engine
from megatron.engine.optimizers import build_optimizer

CONFIG = OptimizerConfig(lr=1e-2, adam_beta1=0.8, weight_decay=0.3)


class FusedAdam(torch.optim.AdamW):
    """Takes what Apex's and DeepSpeed's take."""

    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode, bias_correction=True):
        assert adam_w_mode and bias_correction
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


class Apexs(FusedAdam):
    pass


class DeepSpeeds(FusedAdam):
    pass


def _simulate(monkeypatch, there: set[str]) -> None:
    for name in ("apex", "apex.optimizers", "amp_C"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name) if name.split(".")[0] in there else None)
    if "apex" in there:
        monkeypatch.setattr(sys.modules["apex.optimizers"], "FusedAdam", Apexs, raising=False)
    monkeypatch.setitem(deepspeed.git_version_info.installed_ops, "fused_adam", "deepspeed" in there)
    monkeypatch.setattr(deepspeed.ops.adam, "FusedAdam", DeepSpeeds)


TORCH, TORCH_FUSED = (torch.optim.AdamW, None), (torch.optim.AdamW, True)


@pytest.mark.parametrize(
    "fused, there, expected",
    [
        ("torch", "apex amp_C deepspeed", TORCH),
        ("triton", "apex amp_C deepspeed", TORCH_FUSED),
        ("auto", "apex amp_C deepspeed", (Apexs, None)),
        ("apex", "apex amp_C", (Apexs, None)),
        ("auto", "apex deepspeed", (DeepSpeeds, None)),  # Apex without its compiled part
        ("auto", "deepspeed", (DeepSpeeds, None)),
        ("auto", "", TORCH_FUSED),
        ("apex", "", TORCH_FUSED),
    ],
)
def test_which_adam(monkeypatch, fused, there, expected):
    _simulate(monkeypatch, set(there.split()))
    optimizer = build_optimizer(CONFIG, [{"params": [torch.nn.Parameter(torch.ones(3))]}], None, fused, True)
    (group,) = optimizer.param_groups
    assert (type(optimizer), group["fused"]) == expected
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-2, (0.8, 0.999), 1e-8, 0.3)


@pytest.mark.parametrize(
    "fused, expected", [("torch", torch.optim.AdamW), ("auto", cpu_adam.AdamW), ("apex", cpu_adam.AdamW)]
)
def test_which_adam_on_the_cpu(monkeypatch, fused, expected):
    _simulate(monkeypatch, {"apex", "amp_C", "deepspeed"})
    optimizer = build_optimizer(CONFIG, [{"params": [torch.nn.Parameter(torch.ones(3))]}], None, fused, False)
    assert type(optimizer) is expected


@pytest.mark.parametrize(
    "device, zero, expected",
    [
        ("cuda", {}, True),
        ("cuda", {"offload_optimizer": {"device": "none"}}, True),
        ("cuda", {"offload_optimizer": {"device": "cpu"}}, False),
        ("cuda", {"offload_param": {"device": "cpu"}}, False),
        ("cpu", {}, False),
    ],
)
def test_only_on_cuda_and_not_offloaded(monkeypatch, device, zero, expected):
    monkeypatch.setattr(engine, "get_accelerator", lambda: types.SimpleNamespace(device_name=lambda: device))
    assert engine._steps_on_cuda({"zero_optimization": zero}) is expected


def _train(rank: int, world_size: int, argv: list[str], fused: str):
    """Another rank body: on the CPU, with the Adam of a CUDA device."""
    engine.build_optimizer = partial(_build, fused=fused)
    run = train(rank, world_size, argv)
    return run.losses


def _build(config, groups, block, *_, fused):
    optimizer = build_optimizer(config, groups, block, fused, is_on_cuda=True)
    assert optimizer.param_groups[0]["fused"] is (None if fused == "torch" else True)
    check = optimizer.step

    def step(closure=None):
        # A resume does not carry over which implementation stepped.
        assert all(group["fused"] is (None if fused == "torch" else True) for group in optimizer.param_groups)
        return check(closure)

    optimizer.step = step
    return optimizer


def test_a_run_may_change_its_adam_at_a_resume(tmp_path: Path):
    data = write_dataset(tmp_path / "fused_adam_text_document")
    whole = run_ranks(1, _train, command_line(data, iters=6), "torch")[0]
    load: list[str] = []
    for number, (fused, until) in enumerate((("triton", 2), ("torch", 4), ("triton", 6))):
        save = tmp_path / str(number)
        argv = [*command_line(data, **Cell(zero=1).flags, iters=6, exit_interval=until, save=save), *load]
        losses = run_ranks(1, _train, argv, fused)[0]
        assert losses == pytest.approx({step: whole[step] for step in losses}, abs=2e-6) and losses
        load = ["--load", str(save)]
