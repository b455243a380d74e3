"""Programs of stock DeepSpeed whose experts AutoEP deals to expert-parallel ranks: trained, saved, and resumed from
universal folders with DeepSpeed's own loader.

DeepSpeed 0.19.8 asks transformers' registry of recorded outputs for a default, which that of transformers 5.23 does not
take: here it does. Nothing else is replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from ucp.autotp_program import step

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 24}),
}
"""AutoEP's name -> (transformers' class, its configuration)."""


def engine_of(kind: str, stage: int, ep_size: int, seed: int, **more: Any):
    import deepspeed
    import transformers
    from transformers.utils import output_capturing

    def get(self, model, default=None):
        return dict.get(self, model if isinstance(model, str) else str(model.__class__)) or {}

    output_capturing._CanRecordRegistry.get = get
    name, sizes = MODELS[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**SIZES, **sizes, attn_implementation="eager")
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "expert_parallel": {"enabled": True, "autoep_size": ep_size, "preset_model": kind, "use_grouped_mm": False},
        **more,
    }
    return deepspeed.initialize(model=model, config=settings)[0]


def save(rank: int, world_size: int, folder: str, kind: str, stage: int, ep_size: int) -> list[float]:
    """Losses of two more steps."""
    engine = engine_of(kind, stage, ep_size, 0)
    for number in range(3):
        step(engine, number, rank, world_size)
    engine.save_checkpoint(folder, tag="there")
    return [step(engine, number, rank, world_size) for number in (3, 4)]


def resume(rank: int, world_size: int, folder: str, kind: str, stage: int, ep_size: int) -> list[float]:
    engine = engine_of(kind, stage, ep_size, 7, checkpoint={"load_universal": True})
    path, _ = engine.load_checkpoint(folder, tag="universal")
    assert path is not None
    return [step(engine, number, rank, world_size) for number in (3, 4)]
