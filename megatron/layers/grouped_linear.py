"""Many linear layers at once: each expert's matrix on its own rows.

    y_ro = grouped_linear(x_ri, weight_eoi, bias_eo, counts)       # rows sorted by expert, counts[e] of them each

torch's grouped_mm where it takes the sizes, a loop elsewhere. What is kept for backward is the parameter itself, never
a view of it: under ZeRO-3 a view would keep the gathered weights of all layers alive from forward to backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNMENT = 16
"""Bytes: grouped_mm refuses rows that do not start at a multiple of it."""
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_linear(x_ri: Tensor, weight_eoi: Tensor, bias_eo: Tensor | None, counts: Sequence[int]) -> Tensor:
    """[r, i] -> [r, o]. Without rows too there is something for backward to come through: other ranks wait for this
    one there."""
    return _GroupedLinear.apply(x_ri, weight_eoi, bias_eo, list(counts))


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ri: Tensor, weight_eoi: Tensor, bias_eo: Tensor | None, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_ri, weight_eoi)
        ctx.counts = counts
        if _is_grouped(x_ri, weight_eoi):
            y_ro = F.grouped_mm(x_ri, weight_eoi.transpose(1, 2), offs=_ends(counts, x_ri.device))
        else:
            y_ro = torch.cat([own @ weight.T for own, weight in zip(x_ri.split(counts), weight_eoi.unbind(0))])
        if bias_eo is not None:
            rows = torch.tensor(counts, device=x_ri.device)
            y_ro += bias_eo.repeat_interleave(rows, dim=0, output_size=x_ri.shape[0])
        return y_ro

    @staticmethod
    def backward(ctx: Any, grad_ro: Tensor) -> tuple:
        x_ri, weight_eoi = ctx.saved_tensors
        counts, grad_x, grad_weight, grad_bias = ctx.counts, None, None, None
        is_x_needed, is_weight_needed, is_bias_needed, _ = ctx.needs_input_grad
        grad_ro = grad_ro.contiguous()
        if is_bias_needed:  # by slices: index_add would sum in another order every time on a GPU
            grad_bias = torch.stack([grad.sum(0) for grad in grad_ro.split(counts)])
        if _is_grouped(x_ri, weight_eoi):
            ends = _ends(counts, x_ri.device)
            grad_x = F.grouped_mm(grad_ro, weight_eoi, offs=ends) if is_x_needed else None
            grad_weight = F.grouped_mm(grad_ro.T, x_ri, offs=ends) if is_weight_needed else None
            return grad_x, grad_weight, grad_bias, None
        grads = grad_ro.split(counts)
        if is_x_needed:
            grad_x = torch.cat([grad @ weight for grad, weight in zip(grads, weight_eoi.unbind(0))])
        if is_weight_needed:
            grad_weight = torch.stack([grad.T @ own for grad, own in zip(grads, x_ri.split(counts))])
        return grad_x, grad_weight, grad_bias, None


def _is_grouped(x_ri: Tensor, weight_eoi: Tensor) -> bool:
    size = x_ri.element_size()
    is_aligned = x_ri.shape[1] * size % _ALIGNMENT == weight_eoi.shape[1] * size % _ALIGNMENT == 0
    return is_aligned and x_ri.shape[0] > 0 and x_ri.dtype in _GROUPED_DTYPES


def _ends(counts: list[int], device: torch.device) -> Tensor:
    return torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
