"""The tensors of a save, by number, where they are: in the engine.

memory = LiveMemory()
number = memory.hold(weight.view(-1))
memory.array(number)                  # of a tensor on a device, a copy made for this call
"""

from __future__ import annotations

import numpy as np
import torch

from megatron.ucp.save_job import Values
from megatron.ucp.stored import StoredTensor


class LiveMemory:
    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        """Flat and contiguous."""

    def hold(self, flat: torch.Tensor) -> int:
        """Its number."""
        self.tensors.append(flat.detach().contiguous().view(-1))
        return len(self.tensors) - 1

    def values(self, number: int) -> Values:
        tensor = self.tensors[number]
        return Values(str(tensor.dtype).removeprefix("torch."), tensor.numel())

    def array(self, number: int) -> np.ndarray:
        return StoredTensor.of_torch(self.tensors[number]).array()
