"""The ways in which a save's files are laid out, one small run of each."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from matrix.recording import command_line

TAG = "global_step2"
_TINY = {
    "num_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "seq_length": 8,
    "max_position_embeddings": 8,
    "iters": 2,
}
_EXPERTS = {"num_experts": 2, "expert_interval": 1, "moe_expert_parallel_size": 2}

KINDS: dict[str, tuple[int, dict]] = {
    "zero0": (2, {"zero": 0, "no_pipeline_parallel": True}),
    "zero1-tp2": (4, {"zero": 1, "tp": 2}),
    "zero2": (2, {"zero": 2}),
    "zero3": (2, {"zero": 3}),
    "pipeline-zero0": (2, {"zero": 0, "pp": 2, "num_layers": 2}),
    "pipeline-zero1": (4, {"zero": 1, "pp": 2, "num_layers": 2}),
    "frozen-zero2": (2, {"zero": 2, "freeze_parameters": "embedding.*"}),
    "frozen-zero3": (2, {"zero": 3, "freeze_parameters": "embedding.*"}),
    "experts-zero0": (2, {"zero": 0, "no_pipeline_parallel": True, **_EXPERTS}),
    "experts-zero1": (2, {"zero": 1, **_EXPERTS}),
    "bf16-zero1": (2, {"zero": 1, "bf16": True}),
}
"""By name: number of ranks, flags."""


def flags_of(kind: str, data: Path, **more) -> list[str]:
    return command_line(data, **{**_TINY, **KINDS[kind][1], **more})


def tensor_hashes(universal: Path) -> dict[str, str]:
    """SHA-256 of the elements of every parameter's every state, read with plain torch: independent of our readers."""
    hashes = {}
    for path in sorted((universal / "zero").rglob("*.pt")):
        content = torch.load(path, weights_only=False)  # our own of a moment ago, or golden
        tensor = content.get("param") if isinstance(content, dict) else None
        if torch.is_tensor(tensor):
            hashes[path.relative_to(universal).as_posix()] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    return hashes
