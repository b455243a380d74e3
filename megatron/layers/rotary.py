"""Rotary positions: the angles by which pairs of a head's features are turned (Su et al. 2021).

A table of angles is a function of the configuration, so nothing is kept in the model. It is computed in
forward, in fp64, and shared by all layers: what a constructor makes would have the run's precision under zero.Init.

    cos_sd, sin_sd = rotary_table(Rotary.of(model), start=0, length=1024, device=x.device)     # [s, rotated / 2], fp32
    q_bsnd = kernels.rope(q_bsnd, cos_sd, sin_sd)

Stretching, for sequences longer than the model was made for: "linear" divides positions by the factor; "ntk" raises
the base by factor ^ (d / (d - 2)), so that the longest wave is stretched by the factor and the shortest not at all;
"llama3" divides the frequency of waves longer than original length / low factor, leaves those shorter than original
length / high factor, and goes from one to the other in between (as transformers' modeling_rope_utils.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatron.config.model import ModelConfig


@dataclass(frozen=True)
class Rotary:
    rotary_dim: int
    """Features of a head that are turned, in pairs (i, i + rotary_dim / 2)."""
    theta: float = 10000.0
    scaling: str | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    @classmethod
    def of(cls, model: ModelConfig) -> Rotary:
        return cls(
            model.rotary_dim,
            model.rope_theta,
            model.rope_scaling_type,
            model.rope_scaling_factor,
            model.rope_low_freq_factor,
            model.rope_high_freq_factor,
            model.rope_original_max_position_embeddings,
        )

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """Radians per position of each pair, fp64 [rotary_dim / 2]."""
        theta = self.theta
        if self.scaling == "ntk":
            theta *= self.factor ** (self.rotary_dim / max(self.rotary_dim - 2, 1))
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64, device=device) / self.rotary_dim
        frequencies = theta**-exponents
        if self.scaling == "linear":
            return frequencies / self.factor
        if self.scaling == "llama3":
            waves_in_original = self.original_length * frequencies / (2 * math.pi)
            share_left = (waves_in_original - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            share_left = share_left.clamp(0.0, 1.0)
            return frequencies * (share_left + (1 - share_left) / self.factor)
        return frequencies


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # it is kept, and what an evaluation made then could not be trained with
def rotary_table(rotary: Rotary, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin) of positions start .. start + length - 1, each fp32 [length, rotary_dim / 2]."""
    positions = torch.arange(start, start + length, dtype=torch.float64, device=device)
    angles = positions[:, None] * rotary.frequencies(device)
    return angles.cos().float(), angles.sin().float()
