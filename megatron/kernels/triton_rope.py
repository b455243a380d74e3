"""Rotary position embedding in Triton: one pass, in any layout of [b, s, n, d] whose head features are neighbours.

    y_bsnd = rope(x_bsnd, cos_sd, sin_sd)

A rotation's transpose is the rotation by the negative angle: backward is the same kernel with -sin.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.kernels import reference
from megatron.kernels.triton_inputs import is_taken

HEADS_AT_ONCE = 16


def rope(x_bsnd: Tensor, cos_sd: Tensor, sin_sd: Tensor) -> Tensor:
    """Rotates the first 2 * cos.shape[-1] features of each head, as the reference; the rest passes through."""
    reference.check_tables(x_bsnd, cos_sd, sin_sd)
    if not is_taken(x_bsnd, cos_sd, sin_sd):
        return reference.rope(x_bsnd, cos_sd, sin_sd)
    return _Rope.apply(x_bsnd, cos_sd.float().contiguous(), sin_sd.float().contiguous())


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_bsnd: Tensor, cos_sd: Tensor, sin_sd: Tensor) -> Tensor:
        ctx.save_for_backward(cos_sd, sin_sd)
        return _rotated(x_bsnd, cos_sd, sin_sd, is_backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_bsnd: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad_bsnd, cos, sin, is_backward=True), None, None


def _rotated(x_bsnd: Tensor, cos_sd: Tensor, sin_sd: Tensor, is_backward: bool) -> Tensor:
    if x_bsnd.stride(-1) != 1:
        x_bsnd = x_bsnd.contiguous()
    b, s, n, d = x_bsnd.shape
    half = cos_sd.shape[-1]
    y_bsnd = torch.empty((b, s, n, d), dtype=x_bsnd.dtype, device=x_bsnd.device)
    heads = min(triton.next_power_of_2(n), HEADS_AT_ONCE)
    rotate[(b * s, triton.cdiv(n, heads))](
        x_bsnd, cos_sd, sin_sd, y_bsnd, *x_bsnd.stride()[:3], s, n, d, half,
        IS_BACKWARD=is_backward, HEADS=heads, HALF=triton.next_power_of_2(half),
        REST=triton.next_power_of_2(d - 2 * half) if d > 2 * half else 0, num_warps=4,
    )  # fmt: skip
    return y_bsnd


@triton.jit
def rotate(
    x_ptr, cos_ptr, sin_ptr, y_ptr, stride_b, stride_s, stride_n, s, n, d, half,
    IS_BACKWARD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64)
    b, i = position // s, position % s
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    x_head = x_ptr + b * stride_b + i * stride_s + head * stride_n
    y_head = y_ptr + (position * n + head) * d
    feature = tl.arange(0, HALF)[None, :]
    is_in = (head < n) & (feature < half)
    cos = tl.load(cos_ptr + i * half + feature, mask=feature < half, other=0.0)
    sin = tl.load(sin_ptr + i * half + feature, mask=feature < half, other=0.0)
    if IS_BACKWARD:
        sin = -sin
    first = tl.load(x_head + feature, mask=is_in, other=0.0).to(tl.float32)
    second = tl.load(x_head + half + feature, mask=is_in, other=0.0).to(tl.float32)
    tl.store(y_head + feature, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=is_in)
    tl.store(y_head + half + feature, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=is_in)
    if REST > 0:
        feature = 2 * half + tl.arange(0, REST)[None, :]
        is_in = (head < n) & (feature < d)
        tl.store(y_head + feature, tl.load(x_head + feature, mask=is_in, other=0.0), mask=is_in)
