"""Programs of stock DeepSpeed whose models AutoTP cuts over tensor-parallel ranks: trained, saved, and resumed from
universal folders with DeepSpeed's own loader."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

SIZES = {"vocab_size": 64, "hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {"intermediate_size": 50, "num_key_value_heads": 3}),
    "Llama tied": ("Llama", {"intermediate_size": 64, "num_key_value_heads": 6, "tie_word_embeddings": True}),
    "Qwen2": ("Qwen2", {"intermediate_size": 64, "num_key_value_heads": 2}),
    "GPTNeoX": ("GPTNeoX", {"intermediate_size": 96}),
    "OPT": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 48, "dropout": 0.0}),
}
"""Name -> (transformers' class, its configuration). Heads and widths that two or three ranks do not divide."""
FUSED = "parts of one matrix"
WIDTH = 24
_SPECS = [
    {"patterns": [r".*two\.weight$"], "partition_type": "column", "shape": [2, -1], "partition_dim": 0},
    {"patterns": [r".*parts\.weight$"], "partition_type": "column", "shape": [[24, 12, 12], -1], "partition_dim": 0},
    {"patterns": [r".*many\.weight$"], "partition_type": "column", "shape": [4, -1, WIDTH], "partition_dim": 1},
    {"patterns": [r".*down\.weight$"], "partition_type": "row"},
]


class Fused(nn.Module):
    """Matrices of which AutoTP cuts each part by itself, told so by `partition_config`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, WIDTH)
        self.block = nn.ModuleDict(
            {
                "two": nn.Linear(WIDTH, 2 * WIDTH, bias=False),
                "parts": nn.Linear(WIDTH, 2 * WIDTH, bias=False),
                "many": nn.Linear(WIDTH, 4 * WIDTH, bias=False),
                "down": nn.Linear(WIDTH, WIDTH, bias=False),
                "small_down": nn.Linear(WIDTH // 2, WIDTH, bias=False),
            }
        )
        self.head = nn.Linear(WIDTH, 64)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        first, second = self.block["two"](x).chunk(2, -1)
        third = self.block["parts"](x)
        large, *small = third.split([third.shape[-1] // 2, third.shape[-1] // 4, third.shape[-1] // 4], -1)
        many = self.block["many"](x).unflatten(-1, (4, -1)).sum(-2)
        y = self.block["down"](first * second.sigmoid() + large + many) + self.block["small_down"](small[0] * small[1])
        return SimpleNamespace(loss=nn.functional.cross_entropy(self.head(x + y).flatten(0, 1), labels.flatten()))


def engine_of(kind: str, stage: int, tp_size: int, seed: int, **more: Any):
    import deepspeed
    import transformers

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "tensor_parallel": {"autotp_size": tp_size},
        **more,
    }
    if kind == FUSED:
        model: nn.Module = Fused()
        settings["tensor_parallel"]["partition_config"] = {"use_default_specs": False, "layer_specs": _SPECS}
    else:
        name, sizes = MODELS[kind]
        config = getattr(transformers, f"{name}Config")(**SIZES, **sizes, attn_implementation="eager")
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    if tp_size == 1:
        settings.pop("tensor_parallel")
    return deepspeed.initialize(model=model, config=settings)[0]


def step(engine, number: int, index: int, count: int) -> float:
    """`index` of `count` replicas of the model: each has its part of the batch."""
    ids = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(number)).chunk(count)[index]
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    mean = loss.detach().float()
    torch.distributed.all_reduce(mean)
    return float(mean) / torch.distributed.get_world_size()


def save(rank: int, world_size: int, folder: str, kind: str, stage: int, tp_size: int) -> list[float]:
    """Losses of two more steps."""
    engine = engine_of(kind, stage, tp_size, 0)
    at = rank // tp_size, world_size // tp_size
    for number in range(3):
        step(engine, number, *at)
    engine.save_checkpoint(folder, tag="there")
    return [step(engine, number, *at) for number in (3, 4)]


def resume(rank: int, world_size: int, folder: str, kind: str, stage: int, tp_size: int) -> list[float]:
    """From a universal folder, with DeepSpeed's own loader."""
    engine = engine_of(kind, stage, tp_size, 7, checkpoint={"load_universal": True})
    path, _ = engine.load_checkpoint(folder, tag="universal")
    assert path is not None
    return [step(engine, number, rank // tp_size, world_size // tp_size) for number in (3, 4)]


def resume_with_install(rank: int, world_size: int, folder: str, kind: str, stage: int) -> list[float]:
    """From the save itself, on data-parallel ranks alone."""
    from megatron import ucp_deepspeed

    ucp_deepspeed.install()
    engine = engine_of(kind, stage, 1, 7)
    path, _ = engine.load_checkpoint(folder, tag="there")
    assert path is not None
    return [step(engine, number, rank, world_size) for number in (3, 4)]
