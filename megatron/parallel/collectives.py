"""Tensor-parallel communication with gradients: pairs of conjugate operations.

What forward does, backward does the conjugate of (Shoeybi et al., Megatron-LM, section 3).

    x = copy_to_tp(x, context)        # forward: identity          backward: sum over tp
    y = reduce_from_tp(y, context)    # forward: sum over tp       backward: identity
    y = gather_from_tp(y, context)    # forward: concatenate       backward: own part      (last dimension)

Under Megatron's sequence parallelism (Korthikanti et al. 2022, section 4.2.2) what is replicated between the matrices
of a block is cut over tp along the sequence instead, and a sum becomes its two halves. A layer says where activations
enter and leave its matrices, and the context which of the two it is:

    x = enter_tp(x, context)          # copy_to_tp                 or forward: concatenate, backward: sum and cut
    y = leave_tp(y, context)          # reduce_from_tp             or forward: sum and cut, backward: concatenate
    x = split_sequence(x, context)    # identity                   or forward: own part,    backward: concatenate
    x = whole_sequence(x, context)    # identity                   or forward: concatenate, backward: own part
    w, b = replicated((w, b), context)    # identity               or backward: sum over tp

`whole_sequence` is for what every tp rank then computes alike (a router). The last is for parameters that every tp
rank holds and applies to its part of the sequence: each rank has only a part of their gradient. (Dimension 1 is the
sequence's, [b, s, h]; it divides by tp_size.)

At tp_size 1 all are the identity. Uneven parts follow numpy.array_split, or `sizes` where given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.parallel.context import ParallelContext


def copy_to_tp(x: Tensor, context: ParallelContext) -> Tensor:
    """Mark where replicated activations enter column-parallel weights."""
    return x if context.tp_size == 1 else _Copy.apply(x, context)


def reduce_from_tp(x: Tensor, context: ParallelContext) -> Tensor:
    """Sum the partial results of row-parallel weights. Collective over tp."""
    return x if context.tp_size == 1 else _Reduce.apply(x, context)


def gather_from_tp(x: Tensor, context: ParallelContext, sizes: Sequence[int] | None = None) -> Tensor:
    """Concatenate along the last dimension; `sizes` of all ranks where not equal. Collective over tp."""
    if context.tp_size == 1:
        return x
    return _Gather.apply(x, context, tuple(sizes or [x.shape[-1]] * context.tp_size))


def enter_tp(x_bsh: Tensor, context: ParallelContext) -> Tensor:
    """Where activations enter column-parallel weights: the whole sequence on every tp rank."""
    return _GatherSequence.apply(x_bsh, context, False) if context.is_sequence_parallel else copy_to_tp(x_bsh, context)


def leave_tp(x_bsh: Tensor, context: ParallelContext) -> Tensor:
    """The sum of the partial results of row-parallel weights; this rank's part of the sequence under sequence
    parallelism. Collective over tp."""
    return _SumSequence.apply(x_bsh, context) if context.is_sequence_parallel else reduce_from_tp(x_bsh, context)


def whole_sequence(x_bsh: Tensor, context: ParallelContext) -> Tensor:
    """From each tp rank's part of the sequence all of it, for a use that is the same on all tp ranks. Collective."""
    return _GatherSequence.apply(x_bsh, context, True) if context.is_sequence_parallel else x_bsh


def gather_rows(w: Tensor, context: ParallelContext, sizes: Sequence[int]) -> Tensor:
    """Concatenate along the first dimension what tp ranks hold `sizes` rows of; backward: sum over tp, own part. For
    weights of which each rank keeps a part and needs the rest. Collective over tp."""
    return w if context.tp_size == 1 else _GatherRows.apply(w, context, tuple(sizes))


def split_sequence(x_bsh: Tensor, context: ParallelContext) -> Tensor:
    """From what is equal on all tp ranks, this rank's part of the sequence."""
    return _SplitSequence.apply(x_bsh, context) if context.is_sequence_parallel else x_bsh


def replicated(params: Sequence[Tensor], context: ParallelContext) -> tuple[Tensor, ...]:
    """Parameters that are applied to activations between the matrices. Backward is collective over tp, one sum."""
    return _CopyAll.apply(context, *params) if context.is_sequence_parallel else tuple(params)


def even_sizes(total: int, num_parts: int) -> list[int]:
    """As numpy.array_split: the first parts get one more."""
    base, rest = divmod(total, num_parts)
    return [base + (part < rest) for part in range(num_parts)]


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: ParallelContext) -> Tensor:
        ctx.context = context
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _all_reduced(grad, ctx.context), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: ParallelContext) -> Tensor:
        return _all_reduced(x, context)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: ParallelContext, sizes: tuple[int, ...]) -> Tensor:
        ctx.context, ctx.sizes = context, sizes
        return _concatenated(x, context, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _own_part(grad, ctx.context, ctx.sizes), None, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: ParallelContext, is_grad_whole: bool) -> Tensor:
        ctx.context, ctx.is_grad_whole = context, is_grad_whole
        return _gathered_sequence(x, context)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        if ctx.is_grad_whole:
            own = grad.chunk(ctx.context.tp_size, dim=1)[ctx.context.tp_rank].contiguous()
        else:
            own = _summed_sequence(grad, ctx.context)
        return own, None, None


class _SumSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: ParallelContext) -> Tensor:
        ctx.context = context
        return _summed_sequence(x, context)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _gathered_sequence(grad, ctx.context), None


class _SplitSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: ParallelContext) -> Tensor:
        ctx.context = context
        return x.chunk(context.tp_size, dim=1)[context.tp_rank].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _gathered_sequence(grad, ctx.context), None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, context: ParallelContext, sizes: tuple[int, ...]) -> Tensor:
        ctx.context, ctx.sizes = context, sizes
        return gathered_rows(w, context, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        total = _all_reduced(grad, ctx.context)
        return total.split(ctx.sizes)[ctx.context.tp_rank].contiguous(), None, None


class _CopyAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: ParallelContext, *params: Tensor) -> tuple[Tensor, ...]:
        ctx.context = context
        return tuple(param.view_as(param) for param in params)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        total = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(total, group=ctx.context.tp_group)
        parts = total.split([grad.numel() for grad in grads])
        return None, *(part.view(grad.shape) for part, grad in zip(parts, grads))


def gathered_rows(w: Tensor, context: ParallelContext, sizes: Sequence[int]) -> Tensor:
    """`gather_rows` without a gradient. Collective over tp."""
    longest = max(sizes)
    padded = w if w.shape[0] == longest else torch.cat([w, w.new_zeros(longest - w.shape[0], *w.shape[1:])])
    parts = [torch.empty_like(padded, memory_format=torch.contiguous_format) for _ in sizes]
    dist.all_gather(parts, padded.contiguous(), group=context.tp_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])


def _gathered_sequence(x: Tensor, context: ParallelContext) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(context.tp_size)]
    dist.all_gather(parts, x.contiguous(), group=context.tp_group)
    return torch.cat(parts, dim=1)


def _summed_sequence(x: Tensor, context: ParallelContext) -> Tensor:
    parts = torch.cat(x.chunk(context.tp_size, dim=1))  # [tp * b, s / tp, h]
    own = parts.new_empty(x.shape[0], *parts.shape[1:])
    # One tensor: gloo takes three times as long for a list of them.
    dist.reduce_scatter_single(own, parts, group=context.tp_group)
    return own


def _all_reduced(x: Tensor, context: ParallelContext) -> Tensor:
    # A copy: autograd may hand the same gradient tensor to another branch, and forward inputs may be saved.
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=context.tp_group)
    return total


def _own_part(x: Tensor, context: ParallelContext, sizes: tuple[int, ...]) -> Tensor:
    return x.split(sizes, dim=-1)[context.tp_rank].contiguous()


def _concatenated(x: Tensor, context: ParallelContext, sizes: tuple[int, ...]) -> Tensor:
    # gloo's all_gather wants equal shapes, so uneven parts travel padded to the longest.
    longest = max(sizes)
    if x.shape[-1] < longest:
        x = torch.nn.functional.pad(x, (0, longest - x.shape[-1]))
    parts = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in sizes]
    dist.all_gather(parts, x.contiguous(), group=context.tp_group)
    return torch.cat([part[..., :size] for part, size in zip(parts, sizes)], dim=-1)
