"""A program of PyTorch Lightning, trained, saved and resumed under its DeepSpeedStrategy.

The strategy refuses every accelerator but CUDA's before it does anything; that one check is left out, and the CPU has
the index that its devices lack. What saves and loads is Lightning's own.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn
from ucp_deepspeed.seen import Seen, seen_in

WIDTH, BATCH, NUM_SAMPLES = 20, 12, 48
SAVED_AT = NUM_SAMPLES // BATCH
"""Steps of an epoch: the run saves at its end, and a resumed one trains the next."""


@dataclass
class Ran:
    state: Seen = field(default_factory=Seen)
    """Where it saved, or as it was resumed."""
    losses: dict[int, float] = field(default_factory=dict)
    """By step."""
    rates: dict[int, float] = field(default_factory=dict)
    samples: dict[int, list[int]] = field(default_factory=dict)
    """Those of this rank, by step."""
    epoch: int = 0


def program(rank: int, world_size: int, folder: str, stage: int, resumes: list[str], installs: bool) -> list[Ran]:
    """Without `resumes` it trains two epochs and saves after each; else it goes on from each."""
    if installs:
        from megatron import ucp_deepspeed

        ucp_deepspeed.install()
    return [_one_run(world_size, folder, stage, resume) for resume in resumes or [""]]


def _one_run(world_size: int, folder: str, stage: int, resume: str) -> Ran:
    import pytorch_lightning as lightning
    from pytorch_lightning.callbacks import Callback, ModelCheckpoint
    from pytorch_lightning.plugins.environments import TorchElasticEnvironment
    from pytorch_lightning.strategies import DeepSpeedStrategy

    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    ran = Ran()

    class Strategy(DeepSpeedStrategy):
        def setup_environment(self) -> None:
            super(DeepSpeedStrategy, self).setup_environment()

        def setup_distributed(self) -> None:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

        root_device = property(lambda self: torch.device("cpu", 0))

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1 if resume else 0)
            self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7))
            self.register_buffer("num_calls", torch.zeros(1))

        def training_step(self, batch, index):
            self.num_calls += 1
            numbers, values = batch
            step = self.trainer.global_step + 1
            loss = (self.net(values) - 1).square().mean()
            mean = loss.detach().clone()
            torch.distributed.all_reduce(mean)
            ran.losses[step] = float(mean) / world_size
            ran.rates[step] = self.trainer.optimizers[0].param_groups[0]["lr"]
            ran.samples[step] = numbers.tolist()
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Watch(Callback):
        def on_train_start(self, trainer, module) -> None:
            ran.epoch = trainer.current_epoch
            if resume:
                ran.state = seen_in(trainer.strategy.deepspeed_engine)

        def on_train_epoch_end(self, trainer, module) -> None:
            if not resume and trainer.global_step == SAVED_AT:
                ran.state = seen_in(trainer.strategy.deepspeed_engine)

    values = torch.randn(NUM_SAMPLES, WIDTH, generator=torch.Generator().manual_seed(5))
    rows = torch.utils.data.TensorDataset(torch.arange(NUM_SAMPLES), values)
    strategy = Strategy(
        config={"train_micro_batch_size_per_gpu": BATCH // world_size, "zero_optimization": {"stage": stage}}
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        plugins=[TorchElasticEnvironment()],
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Watch()]
        + ([] if resume else [ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)]),
        enable_checkpointing=not resume,
    )
    trainer.fit(Net(), torch.utils.data.DataLoader(rows, batch_size=BATCH // world_size), ckpt_path=resume or None)
    return ran


def checkpoint_in(folder: Path) -> Path:
    """Of the first epoch."""
    return folder / "epoch=0.ckpt"


def differences(found: list[Ran], saved: list[Ran]) -> list[str]:
    """By rank. States bitwise, losses within rounding, each step's samples exactly."""
    there, after, lines = saved[0], range(SAVED_AT + 1, 2 * SAVED_AT + 1), []
    assert there.state.state and there.state.buffers
    for ran in found:
        lines += [str(key) for key, value in there.state.state.items() if not torch.equal(ran.state.state[key], value)]
        lines += [
            f"buffer {key}"
            for key, value in there.state.buffers.items()
            if not torch.equal(ran.state.buffers[key], value)
        ]
        lines += ["counters"] if ran.state.counters[:1] != there.state.counters[:1] or ran.epoch != 1 else []
        lines += ["steps"] if ran.state.steps != there.state.steps or len(ran.state.steps) != 1 else []
        lines += (
            ["losses"] if ran.losses != pytest.approx({step: there.losses[step] for step in after}, abs=2e-6) else []
        )
        lines += ["rates"] if ran.rates != {step: there.rates[step] for step in after} else []
    for step in after:
        seen, expected = (sorted(n for ran in runs for n in ran.samples.get(step, [])) for runs in (found, saved))
        lines += [f"samples of step {step}"] if seen != expected or len(seen) != BATCH else []
    return lines
