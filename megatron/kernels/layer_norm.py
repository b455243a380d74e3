"""Layer normalisation: NVIDIA Apex's fused kernel on CUDA where it is installed, torch's elsewhere.

y = layer_norm(x, weight, bias, epsilon)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Over the last dimension."""
    if x.is_cuda and (fused := _apex_layer_norm()) is not None:
        return fused(x, weight, bias, weight.shape, epsilon)
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


@cache
def _apex_layer_norm() -> Callable[..., Tensor] | None:
    """Apex is an extra that must be compiled for one's CUDA: used if there, never required."""
    try:
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine
    except ImportError:
        return None
    return fused_layer_norm_affine
