"""A program of Hugging Face's Trainer over a small LLaMA, trained, saved and resumed under DeepSpeed.

Accelerate asks for a GPU before it lets DeepSpeed run, so its choice of a backend is replaced by gloo on the CPU;
nothing else of the libraries is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from ucp_deepspeed.seen import Seen, seen_in

NUM_SAMPLES, GLOBAL_BATCH, SAVED_AT, NUM_STEPS = 48, 12, 3, 5
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
    ended: Seen | None = None


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
        rows = [numbers[tuple(row.tolist())] for row in kwargs["input_ids"]] if module.training else []
        ran.samples.setdefault(trainer.state.global_step + 1, []).extend(rows)

    model.register_forward_pre_hook(look, with_kwargs=True)
    rows = [{"input_ids": sample(i), "labels": sample(i)} for i in range(NUM_SAMPLES)]
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:12], callbacks=[Watch()])
    trainer.train(resume_from_checkpoint=resume)
    ran.ended = seen_in(trainer.model_wrapped)
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
