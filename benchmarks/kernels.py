"""The fused kernels, side by side: torch and Triton, forward and backward, on one CUDA device.

    .venv/bin/python benchmarks/kernels.py
    .venv/bin/python benchmarks/kernels.py --dtype fp16 --tokens 16384

Sizes are those of a 7B model: hidden 4096, feed-forward 11008, 32 heads of 128, vocabulary 32000. Times are medians of
triton.testing.do_bench. GB/s is Triton's, of the least that forward and backward have to move: the input three times
(read, read again, its gradient written), the output twice. Without a CUDA device there is nothing to measure, which is
said.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.kernels.kernels import TORCH, Kernels, choose

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HIDDEN, FFN, HEADS, HEAD_DIM, VOCABULARY, SEQUENCE = 4096, 11008, 32, 128, 32000, 2048

Operation = tuple[str, Tensor, Callable[[Kernels], Tensor]]
"""(name, the input, forward)."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--tokens", type=int, default=8192, help="positions at a time (default 8192)")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure (on a CPU, --fused-kernels auto is torch)")
        return 0
    from triton.testing import do_bench

    print(f"{torch.cuda.get_device_name()}, {arguments.dtype}, {arguments.tokens} positions; ms forward + backward")
    print(f"{'operation':<20}{'torch':>10}{'triton':>10}{'ratio':>8}{'GB/s':>8}")
    triton = choose("triton", "cuda")
    for name, x, forward in operations(DTYPES[arguments.dtype], arguments.tokens, "cuda"):
        moved = 3 * x.nbytes + 2 * forward(triton).nbytes
        plain, fused = (do_bench(step_of(forward, kernels), return_mode="median") for kernels in (TORCH, triton))
        rate = moved / fused / 1e6
        print(f"{name:<20}{plain:>10.3f}{fused:>10.3f}{plain / fused:>8.2f}{rate:>8.0f}", flush=True)
    return 0


def step_of(forward: Callable[[Kernels], Tensor], kernels: Kernels) -> Callable[[], None]:
    """Forward, and backward from a gradient of ones."""
    upstream = torch.ones_like(forward(kernels))

    def step() -> None:
        forward(kernels).backward(upstream)

    return step


def operations(dtype: torch.dtype, tokens: int, device: str) -> Iterator[Operation]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_()

    x, weight, bias = draw(tokens, HIDDEN), draw(HIDDEN), draw(HIDDEN)
    yield "layer_norm", x, lambda kernels: kernels.layer_norm(x, weight, bias, 1e-5)
    yield "rms_norm", x, lambda kernels: kernels.rms_norm(x, weight, 1e-5)
    gate_up = draw(tokens, 2 * FFN)
    yield "swiglu", gate_up, lambda kernels: kernels.swiglu(gate_up)
    up, up_bias = draw(tokens, FFN), draw(FFN)
    yield "bias_gelu", up, lambda kernels: kernels.bias_gelu(up, up_bias)
    s = min(tokens, SEQUENCE)
    heads = draw(tokens // s, s, HEADS, HEAD_DIM)
    angle = torch.rand(s, HEAD_DIM // 2, device=device)
    cos, sin = angle.cos(), angle.sin()
    yield "rope", heads, lambda kernels: kernels.rope(heads, cos, sin)
    scores, slopes = draw(1, HEADS, s, s), torch.rand(HEADS, device=device)
    yield "causal_softmax", scores, lambda kernels: kernels.causal_softmax(scores, 0.1, slopes)
    logits, labels = draw(tokens, VOCABULARY), torch.randint(0, VOCABULARY, (tokens,), device=device)
    yield "cross_entropy", logits, lambda kernels: cross_entropy(kernels, logits, labels)


def cross_entropy(kernels: Kernels, logits: Tensor, labels: Tensor) -> Tensor:
    """The layer's, of one tp rank; the copy that it consumes is part of both times."""
    from megatron.layers.cross_entropy import cross_entropy
    from megatron.layers.vocabulary import Vocabulary
    from megatron.parallel.context import ParallelContext

    vocabulary = Vocabulary(VOCABULARY, VOCABULARY, ParallelContext.single())
    return cross_entropy(logits * 1.0, labels, vocabulary, kernels)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
