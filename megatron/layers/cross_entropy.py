"""Cross entropy over a vocabulary cut over tp ranks, without a second copy of the logits.

The one idea: the logits are the largest tensor of a training step, so they are turned in place into exp(l - max),
and in backward, in place again, into their own gradient. Each rank works relative to the maximum of its own
columns; two small all-reduces then give log sum exp and the label's logit over all columns.

    nll_bs = cross_entropy(logits_bsv, labels_bs, vocabulary)      # consumes logits_bsv
    loss = mean_loss(nll_bs, loss_mask_bs, context)

Padding columns are set to -inf first, so the loss does not depend on how far the vocabulary is padded, hence not on
tp_size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.layers.vocabulary import Vocabulary
from megatron.parallel.context import ParallelContext

_LOGITS_AT_ONCE = 1 << 19
"""Logits worked on at once on a CPU: 2 MiB, so that four passes over them read memory once."""


def cross_entropy(logits_bsv: Tensor, labels_bs: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Negative log likelihood of each label, fp32 [b, s], equal on all tp ranks. Collective over tp.

    Consumes `logits_bsv`: its memory is overwritten (if it is fp32; else one fp32 copy is made). The graph can be
    run backward once. A label that is no word gives nan, as a check on the host would cost a wait for the device.
    """
    return _CrossEntropy.apply(logits_bsv, labels_bs, vocabulary)


def mean_loss(nll_bs: Tensor, loss_mask_bs: Tensor | None, context: ParallelContext) -> Tensor:
    """Mean over each sequence's unmasked positions, then over sequences: so it does not depend on how sequences
    are grouped into micro batches. A sequence with no unmasked position counts as 0.

    Where sp ranks share the sequences, this is sp_size times this rank's share of that mean: then the mean over data
    parallel *and* sp ranks, which is what DeepSpeed takes of gradients (see parallel/mpu.py), is the mean loss's.
    Collective over sp if masked.
    """
    if loss_mask_bs is None:
        return nll_bs.mean()
    mask_bs = loss_mask_bs.to(nll_bs.dtype)
    num_unmasked_b = mask_bs.sum(1)
    if context.sp_size > 1:
        dist.all_reduce(num_unmasked_b, group=context.sp_group)
    return ((nll_bs * mask_bs).sum(1) * context.sp_size / num_unmasked_b.clamp(min=1.0)).mean()


class _CrossEntropy(torch.autograd.Function):
    """Suffix n: all b * s positions."""

    @staticmethod
    def forward(ctx: Any, logits_bsv: Tensor, labels_bs: Tensor, vocabulary: Vocabulary) -> Tensor:
        # .float() is a copy only of lower precisions; fp64 (tests) stays.
        values = logits_bsv if logits_bsv.dtype == torch.float64 else logits_bsv.float()
        exp_nv = values.view(-1, vocabulary.size)
        exp_nv[:, vocabulary.num_true :] = -math.inf
        is_here_n, column_n = _own_columns(labels_bs, vocabulary)
        target_n = exp_nv.gather(1, column_n.unsqueeze(1)).squeeze(1)
        max_n, sum_n = _exp_in_place(exp_nv)
        if vocabulary.context.tp_size > 1:
            scale_n, max_n, sum_n, target_n, is_a_word_n = _combined(max_n, sum_n, target_n, is_here_n, vocabulary)
        else:
            scale_n, is_a_word_n = torch.ones_like(sum_n), is_here_n
        nll_n = torch.where(is_a_word_n, sum_n.log() + max_n - target_n, math.nan)
        ctx.dtype, ctx.shape = logits_bsv.dtype, logits_bsv.shape
        ctx.state = (exp_nv, scale_n.div_(sum_n), is_here_n, column_n)
        return nll_n.view(labels_bs.shape)

    @staticmethod
    def backward(ctx: Any, grad_bs: Tensor) -> tuple:
        if ctx.state is None:
            raise RuntimeError("cross_entropy consumed its logits in the first backward; there is no second one.")
        grad_nv, scale_n, is_here_n, column_n = ctx.state
        ctx.state = None
        grad_n = grad_bs.reshape(-1)
        grad_nv.mul_((scale_n * grad_n).unsqueeze(1))  # softmax * upstream
        grad_nv.scatter_add_(1, column_n.unsqueeze(1), (-grad_n * is_here_n).unsqueeze(1))
        return grad_nv.view(ctx.shape).to(ctx.dtype), None, None


def _own_columns(labels_bs: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Whether each label is one of this rank's words, and its column (0 where it is not)."""
    column_n = labels_bs.reshape(-1) - vocabulary.start
    is_here_n = (column_n >= 0) & (column_n < vocabulary.num_true)
    return is_here_n, column_n.masked_fill(~is_here_n, 0)


def _exp_in_place(logits_nv: Tensor) -> tuple[Tensor, Tensor]:
    """logits -> exp(logits - row maximum), in place; returns the rows' maxima and sums."""
    num_rows, width = logits_nv.shape
    step = max(1, _LOGITS_AT_ONCE // width) if logits_nv.device.type == "cpu" else num_rows
    max_n, sum_n = logits_nv.new_empty(num_rows), logits_nv.new_empty(num_rows)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        block = logits_nv[rows]
        torch.amax(block, 1, out=max_n[rows])
        # A rank may have only padding: -inf - -inf would be nan.
        max_n[rows].clamp_(min=torch.finfo(block.dtype).min)
        torch.sum(block.sub_(max_n[rows].unsqueeze(1)).exp_(), 1, out=sum_n[rows])
    return max_n, sum_n


def _combined(
    max_n: Tensor, sum_n: Tensor, target_n: Tensor, is_here_n: Tensor, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A rank's share is relative to its own maximum: bring all to a common scale, then add up."""
    group = vocabulary.context.tp_group
    total_max_n = max_n.clone()
    dist.all_reduce(total_max_n, op=dist.ReduceOp.MAX, group=group)
    scale_n = (max_n - total_max_n).exp_()
    # where, not a product: the stand-in column of a label elsewhere may be padding, and 0 * -inf is nan.
    sums_3n = torch.stack([sum_n * scale_n, torch.where(is_here_n, target_n, 0.0), is_here_n.to(sum_n.dtype)])
    dist.all_reduce(sums_3n, group=group)
    return scale_n, total_max_n, sums_3n[0], sums_3n[1], sums_3n[2] > 0
