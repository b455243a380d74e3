"""Cross entropy over a vocabulary cut over tp ranks, without a second copy of the logits in any precision.

The logits are the largest tensor of a training step, so they are consumed: backward turns their memory
into their own gradient. Each rank works relative to the maximum of its own columns; two small all-reduces then give
log sum exp and the label's logit over all columns.

    nll_bs = cross_entropy(logits_bsv, labels_bs, vocabulary)      # consumes logits_bsv
    loss = mean_loss(nll_bs, loss_mask_bs, context)

Padding columns are left out, so the loss does not depend on how far the vocabulary is padded, hence not on tp_size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.kernels.kernels import TORCH, Kernels
from megatron.layers.vocabulary import Vocabulary
from megatron.parallel.context import ParallelContext


def cross_entropy(logits_bsv: Tensor, labels_bs: Tensor, vocabulary: Vocabulary, kernels: Kernels = TORCH) -> Tensor:
    """Negative log likelihood of each label, fp32 [b, s], equal on all tp ranks. Collective over tp.

    Consumes `logits_bsv`: its memory is overwritten, in backward with its gradient. The graph can be run backward
    once. A label that is no word gives nan, as a check on the host would cost a wait for the device.
    """
    return _CrossEntropy.apply(logits_bsv, labels_bs, vocabulary, kernels)


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
    def forward(ctx: Any, logits_bsv: Tensor, labels_bs: Tensor, vocabulary: Vocabulary, kernels: Kernels) -> Tensor:
        logits_nv = logits_bsv.view(-1, vocabulary.size)
        is_here_n, column_n = _own_columns(labels_bs, vocabulary)
        own_max_n, sum_n, target_n = kernels.cross_entropy_statistics(logits_nv, vocabulary.num_true, column_n)
        if vocabulary.context.tp_size > 1:
            scale_n, max_n, sum_n, target_n, is_a_word_n = _combined(own_max_n, sum_n, target_n, is_here_n, vocabulary)
        else:
            scale_n, max_n, is_a_word_n = torch.ones_like(sum_n), own_max_n, is_here_n
        nll_n = torch.where(is_a_word_n, sum_n.log() + max_n - target_n, math.nan)
        ctx.shape, ctx.num_true, ctx.kernels = logits_bsv.shape, vocabulary.num_true, kernels
        ctx.state = (logits_nv, own_max_n, scale_n.div_(sum_n), is_here_n, column_n)
        return nll_n.view(labels_bs.shape)

    @staticmethod
    def backward(ctx: Any, grad_bs: Tensor) -> tuple:
        if ctx.state is None:
            raise RuntimeError("cross_entropy consumed its logits in the first backward; there is no second one.")
        grad_nv, own_max_n, scale_n, is_here_n, column_n = ctx.state
        ctx.state = None
        grad_n = grad_bs.reshape(-1)
        # (softmax - one at the label) * upstream
        ctx.kernels.cross_entropy_gradient(
            grad_nv, ctx.num_true, column_n, own_max_n, scale_n * grad_n, grad_n * is_here_n
        )
        return grad_nv.view(ctx.shape), None, None, None


def _own_columns(labels_bs: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Whether each label is one of this rank's words, and its column (0 where it is not)."""
    column_n = labels_bs.reshape(-1) - vocabulary.start
    is_here_n = (column_n >= 0) & (column_n < vocabulary.num_true)
    return is_here_n, column_n.masked_fill(~is_here_n, 0)


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
