"""The block's feed-forward part: up, GELU, down; or gate and up, SiLU(gate) * up, down (SwiGLU).

GELU is the tanh approximation, as GPT-2's and Megatron's fused bias-gelu, or with --exact-gelu the error function's, as
Pythia's. Gate and up are one matrix, gate first.

    y_bsh = Mlp(model, context, kernels)(x_bsh)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.kernels.kernels import TORCH, Kernels
from megatron.layers.attention import output_std
from megatron.layers.linear import ColumnLinear, Epilogue, RowLinear
from megatron.layers.lora import Lora
from megatron.layers.parameter import normal
from megatron.parallel.context import ParallelContext
from megatron.ucp.layout import Part


class Mlp(nn.Module):
    def __init__(
        self, model: ModelConfig, context: ParallelContext, kernels: Kernels = TORCH, width: int | None = None
    ) -> None:
        """`width`: features in the middle, if not the model's (an expert that all tokens go through)."""
        super().__init__()
        hidden, ffn, has_bias = model.hidden_size, width or model.ffn_hidden_size, model.add_bias_linear
        self.dense_h_to_4h = ColumnLinear(
            hidden,
            2 * ffn if model.swiglu else ffn,
            context,
            normal(model.init_method_std),
            has_bias,
            parts=(Part(ffn), Part(ffn)) if model.swiglu else None,
            epilogue=activation(model, kernels),
            lora=Lora.of(model, "mlp.dense_h_to_4h"),
        )
        of_output = Lora.of(model, "mlp.dense_4h_to_h")
        self.dense_4h_to_h = RowLinear(ffn, hidden, context, normal(output_std(model)), has_bias, lora=of_output)

    def forward(self, x_bsh: Tensor) -> Tensor:
        """Collective over tp."""
        return self.dense_4h_to_h(self.dense_h_to_4h(x_bsh))


def activation(model: ModelConfig, kernels: Kernels) -> Epilogue:
    """From the first matrix's product and its bias to what the second one takes."""
    if model.exact_gelu:
        return lambda product, bias: F.gelu(product if bias is None else product + bias)
    if not model.swiglu:
        return kernels.bias_gelu
    return lambda product, bias: kernels.swiglu(product if bias is None else product + bias)
