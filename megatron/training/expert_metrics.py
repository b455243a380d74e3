"""What the routers of all MoE layers saw in one step, the same numbers on every rank.

for layer in expert_metrics(ledger, config.model, context, engine.device): layer.load_balancing_loss, layer.shares
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron.config.model import ModelConfig
from megatron.layers.router_ledger import RouterLedger
from megatron.parallel.context import ParallelContext

_SCALARS = ("load balancing loss", "z loss", "entropy", "dropped")
"""As layers/router.py names them."""


@dataclass(frozen=True)
class ExpertMetrics:
    """Means over the tokens of one global batch."""

    layer: int
    load_balancing_loss: float
    """Without its coefficient: 1 where the experts are evenly used."""
    z_loss: float
    entropy: float
    """Of the router's probabilities, in nats; at most log(experts)."""
    dropped: float
    """Part of the choices that were over an expert's capacity."""
    shares: tuple[float, ...]
    """Of all choices, each expert's; their sum is 1."""

    @property
    def largest_load(self) -> float:
        """Of the busiest expert, in units of an even share."""
        return max(self.shares) * len(self.shares)

    @property
    def smallest_load(self) -> float:
        return min(self.shares) * len(self.shares)


def expert_metrics(
    ledger: RouterLedger, model: ModelConfig, context: ParallelContext, device: torch.device
) -> tuple[ExpertMetrics, ...]:
    """Empties the ledger. Collective over the world where the model has experts; of layers whose routers got no
    gradient (all before them is frozen) nothing is known, and they are left out."""
    layers = [layer for layer in model.moe_layers if model.num_experts_of(layer) > 1]
    if not layers:
        return ()
    seen = ledger.take_means()
    width = 1 + len(_SCALARS) + max(model.num_experts_of(layer) for layer in layers)
    table = torch.zeros(len(layers), width, dtype=torch.float64, device=device)
    for row, layer in enumerate(layers):
        if layer in seen:
            tokens = seen[layer]["tokens"].double()
            table[row, 0] = 1.0
            table[row, 1 : 1 + len(_SCALARS)] = torch.stack([seen[layer][name].double() for name in _SCALARS])
            table[row, 1 + len(_SCALARS) : 1 + len(_SCALARS) + len(tokens)] = tokens
    # tp ranks have seen the same, and count alike; other ranks' micro batches are as many and as large.
    dist.all_reduce(table)
    metrics = []
    for layer, (num_ranks, *values) in zip(layers, table.tolist()):
        if num_ranks == 0:
            continue
        tokens = values[len(_SCALARS) :][: model.num_experts_of(layer)]
        scalars = [value / num_ranks for value in values[: len(_SCALARS)]]
        metrics.append(ExpertMetrics(layer, *scalars, shares=tuple(count / sum(tokens) for count in tokens)))  # type: ignore[misc]
    return tuple(metrics)
