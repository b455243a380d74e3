"""What the routers of a run add to its loss, and what they have seen.

An MoE layer's loss does not travel to the end of the model (in a pipeline there is no way for it).
`attached` leaves the activations as they are, and when their gradient comes back, gives the layer's own loss the
gradient that it would have had as a summand of the loss. Statistics are written down at the same moment, so that they
count once for each micro batch whose gradient is used: not in evaluation, nor again where a block is recomputed.

    ledger = RouterLedger()
    y_bsh = ledger.attached(y_bsh, routing, layer=3)          # in forward
    ledger.scale = loss_scale / num_micro_batches             # before a step: what backward starts from
    seen = ledger.take_means()                                     # after a step, once: {layer: {"entropy": ..., ...}}
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.layers.router import Routing


class RouterLedger:
    """One for a run, passed to its MoE layers."""

    def __init__(self) -> None:
        self.scale = 1.0
        """Gradient that the mean loss of one micro batch is given."""
        self._sums: dict[int, dict[str, Tensor]] = {}
        self._counts: dict[int, int] = {}

    def attached(self, y: Tensor, routing: Routing, layer: int) -> Tensor:
        if not torch.is_grad_enabled() or not routing.loss.requires_grad:
            return y
        return _Attached.apply(y, routing.loss, routing.statistics, self, layer)

    def take_means(self) -> dict[int, dict[str, Tensor]]:
        """By layer, the means over micro batches since the last call, of this rank's tokens."""
        means = {
            layer: {name: total / self._counts[layer] for name, total in sums.items()}
            for layer, sums in self._sums.items()
        }
        self._sums, self._counts = {}, {}
        return means

    def _write(self, layer: int, statistics: dict[str, Tensor]) -> None:
        sums = self._sums.setdefault(layer, {})
        for name, value in statistics.items():
            sums[name] = sums[name] + value if name in sums else value
        self._counts[layer] = self._counts.get(layer, 0) + 1


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, loss: Tensor, statistics: dict[str, Tensor], ledger: RouterLedger, layer: int
    ) -> Tensor:
        ctx.statistics, ctx.ledger, ctx.layer = statistics, ledger, layer
        ctx.like = loss.dtype, loss.device
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        ctx.ledger._write(ctx.layer, ctx.statistics)
        dtype, device = ctx.like
        return grad, torch.full((), ctx.ledger.scale, dtype=dtype, device=device), None, None, None
