"""Which blocks run without keeping their activations (--recompute-granularity full and its relatives).

    for start, stop, is_recomputed in Recompute.of(model).groups(num_layers): ...

"uniform" checkpoints groups of `num_layers` blocks; "block" the first `num_layers` blocks, one by one. "selective"
is the attention's own affair (layers/attention.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.config.model import ModelConfig


@dataclass(frozen=True)
class Recompute:
    method: str | None
    """"uniform", "block", or None: keep all activations."""
    num_layers: int = 1

    @classmethod
    def of(cls, model: ModelConfig) -> Recompute:
        if model.recompute_granularity != "full":
            return cls(None)
        return cls(model.recompute_method or "uniform", model.recompute_num_layers)

    def groups(self, num_layers: int) -> Iterator[tuple[int, int, bool]]:
        """(start, stop, is_recomputed) of the blocks to run together, in order."""
        if self.method == "uniform":
            for start in range(0, num_layers, self.num_layers):
                yield start, min(start + self.num_layers, num_layers), True
            return
        num_recomputed = min(self.num_layers, num_layers) if self.method == "block" else 0
        for layer in range(num_recomputed):
            yield layer, layer + 1, True
        if num_recomputed < num_layers:
            yield num_recomputed, num_layers, False
