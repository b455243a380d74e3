"""The layer computes LayerNorm, with the kernels that it is given."""

from dataclasses import replace

import torch

from megatron.kernels.kernels import TORCH
from megatron.layers.norm import LayerNorm
from megatron.parallel.context import ParallelContext


def test_against_the_formula():
    norm = LayerNorm(8, ParallelContext.single(), epsilon=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(8.0))
        norm.bias.fill_(0.5)
    x = torch.randn(2, 3, 8)
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected * torch.arange(8.0) + 0.5, rtol=0, atol=1e-5)


def test_the_given_kernel_runs():
    calls = []
    kernels = replace(TORCH, layer_norm=lambda *args: calls.append(args) or "fused")
    norm = LayerNorm(8, ParallelContext.single(), 1e-5, kernels)
    assert norm("x") == "fused"
    ((x, weight, bias, epsilon),) = calls
    assert (x, epsilon) == ("x", 1e-5) and weight is norm.weight and bias is norm.bias
