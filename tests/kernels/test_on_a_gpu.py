"""Every Triton kernel on a CUDA device against the truth, and the choice that such a device gets."""

from __future__ import annotations

import importlib

import pytest
import torch

from kernels.cases import CASES, DTYPES, Case, distance, outcome, sharded_cross_entropy, truth_of
from kernels.test_interpreted import MODULE
from megatron.kernels.kernels import choose

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LARGE = (
    Case("layer_norm", (700, 4096)),
    Case("rms_norm", (3, 301, 5000)),
    Case("swiglu", (700, 2 * 5461)),
    Case("bias_gelu", (700, 5461)),
    Case("rope", (2, 301, 33, 128)),
    Case("causal_softmax", (1, 3, 700)),
    Case("causal_softmax", (1, 2, 4500), "alibi"),
    Case("cross_entropy", (64, 50257, 50304)),
    Case("cross_entropy", (64, 50257, 12576)),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", (*CASES, *LARGE), ids=str)
def test_triton_against_the_truth(case, dtype):
    module = importlib.import_module(f"megatron.kernels.{MODULE[case.operation]}")
    is_sharded = case.operation == "cross_entropy"
    function = sharded_cross_entropy(module) if is_sharded else getattr(module, case.operation)
    found = outcome(function, case, dtype, "cuda")
    # Sums over hundreds of rows and thousands of columns.
    allowed = 4 if case in LARGE else 1
    assert distance(found, truth_of(case, dtype), dtype) <= allowed


def test_equal_runs_are_bitwise_equal():
    module = importlib.import_module("megatron.kernels.triton_norms")
    first, second = (outcome(module.layer_norm, LARGE[0], torch.bfloat16, "cuda") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))


def test_auto_leaves_nothing_to_torch():
    assert "torch" not in choose("auto", "cuda").name.values()
