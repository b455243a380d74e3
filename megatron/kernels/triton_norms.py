"""LayerNorm and RMSNorm in Triton: one read of the input forward, one backward, sums in fp32.

A row fits into the registers of one program. Backward, each of a fixed number of programs takes a run of
rows, so that the weight's gradient is summed in an order that depends on no device and no race: equal runs are
bitwise equal.

    y = layer_norm(x, weight, bias, epsilon)
    y = rms_norm(x, weight, epsilon)

Inputs that the kernels do not take (fp64, rows wider than MAX_WIDTH) go to the reference, and those that nobody takes
(a weight of another width), whose errors are torch's.
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

MAX_WIDTH = 1 << 14
"""Twice as wide, the backward's rows and sums would be spilled out of the registers."""
NUM_PROGRAMS = 256
"""Of the backward, more than any GPU has multiprocessors; each sums its rows' part of the weight's gradient."""


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """Over the last dimension."""
    if not _fits(x, weight, bias):
        return reference.layer_norm(x, weight, bias, epsilon)
    return _Norm.apply(x, weight, bias, epsilon, True, x.dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Over the last dimension; rounded before the multiplication with the weight, as the reference."""
    if not _fits(x, weight):
        return reference.rms_norm(x, weight, epsilon)
    return _Norm.apply(x, weight, None, epsilon, False, torch.promote_types(x.dtype, weight.dtype))


def _fits(x: Tensor, *parameters: Tensor | None) -> bool:
    is_one_width = all(p is None or p.shape == x.shape[-1:] for p in parameters)
    return is_taken(x, *parameters) and is_one_width and x.shape[-1] <= MAX_WIDTH


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, is_centred: bool, dtype: torch.dtype
    ) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        width = x.shape[-1]
        num_rows = x.numel() // width
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        mean_n, rstd_n = torch.empty((2, num_rows), dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(width)
        norm_forward[(num_rows,)](
            x, weight, weight if bias is None else bias.contiguous(), y, mean_n, rstd_n, width, epsilon,
            IS_CENTRED=is_centred, HAS_BIAS=bias is not None, BLOCK=block, num_warps=warps(block),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, mean_n, rstd_n)
        ctx.is_centred, ctx.bias_dtype = is_centred, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple:
        x, weight, mean_n, rstd_n = ctx.saved_tensors
        width, num_rows = x.shape[-1], rstd_n.numel()
        num_programs = min(num_rows, NUM_PROGRAMS)
        grad_x = torch.empty_like(x)
        has_bias = ctx.bias_dtype is not None
        grad_weight_ph, grad_bias_ph = torch.empty((2, num_programs, width), dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(width)
        norm_backward[(num_programs,)](
            grad_y.contiguous(), x, weight, mean_n, rstd_n, grad_x, grad_weight_ph, grad_bias_ph, num_rows, width,
            triton.cdiv(num_rows, num_programs),
            IS_CENTRED=ctx.is_centred, HAS_BIAS=has_bias, BLOCK=block, num_warps=warps(block, most=32),
        )  # fmt: skip
        grad_bias = grad_bias_ph.sum(0).to(ctx.bias_dtype) if has_bias else None
        return grad_x, grad_weight_ph.sum(0).to(weight.dtype), grad_bias, None, None, None


@triton.jit
def norm_forward(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, width, epsilon,
    IS_CENTRED: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_in = column < width
    x = tl.load(x_ptr + row * width + column, mask=is_in, other=0.0).to(tl.float32)
    if IS_CENTRED:
        mean = tl.sum(x, 0) / width
        tl.store(mean_ptr + row, mean)
        x = tl.where(is_in, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / width + epsilon)
    tl.store(rstd_ptr + row, rstd)
    normal = x * rstd
    if not IS_CENTRED:
        normal = normal.to(x_ptr.dtype.element_ty).to(tl.float32)
    y = normal * tl.load(weight_ptr + column, mask=is_in, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=is_in, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=is_in)


@triton.jit
def norm_backward(
    grad_y_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_x_ptr, grad_weight_ptr, grad_bias_ptr, num_rows, width,
    rows_each, IS_CENTRED: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With n = (x - mean) * rstd and h = grad_y * weight: grad_x = rstd * (h - n * mean(h * n) - mean(h)), the last
    term only of LayerNorm."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_in = column < width
    weight = tl.load(weight_ptr + column, mask=is_in, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    grad_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    first = program * rows_each
    for row in range(first, tl.minimum(first + rows_each, num_rows)):
        x = tl.load(x_ptr + row * width + column, mask=is_in, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + row * width + column, mask=is_in, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        if IS_CENTRED:
            x = tl.where(is_in, x - tl.load(mean_ptr + row), 0.0)
        normal = x * rstd
        grad_normal = grad_y * weight
        grad_x = grad_normal - normal * (tl.sum(grad_normal * normal, 0) / width)
        if IS_CENTRED:
            grad_x -= tl.sum(grad_normal, 0) / width
        tl.store(grad_x_ptr + row * width + column, (grad_x * rstd).to(grad_x_ptr.dtype.element_ty), mask=is_in)
        if not IS_CENTRED:
            normal = normal.to(x_ptr.dtype.element_ty).to(tl.float32)
        grad_weight += grad_y * normal
        if HAS_BIAS:
            grad_bias += grad_y
    tl.store(grad_weight_ptr + program * width + column, grad_weight, mask=is_in)
    if HAS_BIAS:
        tl.store(grad_bias_ptr + program * width + column, grad_bias, mask=is_in)
