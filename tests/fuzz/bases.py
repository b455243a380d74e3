"""Whole checkpoints that the fuzz damages: one of every kind of folder, all of one tiny model.

bases = make_bases(folder)          # {"zero1": Base(...), ...}; trains a few steps on up to four ranks
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from ucp import stock_moe

from harness.ranks import run_ranks
from matrix.recording import command_line, train, write_dataset
from megatron.ucp.convert import convert
from megatron.ucp.digest import digest_tensor
from megatron.ucp.manifest import MANIFEST_NAME

STEPS = 2
TAG = f"global_step{STEPS}"
STATES = ("fp32", *stock_moe.MOMENTS)
UNIVERSAL = f"{TAG}_universal"
MODEL = {
    "num_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "seq_length": 8,
    "max_position_embeddings": 8,
    "global_batch_size": 2,
    "normalization": "rmsnorm",
    "disable_bias_linear": True,
}
"""Few parameters: a universal folder has four files of each."""


@dataclass(frozen=True)
class Base:
    """A run folder `run` with one checkpoint in it, `tag`, and the pointer to it."""

    name: str
    run: Path
    tag: str
    digests: dict
    """What stood in the engine that saved it, by parameter and state."""
    is_proven: bool = True
    """It carries checksums, so that no change of it can go unseen."""
    loads: str = "direct"
    """The kind of resume that takes it; empty where a run has to be given a converted folder."""

    @property
    def is_universal(self) -> bool:
        return self.tag == UNIVERSAL

    @property
    def pointer(self) -> str:
        return "latest_universal" if self.is_universal else "latest"

    @property
    def folder(self) -> Path:
        return self.run / self.tag


def target_flags(data: Path) -> list[str]:
    """Of the one rank that loads them all."""
    return command_line(data, **MODEL, zero=1, iters=4, seed=99)


def make_bases(folder: Path) -> tuple[dict[str, Base], Path]:
    """The folders, and the data that a run which loads them needs."""
    data = write_dataset(folder / "fuzz_text_document")
    made: dict[str, Base] = {}

    def saved(name: str, world_size: int, loads: str = "direct", **flags) -> None:
        run = folder / name
        argv = command_line(data, **MODEL, iters=STEPS, save=run, **flags)
        made[name] = Base(name, run, TAG, run_ranks(world_size, train, argv)[0].digests, loads=loads)

    saved("same topology", 1, loads="native", zero=1)
    saved("ZeRO-1", 4, tp=2, zero=1)
    # Without padding: what has any cannot be written anew as DeepSpeed's own.
    saved("ZeRO-0", 1, zero=0, no_pipeline_parallel=True, make_vocab_size_divisible_by=1)
    saved("ZeRO-0 pipeline", 1, zero=0)
    saved("ZeRO-3", 2, zero=3, make_vocab_size_divisible_by=1)
    saved("experts", 2, loads="", zero=1, num_experts=2, expert_interval=1, moe_expert_parallel_size=2)

    def derived(name: str, of: str, tag: str, is_proven: bool, loads: str) -> None:
        """A converted one, or one without what only we write into it."""
        run, origin = folder / name, made[of]
        run.mkdir()
        if tag == UNIVERSAL:
            convert(origin.folder, run / tag, num_workers=1)
        else:
            shutil.copytree(origin.folder, run / tag)
            (run / "latest").write_text(tag)
        if not is_proven:
            (run / tag / MANIFEST_NAME).unlink()
            for path in (run / tag).glob("rng_state*"):
                path.unlink()
        made[name] = Base(name, run, tag, origin.digests, is_proven, loads)

    derived("universal", "ZeRO-1", UNIVERSAL, True, "universal")
    derived("DeepSpeed's", "ZeRO-1", TAG, False, "")
    derived("DeepSpeed's ZeRO-3", "ZeRO-3", TAG, False, "")
    derived("DeepSpeed's ZeRO-0", "ZeRO-0", TAG, False, "")
    made["DeepSpeed's experts"] = _stock_experts("DeepSpeed's experts", folder)
    derived("DeepSpeed's universal", "ZeRO-1", UNIVERSAL, False, "universal")
    return made, data


def _stock_experts(name: str, folder: Path) -> Base:
    """A save of DeepSpeed's own MoE layer by a program that is none of ours, two experts on two ranks."""
    run = folder / name
    case = stock_moe.Moe(2, {"stage": 1}, ep=(2, 2), experts=(2, 2), has_frozen=False)
    live: dict[str, dict[str, torch.Tensor]] = {}
    for _, held in run_ranks(2, stock_moe.train_and_save, str(run), case):
        live |= held
    digests = {
        parameter: {key: digest_tensor(states[key], name=parameter, state=key).hex() for key in STATES}
        for parameter, states in live.items()
    }
    return Base(name, run, stock_moe.TAG, digests, is_proven=False, loads="")
