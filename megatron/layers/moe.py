"""A mixture of experts in place of an MLP: route, send tokens to their experts' ranks, compute, send back, add up.

Tokens are rows, sorted by expert. Sorted by expert is sorted by rank, so that one all-to-all over ep
carries them, whatever their number; nothing is padded and, without a capacity, nothing dropped.

    y_bsh = MoeMlp(model, layer, context, ledger, kernels)(x_bsh)

tp ranks have the same tokens, and of every expert a part of its features. Their results are summed once, at the end.
What a tp rank finds out about the gates' and the tokens' gradients is a part of it. The shared expert is an MLP beside.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.kernels.kernels import TORCH, Kernels
from megatron.layers.experts import Experts
from megatron.layers.mlp import Mlp
from megatron.layers.router import Router
from megatron.layers.router_ledger import RouterLedger
from megatron.parallel.collectives import copy_to_tp, leave_tp, whole_sequence
from megatron.parallel.context import ParallelContext


class MoeMlp(nn.Module):
    def __init__(
        self, model: ModelConfig, layer: int, context: ParallelContext, ledger: RouterLedger, kernels: Kernels = TORCH
    ) -> None:
        super().__init__()
        self.context, self.layer, self.ledger = context, layer, ledger
        num_experts = model.num_experts_of(layer)
        self.router = Router(model, num_experts, context)
        self.experts = Experts(model, num_experts, context, kernels)
        width = model.moe_shared_expert_intermediate_size
        self.shared_expert = Mlp(model, context, kernels, width) if width else None

    def forward(self, x_bsh: Tensor) -> Tensor:
        """Collective over tp, ep and sp. Under sequence parallelism input and output are this rank's part of the
        sequence."""
        context = self.context
        whole_bsh = whole_sequence(x_bsh, context)
        routing = self.router.route(whole_bsh)
        x_nh = copy_to_tp(whole_bsh, context).flatten(0, 1)
        gates_nk = copy_to_tp(routing.gates_nk, context).to(x_nh.dtype)
        dispatch = Dispatch(routing.experts_nk, self.experts.num_experts, context)
        rows_rh = self.experts(dispatch.to_experts(x_nh), dispatch.counts_here)
        y_bsh = dispatch.from_experts(rows_rh, gates_nk).view_as(whole_bsh)
        y_bsh = self.ledger.attached(leave_tp(y_bsh, context), routing, self.layer)
        return y_bsh if self.shared_expert is None else y_bsh + self.shared_expert(x_bsh)


class Dispatch:
    """The way of one batch of tokens to the experts and back. Construction is collective over ep, and waits for the
    device."""

    def __init__(self, experts_nk: Tensor, num_experts: int, context: ParallelContext) -> None:
        self.context = context
        choices = experts_nk.reshape(-1)
        # What no expert has room for is numbered -1 and comes first.
        order, counts = choices.argsort(stable=True), torch.bincount(choices + 1, minlength=num_experts + 1)
        sent = counts[1:].view(context.ep_size, -1)
        got = sent
        if context.ep_size > 1:
            got = torch.empty_like(sent)
            dist.all_to_all_single(got, sent.contiguous(), group=context.ep_group)
        # One wait for the device: lengths of tensors must be known here.
        num_dropped, *numbers = torch.cat([counts[:1], got.sum(0), sent.sum(1), got.sum(1)]).tolist()
        num_here = got.shape[1]
        self.counts_here: list[int] = numbers[:num_here]
        self.num_sent, self.num_got = numbers[num_here:][: context.ep_size], numbers[num_here + context.ep_size :]
        self.order = order[num_dropped:]
        self.tokens = self.order // experts_nk.shape[1]
        if context.ep_size == 1:
            return
        # Rows arrive sorted by rank, then by expert; wanted is by expert.
        experts = torch.arange(num_here, device=got.device).repeat(context.ep_size)
        self.by_expert = experts.repeat_interleave(got.view(-1)).argsort(stable=True)
        self.by_rank = self.by_expert.argsort()

    def to_experts(self, x_nh: Tensor) -> Tensor:
        """[tokens, h] -> [rows, h], sorted by the experts of this rank. Collective over ep."""
        rows_rh = x_nh[self.tokens]
        if self.context.ep_size == 1:
            return rows_rh
        return _exchanged(rows_rh, self.num_sent, self.num_got, self.context)[self.by_expert]

    def from_experts(self, rows_rh: Tensor, gates_nk: Tensor) -> Tensor:
        """[rows, h] -> [tokens, h], the sum of each token's experts by their gates. Collective over ep."""
        if self.context.ep_size > 1:
            rows_rh = _exchanged(rows_rh[self.by_rank], self.num_got, self.num_sent, self.context)
        weighted_rh = rows_rh * gates_nk.reshape(-1)[self.order].unsqueeze(1)
        # Each choice to its own place, then a sum: in the same order on every device, as index_add is not.
        choices_ch = weighted_rh.new_zeros(gates_nk.numel(), weighted_rh.shape[1])
        return choices_ch.index_copy(0, self.order, weighted_rh).view(*gates_nk.shape, -1).sum(1)


def _exchanged(rows_rh: Tensor, num_sent: list[int], num_got: list[int], context: ParallelContext) -> Tensor:
    """Rows to the ranks of ep, `num_sent` to each in order. Collective over ep, backward too."""
    return _AllToAll.apply(rows_rh, num_sent, num_got, context)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_rh: Tensor, num_sent: list[int], num_got: list[int], context: ParallelContext) -> Tensor:
        ctx.counts, ctx.context = (num_sent, num_got), context
        return _all_to_all(rows_rh, num_sent, num_got, context)

    @staticmethod
    def backward(ctx: Any, grad_rh: Tensor) -> tuple:
        num_sent, num_got = ctx.counts
        return _all_to_all(grad_rh, num_got, num_sent, ctx.context), None, None, None


def _all_to_all(rows_rh: Tensor, num_sent: list[int], num_got: list[int], context: ParallelContext) -> Tensor:
    got_rh = rows_rh.new_empty(sum(num_got), rows_rh.shape[1])
    dist.all_to_all_single(got_rh, rows_rh.contiguous(), num_got, num_sent, group=context.ep_group)
    return got_rh
