"""Scaled causal softmax with ALiBi in Triton: scale, bias, mask and softmax of a row in one program.

    p_bnqk = causal_softmax(scores_bnqk, scale, slopes_n)

Keys after the query are never read: forward and backward cost half of what a masked softmax does.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.kernels import reference
from megatron.kernels.triton_inputs import is_taken, warps

MAX_BLOCK = 4096


def causal_softmax(scores_bnqk: Tensor, scale: float, slopes_n: Tensor | None) -> Tensor:
    """softmax(scale * scores + slope * (k - q)) over the keys k <= q, zero elsewhere; as many keys as queries."""
    reference.check_lengths(scores_bnqk, slopes_n)
    if not is_taken(scores_bnqk, slopes_n):
        return reference.causal_softmax(scores_bnqk, scale, slopes_n)
    return _CausalSoftmax.apply(scores_bnqk, scale, None if slopes_n is None else slopes_n.float().contiguous())


class _CausalSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores_bnqk: Tensor, scale: float, slopes_n: Tensor | None) -> Tensor:
        scores_bnqk = scores_bnqk.contiguous()
        b, n, s, _ = scores_bnqk.shape
        p_bnqk = torch.empty_like(scores_bnqk)
        block = min(triton.next_power_of_2(s), MAX_BLOCK)
        softmax_forward[(b * n * s,)](
            scores_bnqk,
            scores_bnqk if slopes_n is None else slopes_n,
            p_bnqk,
            n,
            s,
            scale,
            HAS_SLOPES=slopes_n is not None,
            BLOCK=block,
            num_warps=warps(block),
        )
        ctx.save_for_backward(p_bnqk)
        ctx.scale = scale
        return p_bnqk

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_bnqk: Tensor) -> tuple[Tensor, None, None]:
        (p_bnqk,) = ctx.saved_tensors
        b, n, s, _ = p_bnqk.shape
        grad_scores_bnqk = torch.empty_like(p_bnqk)
        block = min(triton.next_power_of_2(s), MAX_BLOCK)
        softmax_backward[(b * n * s,)](
            grad_bnqk.contiguous(), p_bnqk, grad_scores_bnqk, s, ctx.scale, BLOCK=block, num_warps=warps(block)
        )
        return grad_scores_bnqk, None, None


@triton.jit
def softmax_forward(scores_ptr, slopes_ptr, p_ptr, n, s, scale, HAS_SLOPES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    q = (row % s).to(tl.int32)
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes_ptr + (row // s) % n)
    column = tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, q + 1, BLOCK):
        k = start + column
        value = tl.load(scores_ptr + row * s + k, mask=k <= q, other=0.0).to(tl.float32) * scale
        if HAS_SLOPES:
            value += slope * (k - q).to(tl.float32)
        value = tl.where(k <= q, value, float("-inf"))
        new_top = tl.maximum(top, tl.max(value, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(value - new_top), 0)
        top = new_top
    for start in range(0, s, BLOCK):
        k = start + column
        value = tl.load(scores_ptr + row * s + k, mask=k <= q, other=0.0).to(tl.float32) * scale
        if HAS_SLOPES:
            value += slope * (k - q).to(tl.float32)
        p = tl.where(k <= q, tl.exp(value - top) / total, 0.0)
        tl.store(p_ptr + row * s + k, p.to(p_ptr.dtype.element_ty), mask=k < s)


@triton.jit
def softmax_backward(grad_ptr, p_ptr, grad_scores_ptr, s, scale, BLOCK: tl.constexpr):
    """grad_scores = scale * p * (grad - sum(p * grad)). The p at hand are rounded and do not quite add up to 1: divided
    by their sum, what is left of a row adds up to 0, as it must."""
    row = tl.program_id(0).to(tl.int64)
    q = (row % s).to(tl.int32)
    column = tl.arange(0, BLOCK)
    product = tl.full((), 0.0, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, q + 1, BLOCK):
        k = start + column
        p = tl.load(p_ptr + row * s + k, mask=k <= q, other=0.0).to(tl.float32)
        total += tl.sum(p, 0)
        product += tl.sum(p * tl.load(grad_ptr + row * s + k, mask=k <= q, other=0.0).to(tl.float32), 0)
    for start in range(0, s, BLOCK):
        k = start + column
        p = tl.load(p_ptr + row * s + k, mask=k <= q, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * s + k, mask=k <= q, other=0.0).to(tl.float32)
        grad_scores = scale * p * (grad - product / total)
        tl.store(grad_scores_ptr + row * s + k, grad_scores.to(grad_scores_ptr.dtype.element_ty), mask=k < s)
