"""The experts of one MoE layer: all in one tensor [E, out, in] a matrix, cut over ep by experts and over tp inside.

One layout for every degree. Experts are dealt to ep ranks, an expert's inner features to tp ranks, gate
and up each by itself; every element is kept by one (ep, tp) rank. Rows come sorted by expert.

    experts = Experts(model, num_experts, context, kernels)
    y_rh = experts(x_rh, counts)              # rows of the first expert here, then of the second, ...; a tp rank's part
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.kernels.kernels import TORCH, Kernels
from megatron.layers.attention import output_std
from megatron.layers.grouped_linear import grouped_linear
from megatron.layers.mlp import activation
from megatron.layers.parameter import ZEROS, Initial, declare, normal
from megatron.parallel.collectives import even_sizes, gather_rows
from megatron.parallel.context import ParallelContext
from megatron.ucp.layout import Cut, Layout, Part


class Experts(nn.Module):
    def __init__(
        self, model: ModelConfig, num_experts: int, context: ParallelContext, kernels: Kernels = TORCH
    ) -> None:
        super().__init__()
        self.context, self.activation, self.num_experts = context, activation(model, kernels), num_experts
        hidden, ffn = model.hidden_size, model.moe_ffn_hidden_size
        up = (Part(ffn), Part(ffn)) if model.swiglu else (Part(ffn),)
        width = sum(part.size for part in up)
        self.num_hidden = hidden

        def matrix(shape: tuple[int, ...], dim: int, parts: tuple[Part, ...], initial: Initial) -> nn.Parameter:
            cuts = (Cut(0, (Part(num_experts),), "ep"), Cut(dim, parts, "tp"))
            param = declare(Layout.shard_hy(shape, cuts), context, initial, is_decayed=len(shape) == 3, kind="experts")
            # Under deepspeed.zero.Init a parameter is partitioned as soon as its layer is made: it is marked before.
            for mark, value in context.marks_of_experts.items():
                setattr(param, mark, value)
            return param

        self.dense_h_to_4h = matrix((num_experts, width, hidden), 1, up, normal(model.init_method_std))
        self.dense_4h_to_h = matrix((num_experts, hidden, ffn), 2, (Part(ffn),), normal(output_std(model)))
        self.register_parameter("bias_h_to_4h", None)
        self.register_parameter("bias_4h_to_h", None)
        if model.add_bias_linear:
            self.bias_h_to_4h = matrix((num_experts, width), 1, up, ZEROS)
            # Kept in parts, put together at use: no tp rank has a copy of what another one has.
            self.bias_4h_to_h = matrix((num_experts, hidden), 1, (Part(hidden),), ZEROS)

    def forward(self, x_rh: Tensor, counts: Sequence[int]) -> Tensor:
        """[rows, h] -> [rows, h], this tp rank's summand. Collective over tp with biases."""
        middle_rp = self.activation(grouped_linear(x_rh, self.dense_h_to_4h, self.bias_h_to_4h, counts), None)
        return grouped_linear(middle_rp, self.dense_4h_to_h, self._share_of_bias(), counts)

    def _share_of_bias(self) -> Tensor | None:
        """[experts here, h]: what this tp rank adds, of which the sum over tp is the bias."""
        if self.bias_4h_to_h is None:
            return None
        sizes = even_sizes(self.num_hidden, self.context.tp_size)
        return gather_rows(self.bias_4h_to_h.T, self.context, sizes).T / self.context.tp_size
