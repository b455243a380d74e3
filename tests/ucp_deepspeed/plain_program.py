"""A program of plain DeepSpeed: `deepspeed.initialize` over a `torch.nn.Module`, trained, saved and resumed.

It knows nothing of us but the one line, and without `installs` not even that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from ucp_deepspeed.seen import Seen, seen_in

BATCH, WIDTH, STEPS = 12, 20, 3
TAG = f"global_step{STEPS}"


class Net(nn.Module):
    """With a tied weight, a frozen layer, a buffer, and sizes that the ranks do not divide."""

    def __init__(self, seed: int, width: int = WIDTH):
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("num_calls", torch.zeros(1))
        self.out = nn.Linear(width, width, bias=False)
        self.out.weight = self.inner[0].weight

    def forward(self, x):
        for layer in (*self.inner, self.frozen):
            x = torch.tanh(layer(x))
        self.num_calls += 1
        return self.out(self.norm(x))


def engine_of(stage: int, world_size: int, seed: int, more: dict, installs: bool):
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if "fp16" in more:
        get_accelerator().is_fp16_supported = lambda: True  # the CPU can add in it
    if installs:
        from megatron import ucp_deepspeed

        ucp_deepspeed.install()
    net = Net(seed, more.get("width", WIDTH))
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    name, flags = OPTIMIZERS[more.get("named", "AdamW")]
    optimizer = getattr(torch.optim, name)(groups, lr=1e-2, **flags)
    config = {"train_micro_batch_size_per_gpu": BATCH // world_size, **more}
    config.pop("width", None)
    config["zero_allow_untested_optimizer"] = config.pop("named", None) is not None
    config["zero_optimization"] = {"stage": stage, **more.get("zero_optimization", {})}
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    return deepspeed.initialize(model=net, optimizer=optimizer, lr_scheduler=schedule, config=config)[0]


OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", {}),
    "AMSGrad": ("AdamW", {"amsgrad": True}),
    "NAdam": ("NAdam", {}),
    "SGD": ("SGD", {}),
    "SGD with momentum": ("SGD", {"momentum": 0.9}),
    "Odd": ("Odd", {}),  # test_load_arguments.py
    "RMSprop": ("RMSprop", {"momentum": 0.5, "centered": True}),
}


def step(engine, number: int, rank: int, world_size: int) -> float:
    width = engine.module.norm.normalized_shape[0]
    batch = torch.randn(BATCH, width, generator=torch.Generator().manual_seed(number)).chunk(world_size)[rank]
    loss = (engine(batch.to(next(engine.module.parameters()).dtype)).float() - 1).square().mean()
    engine.backward(loss)
    engine.step()
    mean = loss.detach().clone()
    torch.distributed.all_reduce(mean)
    return float(mean) / world_size


def save(rank: int, world_size: int, folder: str, stage: int, more: dict, installs: bool = True) -> Seen:
    engine = engine_of(stage, world_size, 0, more, installs)
    for number in range(STEPS):
        step(engine, number, rank, world_size)
    seen = seen_in(engine)
    engine.save_checkpoint(folder, client_state={"epoch": 4, "note": ["a", 1.5]})
    seen.losses = [step(engine, STEPS + i, rank, world_size) for i in range(3)]
    return seen


def resume(rank: int, world_size: int, folders: list[str], stage: int, more: dict, installs: bool = True) -> list[Seen]:
    """One after the other, into an engine of other weights that has taken a step each time."""
    engine, found = engine_of(stage, world_size, 7, more, installs), []
    for folder in folders:
        step(engine, 50, rank, world_size)
        path, client_state = engine.load_checkpoint(folder)
        assert path is not None and Path(path).is_file()
        seen = seen_in(engine)
        seen.client_state = {key: client_state[key] for key in ("epoch", "note")}
        seen.losses = [step(engine, STEPS + i, rank, world_size) for i in range(3)]
        found.append(seen)
    return found


def differences(found: Seen, saved: Seen) -> list[str]:
    """Bitwise."""
    lines = []
    for table in ("state", "frozen", "buffers"):
        here, there = getattr(found, table), getattr(saved, table)
        assert here.keys() == there.keys() and here
        lines += [f"{table} {key}" for key in here if not torch.equal(here[key], there[key])]
    for value in ("groups", "steps", "numbers", "counters", "scale"):
        lines += [value] if getattr(found, value) != getattr(saved, value) else []
    return lines + (["client state"] if found.client_state != {"epoch": 4, "note": ["a", 1.5]} else [])
