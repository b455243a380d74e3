"""A program of Accelerate, trained, saved with `save_state` and resumed with `load_state` under DeepSpeed.

Its tag is always the same, "pytorch_model". What is replaced so that it runs on the CPU is in trainer_program.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from ucp_deepspeed.seen import Seen, seen_in
from ucp_deepspeed.trainer_program import on_the_cpu

WIDTH, BATCH, STEPS = 20, 12, 3


@dataclass
class Ran:
    state: Seen = field(default_factory=Seen)
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


def program(rank: int, world_size: int, folder: str, stage: int, resumes: list[str], installs: bool) -> list[Ran]:
    """Without `resumes` it trains and saves; else it loads each and goes on."""
    if installs:
        from megatron import ucp_deepspeed

        ucp_deepspeed.install()
    return [_one_run(rank, world_size, folder, stage, resume) for resume in resumes or [""]]


def _one_run(rank: int, world_size: int, folder: str, stage: int, resume: str) -> Ran:
    on_the_cpu()
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DataLoaderConfiguration

    config = {
        "train_micro_batch_size_per_gpu": BATCH // world_size,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
    }
    # Without split_batches Accelerate steps a schedule once for each rank, which means another thing on other ranks.
    loading = DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), dataloader_config=loading)
    torch.manual_seed(1 if resume else 0)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    net, optimizer, schedule = accelerator.prepare(net, optimizer, schedule)
    ran = Ran()

    def step(number: int) -> float:
        batch = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(number)).chunk(world_size)[rank]
        loss = (net(batch) - 1).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return float(accelerator.reduce(loss.detach(), "mean"))

    if resume:
        accelerator.load_state(resume)
        ran.state = seen_in(net)
    else:
        for number in range(STEPS):
            step(number)
        ran.state = seen_in(net)
        accelerator.save_state(folder)
    for number in range(STEPS, STEPS + 3):
        ran.rates.append(optimizer.param_groups[0]["lr"])
        ran.losses.append(step(number))
    return ran


def differences(found: Ran, saved: Ran) -> list[str]:
    lines = [str(key) for key, value in saved.state.state.items() if not torch.equal(found.state.state[key], value)]
    lines += ["counters"] if found.state.counters[:1] != saved.state.counters[:1] else []
    lines += ["losses"] if found.losses != pytest.approx(saved.losses, abs=2e-6) else []
    return lines + (["rates"] if found.rates != pytest.approx(saved.rates, rel=1e-6) else [])
