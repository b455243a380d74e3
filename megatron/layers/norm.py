"""Normalisations with their parameters, replicated on every tp rank.

y_bsh = build_norm(model, context, kernels)(x_bsh)        # LayerNorm or RmsNorm, as --normalization says
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.kernels.kernels import TORCH, Kernels
from megatron.layers.parameter import ONES, ZEROS, declare
from megatron.parallel.collectives import copy_to_tp, replicated
from megatron.parallel.context import ParallelContext
from megatron.ucp.layout import Layout


class LayerNorm(nn.Module):
    def __init__(self, hidden_size: int, context: ParallelContext, epsilon: float, kernels: Kernels = TORCH) -> None:
        super().__init__()
        self.epsilon, self.context, self.kernels = epsilon, context, kernels
        layout = Layout.replicate((hidden_size,))
        self.weight = declare(layout, context, ONES, is_decayed=False)
        self.bias = declare(layout, context, ZEROS, is_decayed=False)

    def forward(self, x_bsh: Tensor) -> Tensor:
        weight, bias = replicated((self.weight, self.bias), self.context)
        return self.kernels.layer_norm(x_bsh, weight, bias, self.epsilon)


class RmsNorm(nn.Module):
    """Zhang and Sennrich 2019, as LLaMA's: the mean square in fp32, no mean taken off, no bias."""

    def __init__(self, hidden_size: int, context: ParallelContext, epsilon: float, kernels: Kernels = TORCH) -> None:
        super().__init__()
        self.epsilon, self.context, self.kernels = epsilon, context, kernels
        self.weight = declare(Layout.replicate((hidden_size,)), context, ONES, is_decayed=False)

    def forward(self, x_bsh: Tensor) -> Tensor:
        (weight,) = replicated((self.weight,), self.context)
        return self.kernels.rms_norm(x_bsh, weight, self.epsilon)


class HeadNorm(nn.Module):
    """An RMSNorm of each head's features by itself (Qwen3's q_norm and k_norm). A tp rank has some of the heads, so
    that its gradient is a part of the weight's: summed over tp, with sequence parallelism or without."""

    def __init__(self, head_dim: int, context: ParallelContext, epsilon: float, kernels: Kernels = TORCH) -> None:
        super().__init__()
        self.epsilon, self.context, self.kernels = epsilon, context, kernels
        self.weight = declare(Layout.replicate((head_dim,)), context, ONES, is_decayed=False)

    def forward(self, x_bsnd: Tensor) -> Tensor:
        """Backward is collective over tp."""
        return self.kernels.rms_norm(x_bsnd, copy_to_tp(self.weight, self.context), self.epsilon)


def norm_class(model: ModelConfig) -> type[LayerNorm] | type[RmsNorm]:
    """Built with (hidden_size, context, epsilon, kernels)."""
    return RmsNorm if model.normalization == "rmsnorm" else LayerNorm


def build_norm(model: ModelConfig, context: ParallelContext, kernels: Kernels = TORCH) -> LayerNorm | RmsNorm:
    return norm_class(model)(model.hidden_size, context, model.layernorm_epsilon, kernels)
