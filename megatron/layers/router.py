"""The router of an MoE layer: which experts a token goes to, with what weight, and what that costs.

Everything is counted by sequence. The load balancing loss is a product of two means, and capacity a
limit on a sum; taken over a micro batch they would depend on how sequences are dealt to micro batches and ranks. Over
each sequence, averaged over sequences, they do not.

    routing = Router(model, num_experts, context).route(x_bsh)
    routing.experts_nk, routing.gates_nk        # of n = b * s tokens, k experts each
    routing.loss                                # its gradient reaches the router through RouterLedger.attached

The router is the same on all tp ranks, which compute it alike. Where sp ranks share the sequences, counts are summed
over them, and the mean over sp ranks of what each one has of the loss is the loss (as in mean_loss).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.layers.parameter import declare, normal
from megatron.layers.sparse_mixer import sparse_mixer
from megatron.parallel.context import ParallelContext
from megatron.ucp.layout import Layout


@dataclass(frozen=True)
class Routing:
    experts_nk: Tensor
    """int64; a choice that is over the expert's capacity is -1."""
    gates_nk: Tensor
    """fp32 (fp64 for fp64): the experts' weights in the sum."""
    loss: Tensor
    """Scalar, with its coefficients."""
    statistics: dict[str, Tensor]
    """Detached fp32 scalars, and "tokens": choices of each expert, [experts]. Of this rank's tokens."""


class Router(nn.Module):
    def __init__(self, model: ModelConfig, num_experts: int, context: ParallelContext) -> None:
        super().__init__()
        self.model, self.context, self.num_experts = model, context, num_experts
        layout = Layout.replicate((num_experts, model.hidden_size))
        self.weight = declare(layout, context, normal(model.init_method_std), is_decayed=True)

    def forward(self, x_bsh: Tensor) -> Tensor:
        """The logits, fp32 (fp64 for fp64), [b, s, experts]. Nothing else: ZeRO-3 brings the weight back for backward
        when it sees a tensor of what forward returned."""
        wide = x_bsh if x_bsh.dtype == torch.float64 else x_bsh.float()
        if self.training and self.model.moe_router_jitter:
            # From the stream that is equal on all tp ranks.
            jitter = self.model.moe_router_jitter
            wide = wide * torch.empty_like(wide).uniform_(1 - jitter, 1 + jitter)
        return F.linear(wide, self.weight.to(wide.dtype))

    def route(self, x_bsh: Tensor) -> Routing:
        """`x_bsh` is equal on all tp ranks. Collective over sp."""
        model, topk, logits_bse = self.model, self.model.topk, self(x_bsh)
        gates_bsk, experts_bsk, probs_bse = self._choices(logits_bse)
        own_be = torch.zeros(len(x_bsh), self.num_experts, dtype=torch.int64, device=x_bsh.device)
        own_be.scatter_add_(1, experts_bsk.flatten(1), torch.ones_like(experts_bsk).flatten(1))
        counts_be = self._over_sequence(own_be.clone())
        length = x_bsh.shape[1] * self.context.sp_size
        share_be = counts_be.to(logits_bse.dtype) / (length * topk)
        balance = self.num_experts * (share_be * probs_bse.mean(1)).sum(-1).mean()
        z = logits_bse.logsumexp(-1).square().mean()
        kept_bsk = self._within_capacity(experts_bsk, length)
        statistics = {
            "load balancing loss": balance,
            "z loss": z,
            "dropped": 1.0 - kept_bsk.float().mean(),
            "entropy": -(probs_bse * probs_bse.clamp(min=1e-20).log()).sum(-1).mean(),
            "tokens": own_be.sum(0),
        }
        return Routing(
            experts_bsk.masked_fill(~kept_bsk, -1).view(-1, topk),
            gates_bsk.reshape(-1, topk),
            model.moe_aux_loss_coeff * balance + model.moe_z_loss_coeff * z,
            {name: value.detach().float() for name, value in statistics.items()},
        )

    def _choices(self, logits_bse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(weights and experts of each token [b, s, k], its probabilities of all experts [b, s, experts])."""
        model, topk = self.model, self.model.topk
        if model.moe_router_score_function == "sparsemixer":
            chosen = sparse_mixer(logits_bse, topk, model.moe_sparsemixer_eps, self.training)
            return *chosen, logits_bse.softmax(-1)
        tiny = torch.finfo(logits_bse.dtype).tiny
        if model.moe_router_score_function == "softmax":
            scores_bse = probs_bse = logits_bse.softmax(-1)
        else:
            scores_bse = logits_bse.sigmoid()
            probs_bse = scores_bse / scores_bse.sum(-1, keepdim=True).clamp(min=tiny)
        gates_bsk, experts_bsk = scores_bse.topk(topk, dim=-1)
        if model.moe_normalize_topk and topk > 1:
            gates_bsk = gates_bsk / gates_bsk.sum(-1, keepdim=True).clamp(min=tiny)
        return gates_bsk, experts_bsk, probs_bse

    def _over_sequence(self, counts: Tensor) -> Tensor:
        if self.context.sp_size > 1:
            counts = counts.contiguous()
            dist.all_reduce(counts, group=self.context.sp_group)
        return counts

    def _within_capacity(self, experts_bsk: Tensor, length: int) -> Tensor:
        """Which choices an expert takes. First all first choices in the order of the sequence, then all second ones,
        and so on (GShard, Lepikhin et al. 2021)."""
        factor = self.model.capacity_factor(self.training)
        if factor is None:
            return torch.ones_like(experts_bsk, dtype=torch.bool)
        capacity = max(self.model.moe_min_capacity, math.ceil(factor * length * self.model.topk / self.num_experts))
        chosen_bske = F.one_hot(experts_bsk, self.num_experts)
        # Before a choice come those of earlier ranks of the sequence, and all of a smaller k anywhere.
        own_bke = chosen_bske.sum(1)
        whole_bke, earlier_bke = self._over_sequence(own_bke.clone()), torch.zeros_like(own_bke)
        if self.context.sp_size > 1:
            parts = [torch.empty_like(own_bke) for _ in range(self.context.sp_size)]
            dist.all_gather(parts, own_bke.contiguous(), group=self.context.sp_group)
            earlier_bke = sum(parts[: self.context.sp_rank], earlier_bke)
        before_bke = whole_bke.cumsum(1) - whole_bke + earlier_bke
        place_bske = chosen_bske.cumsum(1) - chosen_bske + before_bke.unsqueeze(1)
        return (place_bske * chosen_bske).sum(-1) < capacity
