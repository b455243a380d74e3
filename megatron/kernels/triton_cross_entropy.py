"""Vocabulary-parallel cross entropy in Triton: the logits are read once forward, and become their gradient in place.

Forward keeps three numbers of each row (maximum, sum of exponentials, the label's logit), found in one
pass with an online softmax; backward makes the gradient from the logits themselves. No second tensor of the logits'
size exists in any precision.

    max_n, sum_n, target_n = cross_entropy_statistics(logits_nv, num_true, column_n)
    cross_entropy_gradient(logits_nv, num_true, column_n, max_n, factor_n, hot_n)

Between the two, tp ranks combine (layers/cross_entropy.py). Suffix n: all b * s positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels import reference
from megatron.kernels.triton_inputs import is_taken, warps

MAX_BLOCK = 4096


def cross_entropy_statistics(logits_nv: Tensor, num_true: int, column_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(maximum, sum of exp(logit - maximum), logit at `column_n`) of each row, over the first `num_true` columns, in
    fp32. Leaves the logits as they are."""
    if not is_taken(logits_nv):
        return reference.cross_entropy_statistics(logits_nv, num_true, column_n)
    num_rows, width = logits_nv.shape
    max_n, sum_n, target_n = torch.empty((3, num_rows), dtype=torch.float32, device=logits_nv.device)
    block = min(triton.next_power_of_2(width), MAX_BLOCK)
    statistics[(num_rows,)](
        logits_nv, column_n.contiguous(), max_n, sum_n, target_n, width, num_true, BLOCK=block, num_warps=warps(block)
    )
    return max_n, sum_n, target_n


def cross_entropy_gradient(
    state_nv: Tensor, num_true: int, column_n: Tensor, max_n: Tensor, factor_n: Tensor, hot_n: Tensor
) -> None:
    """The logits become exp(logit - max) * factor, less `hot_n` at `column_n`; padding columns become 0. In place."""
    if not is_taken(state_nv):
        return reference.cross_entropy_gradient(state_nv, num_true, column_n, max_n, factor_n, hot_n)
    num_rows, width = state_nv.shape
    block = min(triton.next_power_of_2(width), MAX_BLOCK)
    gradient[(num_rows, triton.cdiv(width, block))](
        state_nv,
        column_n.contiguous(),
        max_n.contiguous(),
        factor_n.contiguous(),
        hot_n.contiguous(),
        width,
        num_true,
        BLOCK=block,
        num_warps=warps(block),
    )
    return None


@triton.jit
def statistics(logits_ptr, column_ptr, max_ptr, sum_ptr, target_ptr, width, num_true, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    # The least fp32, not -inf: a rank may have only padding, and -inf - -inf would be nan.
    top = tl.full((), -3.4028234663852886e38, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, num_true, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + row * width + column, mask=column < num_true, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(logit, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logit - new_top), 0)
        top = new_top
    tl.store(max_ptr + row, top)
    tl.store(sum_ptr + row, total)
    target = tl.load(column_ptr + row)
    tl.store(target_ptr + row, tl.load(logits_ptr + row * width + target).to(tl.float32))


@triton.jit
def gradient(logits_ptr, column_ptr, max_ptr, factor_ptr, hot_ptr, width, num_true, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logit = tl.load(logits_ptr + row * width + column, mask=column < num_true, other=float("-inf")).to(tl.float32)
    grad = tl.exp(logit - tl.load(max_ptr + row)) * tl.load(factor_ptr + row)
    grad -= tl.where(column == tl.load(column_ptr + row), tl.load(hot_ptr + row), 0.0)
    tl.store(logits_ptr + row * width + column, grad.to(logits_ptr.dtype.element_ty), mask=column < width)
