"""--torch-compile: torch.compile over each transformer block, in place.

compile_blocks(model)            # GPT or GPTPipe; before the engine is built

Parameters keep their names and places, so checkpoints do not change. What communicates inside a block (tensor, sequence
and expert parallelism) or draws random numbers of its own stream breaks the graph there; the pieces are compiled.
Dropout stays torch's own inside compiled code, so that a run drops the same with the flag and without.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from megatron.layers.block import Block


def compile_blocks(model: nn.Module) -> int:
    """How many there are on this rank. They are compiled at their first forward. Local."""
    inductor: Any = importlib.import_module("torch._inductor.config")
    inductor.fallback_random = True
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)
