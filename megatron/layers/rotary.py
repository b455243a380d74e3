"""Rotary positions: the angles by which pairs of a head's features are turned (Su et al. 2021).

A table of angles is a function of the configuration, so nothing is kept in the model. It is computed in
forward, in fp64, and shared by all layers: what a constructor makes would have the run's precision under zero.Init.

    cos_sd, sin_sd = rotary_table(Rotary.of(model), 0, 1024, of_length=1024, device=x.device)   # [s, rotated / 2], fp32
    q_bsnd = kernels.rope(q_bsnd, cos_sd, sin_sd)

Stretching, for sequences longer than the model was made for: "linear" divides positions by the factor; "ntk" raises
the base by factor ^ (d / (d - 2)), so that the longest wave is stretched by the factor and the shortest not at all;
"llama3" divides the frequency of waves longer than original length / low factor, leaves those shorter than original
length / high factor, and goes from one to the other in between; "longrope" (Ding et al. 2024, arXiv 2402.13753)
divides every frequency by a factor of its own and multiplies cos and sin, with one set of factors for sequences of up
to the original length and another for longer ones. All as in transformers' modeling_rope_utils.py; longrope's two
scales as in its models/phimoe.
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
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    short_scale: float = 1.0
    long_scale: float = 1.0

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
            model.rope_short_factors,
            model.rope_long_factors,
            model.rope_short_mscale,
            model.rope_long_mscale,
        )

    def scale(self, of_length: int) -> float:
        """What cos and sin are multiplied by in sequences of this length."""
        if self.scaling != "longrope":
            return 1.0
        return self.long_scale if of_length > self.original_length else self.short_scale

    def frequencies(self, of_length: int, device: torch.device | None = None) -> Tensor:
        """Radians per position of each pair in sequences of this length, fp64 [rotary_dim / 2]."""
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
        if self.scaling == "longrope":
            factors = self.long_factors if of_length > self.original_length else self.short_factors
            return frequencies / torch.tensor(factors, dtype=torch.float64, device=device)
        return frequencies


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # it is kept, and what an evaluation made then could not be trained with
def rotary_table(
    rotary: Rotary, start: int, length: int, of_length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of `length` positions from `start` on, in a sequence `of_length`: each fp32 [length, rotated / 2]."""
    positions = torch.arange(start, start + length, dtype=torch.float64, device=device)
    angles, scale = positions[:, None] * rotary.frequencies(of_length, device), rotary.scale(of_length)
    return (angles.cos() * scale).float(), (angles.sin() * scale).float()
