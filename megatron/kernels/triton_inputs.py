"""Which inputs the Triton kernels take, and how many warps a block of columns gets.

if not is_taken(x, weight): return reference.rms_norm(x, weight, epsilon)
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_taken(*tensors: Tensor | None) -> bool:
    """Not fp64, in which tests compute truths, and not empty, which is no grid."""
    return all(tensor is None or (tensor.dtype in DTYPES and tensor.numel() > 0) for tensor in tensors)


def warps(block: int, most: int = 16) -> int:
    """Of 32 threads, at least 8 columns for each."""
    return min(max(block // 256, 1), most)
