"""Every operation in plain torch: the truth that the fused kernels are held against, and what runs without them.

    y = layer_norm(x, weight, bias, epsilon)
    p = swiglu(gate_up)

Sums, exponentials and rotations are computed in fp32 (fp64 for fp64) and rounded to the input's precision. Legend:
b batch, s sequence, n heads, d head size, q and k positions of queries and keys, v columns of the vocabulary; in the
cross entropy n is all b * s positions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_AT_ONCE_CPU = 1 << 19
"""Logits worked on at once on a CPU: 2 MiB, so that four passes over them read memory once."""
LOGITS_AT_ONCE = 1 << 24
"""Elsewhere, for logits of low precision: temporaries of 64 MiB."""


class KernelShapeError(ValueError):
    """Tensors whose shapes do not belong together."""


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """Over the last dimension."""
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Over the last dimension; rounded before the multiplication with the weight, as Hugging Face's LlamaRMSNorm."""
    wide = _wide(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2p] -> [..., p]: silu(first half) * second half (Shazeer 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """GELU of x + bias in its tanh approximation, as GPT-2's."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def rope(x_bsnd: Tensor, cos_sd: Tensor, sin_sd: Tensor) -> Tensor:
    """Rotates the first r features of each head, feature i with feature i + r/2 (LLaMA's and GPT-NeoX's halves, Su et
    al. 2021 with another order of features); cos and sin are [s, r/2]. Features from r on pass through."""
    check_tables(x_bsnd, cos_sd, sin_sd)
    half = cos_sd.shape[-1]
    first, second, rest = x_bsnd.split([half, half, x_bsnd.shape[-1] - 2 * half], dim=-1)
    first, second = _wide(first), _wide(second)
    cos, sin = (table.to(first.dtype).unsqueeze(1) for table in (cos_sd, sin_sd))
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([*(part.to(x_bsnd.dtype) for part in rotated), rest], dim=-1)


def causal_softmax(scores_bnqk: Tensor, scale: float, slopes_n: Tensor | None) -> Tensor:
    """softmax(scale * scores + slope * (k - q)) over the keys k <= q, zero elsewhere; as many keys as queries.

    ALiBi (Press et al. 2022) as BLOOM has it adds slope * k, which differs by a constant of the row, so that the
    softmax is the same; k - q is small where the weight is large, which keeps digits.
    """
    check_lengths(scores_bnqk, slopes_n)
    wide = _wide(scores_bnqk) * scale
    position = torch.arange(scores_bnqk.shape[-1], device=scores_bnqk.device)
    distance_qk = position - position.unsqueeze(1)
    if slopes_n is not None:
        wide = wide + slopes_n.to(wide.dtype).view(-1, 1, 1) * distance_qk
    wide = wide.masked_fill(distance_qk > 0, -math.inf)
    return wide.softmax(-1).to(scores_bnqk.dtype)


def check_tables(x_bsnd: Tensor, cos_sd: Tensor, sin_sd: Tensor) -> None:
    _, s, _, d = x_bsnd.shape
    if cos_sd.shape != sin_sd.shape or cos_sd.dim() != 2 or cos_sd.shape[0] != s or 2 * cos_sd.shape[1] > d:
        raise KernelShapeError(
            f"rope found tables of shapes {tuple(cos_sd.shape)} and {tuple(sin_sd.shape)} for heads of shape "
            f"{tuple(x_bsnd.shape)}; expected twice ({s}, at most {d // 2}). Give it the tables of these positions."
        )


def check_lengths(scores_bnqk: Tensor, slopes_n: Tensor | None) -> None:
    _, n, num_queries, num_keys = scores_bnqk.shape
    if num_queries != num_keys or (slopes_n is not None and slopes_n.shape != (n,)):
        slopes = "none" if slopes_n is None else tuple(slopes_n.shape)
        raise KernelShapeError(
            f"causal_softmax found {num_queries} queries, {num_keys} keys, {n} heads and slopes {slopes}; expected as "
            f"many keys as queries and one slope for each head. Give it whole sequences, and these heads' slopes."
        )


# -- cross entropy: two halves, between which tp ranks combine what they found (layers/cross_entropy.py) -------------


def cross_entropy_statistics(logits_nv: Tensor, num_true: int, column_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(maximum, sum of exp(logit - maximum), logit at `column_n`) of each row, over the first `num_true` columns; fp32
    (fp64 for fp64).

    Consumes the logits: what is left in their memory is for `cross_entropy_gradient`. fp32 and fp64 become
    exp(logit - maximum); lower precisions, which could not hold that, stay, and fp32 exists of one block of rows.
    """
    logits_nv[:, num_true:] = -math.inf
    target_n = _wide(logits_nv.gather(1, column_n.unsqueeze(1)).squeeze(1))
    max_n, sum_n = torch.empty_like(target_n), torch.empty_like(target_n)
    for rows in _blocks(logits_nv):
        # A copy only of lower precisions.
        block = _wide(logits_nv[rows])
        torch.amax(block, 1, out=max_n[rows])
        # A rank may have only padding: -inf - -inf would be nan.
        max_n[rows].clamp_(min=torch.finfo(block.dtype).min)
        torch.sum(block.sub_(max_n[rows].unsqueeze(1)).exp_(), 1, out=sum_n[rows])
    return max_n, sum_n, target_n


def cross_entropy_gradient(
    state_nv: Tensor, num_true: int, column_n: Tensor, max_n: Tensor, factor_n: Tensor, hot_n: Tensor
) -> None:
    """What `cross_entropy_statistics` left becomes exp(logit - max) * factor, less `hot_n` at `column_n`, in place."""
    del num_true  # padding columns hold exp(-inf)
    if state_nv.dtype in (torch.float32, torch.float64):
        state_nv.mul_(factor_n.unsqueeze(1)).scatter_add_(1, column_n.unsqueeze(1), (-hot_n).unsqueeze(1))
        return
    for rows in _blocks(state_nv):
        block = state_nv[rows].float().sub_(max_n[rows].unsqueeze(1)).exp_().mul_(factor_n[rows].unsqueeze(1))
        # Before it is rounded: near certainty the two nearly cancel.
        block.scatter_add_(1, column_n[rows].unsqueeze(1), (-hot_n[rows]).unsqueeze(1))
        state_nv[rows] = block


def _blocks(logits_nv: Tensor) -> list[slice]:
    num_rows, width = logits_nv.shape
    if logits_nv.device.type == "cpu":
        step = LOGITS_AT_ONCE_CPU // width
    elif logits_nv.dtype in (torch.float32, torch.float64):
        step = num_rows  # in place, nothing to save
    else:
        step = LOGITS_AT_ONCE // width
    step = max(1, step)
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def _wide(x: Tensor) -> Tensor:
    """fp32, except that fp64 (tests) stays."""
    return x if x.dtype == torch.float64 else x.float()
