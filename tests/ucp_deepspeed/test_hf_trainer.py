"""Hugging Face's Trainer with the one line: resumed under another number of ranks and another ZeRO stage.

The program is a plain Trainer over a small LLaMA. Accelerate asks for a GPU before it lets DeepSpeed run, so its choice
of a backend is replaced by gloo on the CPU; nothing else of the libraries is. Truth is the run that never stopped: its
state when it saved, its losses and the samples of each of its steps after that.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ucp_deepspeed.seen import Seen, raised_by_deepspeed, seen_in

from harness.ranks import RankFailure, run_ranks

NUM_SAMPLES, GLOBAL_BATCH, SAVED_AT, NUM_STEPS = 48, 12, 3, 6
"""Four steps are an epoch: what is resumed after the third has its next epoch's order to find."""
PER_DEVICE = {1: 6, 2: 3, 3: 4, 4: 3}
"""By number of ranks; the rest of the global batch is accumulated."""
CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
}


@dataclass
class Ran:
    losses: dict[int, float] = field(default_factory=dict)
    rates: dict[int, float] = field(default_factory=dict)
    samples: dict[int, list[int]] = field(default_factory=dict)
    """Those of this rank, by step."""
    state: Seen | None = None
    """Where it saved, or as it was resumed."""


def sample(number: int) -> torch.Tensor:
    return torch.randint(0, 60, (16,), generator=torch.Generator().manual_seed(number))


def on_the_cpu() -> None:
    import os

    from accelerate.state import AcceleratorState, DistributedType, PartialState
    from transformers import training_args

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    training_args.is_torch_bf16_gpu_available = lambda: True
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    AcceleratorState._reset_state(reset_partial_state=True)


def program(
    out: str,
    stage: int,
    per_device: int,
    accumulation: int,
    resume: str | bool | None,
    *,
    lora_on: int | None = None,
    **more: Any,
) -> Ran:
    """`lora_on`: the seed of a base model that is not trained, with adapters that are (PEFT)."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    on_the_cpu()
    args = TrainingArguments(
        output_dir=out,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        max_steps=NUM_STEPS,
        save_steps=SAVED_AT,
        logging_steps=1,
        learning_rate=1e-2,
        seed=3,
        deepspeed={**CONFIG, "zero_optimization": {"stage": stage}},
        report_to=[],
        disable_tqdm=True,
        **more,
    )
    torch.manual_seed(lora_on or (1 if resume is None else 2))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes))
    if lora_on is not None:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(3 if resume is None else 4)
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
        )
    ran, numbers = Ran(), {tuple(sample(i).tolist()): i for i in range(NUM_SAMPLES)}

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if resume is not None:
                ran.state = seen_in(trainer.model_wrapped)

        def on_save(self, args, state, control, **kwargs):
            if resume is None and state.global_step == SAVED_AT:
                ran.state = seen_in(trainer.model_wrapped)

    def look(module, args, kwargs) -> None:
        rows = [numbers[tuple(row.tolist())] for row in kwargs["input_ids"]]
        ran.samples.setdefault(trainer.state.global_step + 1, []).extend(rows)

    model.register_forward_pre_hook(look, with_kwargs=True)
    rows = [{"input_ids": sample(i), "labels": sample(i)} for i in range(NUM_SAMPLES)]
    trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=[Watch()])
    trainer.train(resume_from_checkpoint=resume)
    for entry in trainer.state.log_history:
        if "loss" in entry:
            ran.losses[entry["step"]], ran.rates[entry["step"]] = entry["loss"], entry["learning_rate"]
    return ran


def save(rank: int, world_size: int, out: str, stage: int, more: dict, installs: bool) -> Ran:
    if installs:
        from megatron import ucp_deepspeed

        ucp_deepspeed.install()
    per_device = PER_DEVICE[world_size]
    return program(out, stage, per_device, GLOBAL_BATCH // world_size // per_device, None, **more)


def resume(rank: int, world_size: int, out: str, stage: int, checkpoints: list[str], more: dict, installs: bool):
    """By a script that says another gradient accumulation than the global batch needs here."""
    if installs:
        from megatron import ucp_deepspeed

        ucp_deepspeed.install()
    more = {"save_strategy": "no", **more}
    return [program(out, stage, PER_DEVICE[world_size], 1, checkpoint, **more) for checkpoint in checkpoints]


SOURCES = [(stage, ranks) for stage in (1, 2, 3) for ranks in (1, 2, 3)]
TARGETS = [(stage, ranks) for stage in (1, 2, 3) for ranks in (1, 2, 3, 4)]
Whole = tuple[Path, list[Ran]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[..., Whole]:
    """The folder of the checkpoint, and what the run that made it went on to do. Made when it is first asked for."""

    @functools.cache
    def make(stage: int, ranks: int, installs: bool = True, is_bf16: bool = False) -> Whole:
        out = tmp_path_factory.mktemp(f"zero{stage}dp{ranks}")
        whole = run_ranks(ranks, save, str(out), stage, {"bf16": is_bf16}, installs, timeout=300)
        return out / f"checkpoint-{SAVED_AT}", whole

    return make


def differences(found: list[Ran], whole: list[Ran], within: float = 2e-6) -> list[str]:
    """States bitwise, losses within rounding, each step's samples exactly."""
    lines, there, after = [], whole[0], range(SAVED_AT + 1, NUM_STEPS + 1)
    for ran in found:
        assert ran.state is not None and there.state is not None
        assert ran.state.state.keys() == there.state.state.keys()
        lines += [str(key) for key, value in ran.state.state.items() if not torch.equal(value, there.state.state[key])]
        lines += ["steps"] if ran.state.steps != there.state.steps or ran.state.steps != {float(SAVED_AT)} else []
        lines += [f"rate of step {step}" for step in after if ran.rates.get(step) != there.rates[step]]
        lines += [
            f"loss of step {step}"
            for step in after
            if step not in ran.losses or abs(ran.losses[step] - there.losses[step]) > within
        ]
    for step in after:
        seen, expected = (sorted(number for ran in runs for number in ran.samples[step]) for runs in (found, whole))
        lines += [f"samples of step {step}"] if seen != expected or len(seen) != GLOBAL_BATCH else []
    return lines


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"to-zero{target[0]}dp{target[1]}")
def test_every_stage_and_size_into(target: tuple[int, int], saved, tmp_path):
    made = [saved(*source) for source in SOURCES] + [saved(stage, 2, False) for stage in (1, 2, 3)]
    checkpoints = [str(folder) for folder, _ in made]
    found = run_ranks(target[1], resume, str(tmp_path), target[0], checkpoints, {}, True, timeout=300)
    for index, (_, whole) in enumerate(made):
        assert not differences([by_rank[index] for by_rank in found], whole)


@pytest.mark.parametrize("source, target", [((2, 2), (3, 1)), ((3, 3), (1, 2))])
def test_bf16(source: tuple[int, int], target: tuple[int, int], saved, tmp_path):
    folder, whole = saved(*source, is_bf16=True)
    found = run_ranks(target[1], resume, str(tmp_path), target[0], [str(folder)], {"bf16": True}, True, timeout=300)
    assert not differences([ran for [ran] in found], whole, within=2e-2)


@pytest.mark.parametrize("installs", [True, False], ids=["saved with install", "saved by stock"])
@pytest.mark.parametrize("source, target", [((2, 2), (3, 1)), ((3, 3), (1, 2)), ((1, 2), (2, 3))])
def test_adapters_on_a_frozen_base(source: tuple[int, int], target: tuple[int, int], installs: bool, tmp_path):
    """Trainer leaves the base out of the checkpoint."""
    out, lora = tmp_path / "run", {"lora_on": 5}
    whole = run_ranks(source[1], save, str(out), source[0], lora, installs, timeout=300)
    checkpoint = out / f"checkpoint-{SAVED_AT}"
    found = run_ranks(target[1], resume, str(out), target[0], [str(checkpoint)], lora, True, timeout=300)
    assert not differences([ran for [ran] in found], whole)
    if installs:  # which base it was is known by its digest
        with pytest.raises(RankFailure, match="was trained on another base model"):
            run_ranks(target[1], resume, str(out), target[0], [str(checkpoint)], {"lora_on": 6}, True, timeout=300)


@pytest.mark.parametrize("source, target", [((1, 2), (1, 1)), ((2, 2), (2, 3)), ((2, 2), (3, 2)), ((3, 2), (3, 1))])
def test_stock_trainer_beside_it(source: tuple[int, int], target: tuple[int, int], saved, tmp_path):
    """Without the one line the same resume fails, or goes on otherwise."""
    folder, whole = saved(*source, False)
    try:
        found = run_ranks(target[1], resume, str(tmp_path), target[0], [str(folder)], {}, False, timeout=300)
    except RankFailure as error:
        assert raised_by_deepspeed(error)
        return
    assert differences([ran for [ran] in found], whole)


def test_the_newest_whole_checkpoint_is_taken(saved, tmp_path):
    """The machine died while it saved the sixth: its folder is there, without what is written last."""
    folder, whole = saved(2, 2)
    run = tmp_path / "run"
    shutil.copytree(folder.parent, run)
    (run / "checkpoint-6" / "trainer_state.json").unlink()
    (run / "checkpoint-99").mkdir()
    found = run_ranks(1, resume, str(run), 1, [True], {}, True, timeout=300)
    assert not differences([ran for [ran] in found], whole)


def test_a_torn_tag_is_no_checkpoint(saved, tmp_path):
    from megatron.ucp_deepspeed.trainer import last_whole_checkpoint

    folder, _ = saved(2, 2)
    run = tmp_path / "run"
    shutil.copytree(folder.parent, run)
    assert last_whole_checkpoint(str(run)) == str(run / "checkpoint-6")
    path = run / "checkpoint-6" / "global_step6" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-1])
    assert last_whole_checkpoint(str(run)) == str(run / "checkpoint-3")
    shutil.rmtree(run / "checkpoint-3")
    assert last_whole_checkpoint(str(run)) is None


def test_trainers_without_deepspeed_find_their_checkpoints(tmp_path):
    """Theirs have none of DeepSpeed's files; one that is empty is passed over there too."""
    from megatron.ucp_deepspeed.trainer import last_whole_checkpoint

    for name in ("checkpoint-5", "checkpoint-20", "checkpoint-100", "other"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-5", "checkpoint-20"):
        (tmp_path / name / "trainer_state.json").write_text("{}")
    assert last_whole_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-20")
    assert last_whole_checkpoint(str(tmp_path), needs_deepspeed=True) is None


def test_a_global_batch_that_cannot_be_kept_is_refused(saved, tmp_path):
    folder, _ = saved(2, 2)
    manifest = json.loads((folder / f"global_step{SAVED_AT}" / "ucp.json").read_text())
    assert manifest["common"]["global_batch_size"] == GLOBAL_BATCH
    with pytest.raises(RankFailure, match=r"12 samples a step, which 1 ranks with per_device_train_batch_size 5"):
        run_ranks(1, _resume_with_five, str(tmp_path), str(folder), timeout=300)


def _resume_with_five(rank: int, world_size: int, out: str, checkpoint: str) -> None:
    from megatron import ucp_deepspeed

    ucp_deepspeed.install()
    program(out, 1, 5, 1, checkpoint)
