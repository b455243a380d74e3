"""SwiGLU and bias-GELU in Triton: everything between two matrix products in one pass forward and one backward.

    p = swiglu(gate_up)
    y = bias_gelu(x, bias)

tanh GELU is x * sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3), since (1 + tanh u) / 2 = sigmoid(2u).
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

MAX_BLOCK = 1024
NUM_PROGRAMS = 256
"""Along the rows in bias-GELU's backward; each sums its rows' part of the bias's gradient, in an order of its own."""


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2p] -> [..., p]: silu(first half) * second half."""
    if not is_taken(gate_up) or gate_up.shape[-1] % 2:
        return reference.swiglu(gate_up)
    return _SwiGlu.apply(gate_up)


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """GELU of x + bias in its tanh approximation."""
    if not is_taken(x, bias) or (bias is not None and bias.shape != x.shape[-1:]):
        return reference.bias_gelu(x, bias)
    return _BiasGelu.apply(x, bias)


def _block(width: int) -> int:
    return min(triton.next_power_of_2(width), MAX_BLOCK)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        width = gate_up.shape[-1] // 2
        y = gate_up.new_empty((*gate_up.shape[:-1], width))
        block = _block(width)
        grid = (y.numel() // width, triton.cdiv(width, block))
        swiglu_forward[grid](gate_up, y, width, BLOCK=block, num_warps=warps(block))
        ctx.save_for_backward(gate_up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        width = gate_up.shape[-1] // 2
        grad = torch.empty_like(gate_up)
        block = _block(width)
        grid = (grad_y.numel() // width, triton.cdiv(width, block))
        swiglu_backward[grid](grad_y.contiguous(), gate_up, grad, width, BLOCK=block, num_warps=warps(block))
        return grad


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        bias = bias if bias is None else bias.contiguous()
        width = x.shape[-1]
        y = torch.empty_like(x)
        block = _block(width)
        grid = (x.numel() // width, triton.cdiv(width, block))
        bias_gelu_forward[grid](
            x, x if bias is None else bias, y, width, HAS_BIAS=bias is not None, BLOCK=block, num_warps=warps(block)
        )
        ctx.save_for_backward(x, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor | None]:
        x, bias = ctx.saved_tensors
        width = x.shape[-1]
        num_rows = x.numel() // width
        num_programs = min(num_rows, NUM_PROGRAMS)
        grad_x = torch.empty_like(x)
        shape = (num_programs, width) if bias is not None else (1,)
        grad_bias_ph = torch.empty(shape, dtype=torch.float32, device=x.device)
        block = _block(width)
        bias_gelu_backward[(num_programs, triton.cdiv(width, block))](
            grad_y.contiguous(), x, x if bias is None else bias, grad_x, grad_bias_ph, num_rows, width,
            triton.cdiv(num_rows, num_programs), HAS_BIAS=bias is not None, BLOCK=block, num_warps=warps(block),
        )  # fmt: skip
        return grad_x, None if bias is None else grad_bias_ph.sum(0).to(bias.dtype)


@triton.jit
def swiglu_forward(gate_up_ptr, y_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = column < width
    gate = tl.load(gate_up_ptr + row * 2 * width + column, mask=is_in, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (row * 2 + 1) * width + column, mask=is_in, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=is_in)


@triton.jit
def swiglu_backward(grad_y_ptr, gate_up_ptr, grad_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = column < width
    gate = tl.load(gate_up_ptr + row * 2 * width + column, mask=is_in, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (row * 2 + 1) * width + column, mask=is_in, other=0.0).to(tl.float32)
    grad_y = tl.load(grad_y_ptr + row * width + column, mask=is_in, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_gate = grad_y * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    grad_up = grad_y * gate * sigmoid
    tl.store(grad_ptr + row * 2 * width + column, grad_gate.to(grad_ptr.dtype.element_ty), mask=is_in)
    tl.store(grad_ptr + (row * 2 + 1) * width + column, grad_up.to(grad_ptr.dtype.element_ty), mask=is_in)


@triton.jit
def bias_gelu_forward(x_ptr, bias_ptr, y_ptr, width, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = column < width
    x = tl.load(x_ptr + row * width + column, mask=is_in, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + column, mask=is_in, other=0.0).to(tl.float32)
    # 2 sqrt(2/pi)
    y = x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=is_in)


@triton.jit
def bias_gelu_backward(
    grad_y_ptr, x_ptr, bias_ptr, grad_x_ptr, grad_bias_ptr, num_rows, width, rows_each,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = column < width
    bias = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + column, mask=is_in, other=0.0).to(tl.float32)
    grad_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    first = program * rows_each
    for row in range(first, tl.minimum(first + rows_each, num_rows)):
        x = tl.load(x_ptr + row * width + column, mask=is_in, other=0.0).to(tl.float32) + bias
        grad_y = tl.load(grad_y_ptr + row * width + column, mask=is_in, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        slope = 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * x * x)
        grad_x = grad_y * sigmoid * (1.0 + x * (1.0 - sigmoid) * slope)
        tl.store(grad_x_ptr + row * width + column, grad_x.to(grad_x_ptr.dtype.element_ty), mask=is_in)
        grad_bias += grad_x
    if HAS_BIAS:
        tl.store(grad_bias_ptr + program * width + column, grad_bias, mask=is_in)
