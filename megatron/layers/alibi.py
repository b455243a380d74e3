"""ALiBi: instead of positions, a penalty that grows with the distance to a key, at each head's own rate.

slopes_n = alibi_slopes(num_heads)        # fp32; scores += slope * (key position - query position)

Rates as in Press et al. 2022: a geometric series from 2^(-8/n) on; for n that is no power of two, the series of the
power below, and then every other member of that of the power above (as BLOOM's).
"""

from __future__ import annotations

import torch
from torch import Tensor


def alibi_slopes(num_heads: int, device: torch.device | None = None) -> Tensor:
    """fp32 [num_heads], for heads in their order in the whole model."""
    below = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / below) for i in range(below)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / below) for i in range(num_heads - below)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)
