"""Inputs of every operation, its truth in plain fp64, and the distance from it.

    found, truth = outcome(function, case, dtype, "cpu"), truth_of(case, dtype)
    assert distance(found, truth, dtype) <= 1

The truth is the textbook formula under torch's autograd, on the same inputs rounded to the same precision; it shares
no code with megatron/kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNIT = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Of the distance. bf16 and fp16: one in the last place (the interpreter truncates); fp32 leaves 3 bits to sums."""

FLOOR = 2e-6
"""Of the distance: a few fp32 roundings of numbers of size 10, where they cancel."""


@dataclass(frozen=True)
class Case:
    operation: str
    shape: tuple[int, ...]
    option: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, [self.operation, "x".join(map(str, self.shape)), self.option]))


ROWS = ((1, 1), (1, 7), (2, 2, 33), (7, 100))
CASES = (
    *(Case("layer_norm", shape) for shape in ((1, 3), *ROWS[1:])),
    Case("layer_norm", (5, 20), "no_bias"),
    *(Case("rms_norm", shape) for shape in ROWS),
    *(Case("swiglu", shape) for shape in ((1, 2), (1, 14), (2, 2, 66), (7, 90))),
    *(Case("bias_gelu", shape) for shape in ROWS),
    Case("bias_gelu", (5, 20), "no_bias"),
    *(Case("rope", shape) for shape in ((1, 1, 1, 2), (2, 3, 3, 6), (1, 5, 17, 20))),
    Case("rope", (2, 3, 5, 14), "part"),
    Case("rope", (2, 3, 5, 14), "views"),
    *(Case("causal_softmax", shape) for shape in ((1, 1, 1), (2, 3, 5), (1, 2, 21))),
    *(Case("causal_softmax", shape, "alibi") for shape in ((2, 3, 5), (1, 2, 21))),
    # positions, true vocabulary, columns of a shard
    *(Case("cross_entropy", shape) for shape in ((1, 1, 1), (3, 101, 101), (7, 101, 128), (5, 101, 48), (4, 10, 16))),
    Case("cross_entropy", (3, 20, 32), "certain"),
    Case("cross_entropy", (3, 50, 128), "only_padding"),
)
OPERATIONS = sorted({case.operation for case in CASES})


def arguments(case: Case, dtype: torch.dtype, device: str) -> tuple[list, Tensor]:
    """What the operation takes, in its order, and the gradient from above. Floats that learn require grad."""
    generator = torch.Generator().manual_seed(len(str(case)))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def learns(x: Tensor) -> Tensor:
        return x.requires_grad_()

    shape, width = case.shape, case.shape[-1]
    if case.operation in ("layer_norm", "bias_gelu", "rms_norm"):
        x = learns(3 * draw(*shape) + 1)
        weight = [] if case.operation == "bias_gelu" else [learns(1 + draw(width) / 2)]
        bias = [] if case.operation == "rms_norm" else [None if case.option == "no_bias" else learns(draw(width))]
        epsilon = [] if case.operation == "bias_gelu" else [1e-5]
        return [x, *weight, *bias, *epsilon], draw(*shape)
    if case.operation == "swiglu":
        return [learns(2 * draw(*shape))], draw(*shape[:-1], width // 2)
    if case.operation == "rope":
        x = draw(*shape)
        upstream = draw(*shape)
        if case.option == "views":  # one of the fused q, k, v, and a gradient that comes from [b, n, s, d]
            x = torch.cat([x, x, x], dim=-1)[..., width : 2 * width]
            upstream = upstream.transpose(1, 2).contiguous().transpose(1, 2)
        half = (width // 2 - 2) if case.option == "part" else width // 2
        angle = torch.arange(shape[1], dtype=torch.float64).outer(0.7 ** torch.arange(half, dtype=torch.float64))
        return [learns(x), angle.cos().float().to(device), angle.sin().float().to(device)], upstream
    if case.operation == "causal_softmax":
        b, n, s = shape
        slopes = torch.tensor([2.0 ** -(i + 1) for i in range(n)], device=device) if case.option == "alibi" else None
        return [learns(4 * draw(b, n, s, s)), 0.4, slopes], draw(b, n, s, s)
    positions, vocabulary, _ = shape
    logits = 5 * draw(positions, vocabulary)
    labels = torch.randint(0, vocabulary, (positions,), generator=generator)
    labels[0] = vocabulary - 1
    labels = labels.to(device)
    if case.option == "certain":
        logits.scatter_add_(1, labels.unsqueeze(1), torch.full_like(logits, 12.0))
    return [learns(logits), labels], draw(positions).float()


def outcome(function: Callable, case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    """The result and the gradient of everything that learns, on the CPU."""
    args, upstream = arguments(case, dtype, device)
    return _outcome(
        lambda *args: function(*args, case) if case.operation == "cross_entropy" else function(*args), args, upstream
    )


def truth_of(case: Case, dtype: torch.dtype) -> list[Tensor]:
    args, upstream = arguments(case, dtype, "cpu")
    wide = [
        arg.detach().double().requires_grad_(arg.requires_grad)
        if torch.is_tensor(arg) and arg.is_floating_point()
        else arg
        for arg in args
    ]
    return _outcome(TRUTH[case.operation], wide, upstream.double())


def _outcome(function: Callable, args: list, upstream: Tensor) -> list[Tensor]:
    y = function(*args)
    y.backward(upstream)
    grads = [arg.grad for arg in args if torch.is_tensor(arg) and arg.requires_grad]
    return [tensor.detach().cpu() for tensor in (y, *grads)]


def distance(found: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype) -> float:
    """The largest error, in units of 2 * UNIT * (the element's size + the tensor's root mean square). 1 is allowed."""
    assert [x.shape for x in found] == [x.shape for x in truth]
    worst = 0.0
    for x, y in zip(found, truth):
        assert x.dtype in (dtype, torch.float32), x.dtype
        error = (x.double() - y).abs() / (2 * UNIT[dtype] * (y.abs() + y.square().mean().sqrt()) + FLOOR)
        worst = max(worst, math.inf if error.isnan().any() else error.max().item())
    return worst


# -- truths ----------------------------------------------------------------------------------------------------------


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight
    return y if bias is None else y + bias


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight


def _swiglu(gate_up: Tensor) -> Tensor:
    half = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :half], gate_up[..., half:]
    return gate / (1 + (-gate).exp()) * up


def _bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    x = x if bias is None else x + bias
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As complex numbers."""
    half = cos.shape[-1]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(cos, sin)[:, None]
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)


def _causal_softmax(scores: Tensor, scale: float, slopes: Tensor | None) -> Tensor:
    """BLOOM's: the bias is slope * key position."""
    s = scores.shape[-1]
    values = scores * scale
    if slopes is not None:
        values = values + slopes[:, None, None] * torch.arange(s)
    exps = (values - values.max()).exp() * torch.ones(s, s, dtype=torch.float64).tril()
    return exps / exps.sum(-1, keepdim=True)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.exp().sum(-1).log() - logits[torch.arange(len(labels)), labels]


TRUTH = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "bias_gelu": _bias_gelu,
    "rope": _rope,
    "causal_softmax": _causal_softmax,
    "cross_entropy": _cross_entropy,
}


# -- the two halves of a cross entropy put together as tp ranks would, each with one shard of the columns ------------


class ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, module, shard: int, num_shards: int) -> Tensor:
        ctx.vocabulary, ctx.module = logits.shape[1], module
        padded = logits.new_full((len(labels), shard * num_shards), 50.0)  # padding that would be noticed
        padded[:, : ctx.vocabulary] = logits
        shards, found = [], []
        for i in range(num_shards):
            own = padded[:, i * shard : (i + 1) * shard].contiguous()
            num_true = min(max(ctx.vocabulary - i * shard, 0), shard)
            is_here = (labels >= i * shard) & (labels < i * shard + num_true)
            column = (labels - i * shard).where(is_here, 0)
            found.append(module.cross_entropy_statistics(own, num_true, column))
            shards.append((own, num_true, column, found[-1][0], is_here))
        top = torch.stack([max_n for max_n, _, _ in found]).amax(0)
        total = sum(sum_n * (max_n - top).exp() for max_n, sum_n, _ in found)
        target = sum(one[2].where(shard[4], 0.0) for one, shard in zip(found, shards))
        ctx.state = shards, top, total
        return total.log() + top - target

    @staticmethod
    def backward(ctx, grad_n: Tensor):
        shards, top, total = ctx.state
        for own, num_true, column, max_n, is_here in shards:
            factor = (max_n - top).exp() / total * grad_n
            ctx.module.cross_entropy_gradient(own, num_true, column, max_n, factor, grad_n * is_here)
        grad = torch.cat([shard[0] for shard in shards], dim=1)
        assert not grad[:, ctx.vocabulary :].any(), "padding has a gradient"
        return grad[:, : ctx.vocabulary], None, None, None, None


def sharded_cross_entropy(module) -> Callable:
    def function(logits: Tensor, labels: Tensor, case: Case) -> Tensor:
        shard = case.shape[2]
        num_shards = 2 if case.option == "only_padding" else -(-case.shape[1] // shard)
        return ShardedCrossEntropy.apply(logits, labels, module, shard, num_shards)

    return function
