"""The dispatch of layer normalisation: Apex only on CUDA and only if it is there."""

import types

import torch

from megatron.kernels import layer_norm as module
from megatron.layers.norm import LayerNorm
from megatron.parallel.context import ParallelContext


def test_torch_on_a_cpu_even_with_apex(monkeypatch):
    monkeypatch.setattr(module, "_apex_layer_norm", lambda: 1 / 0)
    norm = LayerNorm(8, ParallelContext.single(), epsilon=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(8.0))
        norm.bias.fill_(0.5)
    x = torch.randn(2, 3, 8)
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected * torch.arange(8.0) + 0.5, rtol=0, atol=1e-5)


def test_apex_on_cuda(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_apex_layer_norm", lambda: lambda *args: calls.append(args) or "fused")
    weight = torch.ones(8)
    assert module.layer_norm(types.SimpleNamespace(is_cuda=True), weight, "bias", 1e-5) == "fused"
    # apex: fused_layer_norm_affine(input, weight, bias, normalized_shape, eps)
    assert calls[0][1:] == (weight, "bias", (8,), 1e-5)
