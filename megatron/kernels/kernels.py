"""Provisional: the torch functions behind the kernels' interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def _layer_norm(x, weight, bias, epsilon):
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def _rms_norm(x, weight, epsilon):
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def _swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def _bias_gelu(x, bias):
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def _rope(x, cos, sin):
    half = cos.shape[-1]
    wide = x if x.dtype == torch.float64 else x.float()
    cos, sin = cos[:, None].to(wide.dtype), sin[:, None].to(wide.dtype)
    x1, x2, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], -1).to(x.dtype)


def _causal_softmax(scores, scale, slopes):
    wide = scores if scores.dtype == torch.float64 else scores.float()
    wide = wide * scale
    length = scores.shape[-1]
    if slopes is not None:
        wide = wide + slopes.to(wide.dtype)[:, None, None] * torch.arange(length, device=scores.device)
    mask = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    return wide.masked_fill(mask, -torch.inf).softmax(-1).to(scores.dtype)


@dataclass(frozen=True)
class Kernels:
    layer_norm: Callable[..., Tensor] = _layer_norm
    rms_norm: Callable[..., Tensor] = _rms_norm
    swiglu: Callable[..., Tensor] = _swiglu
    bias_gelu: Callable[..., Tensor] = _bias_gelu
    rope: Callable[..., Tensor] = _rope
    causal_softmax: Callable[..., Tensor] = _causal_softmax


TORCH = Kernels()


def choose(mode: str, device_type: str) -> Kernels:
    return TORCH
