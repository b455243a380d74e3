"""Every Triton kernel, forward and backward, in Triton's interpreter against the truth; and planted faults."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

from kernels.cases import CASES, DTYPES, OPERATIONS, Case, distance, outcome, sharded_cross_entropy, truth_of
from kernels.interpreter import interpreter

pytest.importorskip("triton")

MODULE = {
    "layer_norm": "triton_norms",
    "rms_norm": "triton_norms",
    "swiglu": "triton_activations",
    "bias_gelu": "triton_activations",
    "rope": "triton_rope",
    "causal_softmax": "triton_softmax",
    "cross_entropy": "triton_cross_entropy",
}
SMALL = {"NUM_PROGRAMS": 3, "MAX_BLOCK": 16, "HEADS_AT_ONCE": 4}
"""In place of the kernels' own, so that small inputs take several blocks, and programs several rows or none."""

# (operation, what its kernels say, the same with a fault)
FAULTS = {
    "layer_norm-mean-of-padded-row": ("layer_norm", "mean = tl.sum(x, 0) / width", "mean = tl.sum(x, 0) / BLOCK"),
    "layer_norm-padding-in-variance": ("layer_norm", "x = tl.where(is_in, x - mean, 0.0)", "x = x - mean"),
    "layer_norm-no-mean-term": ("layer_norm", "grad_x -= tl.sum(grad_normal, 0) / width", "grad_x -= 0.0"),
    "layer_norm-last-row-left-out": (
        "layer_norm",
        "tl.minimum(first + rows_each, num_rows)",
        "tl.minimum(first + rows_each - 1, num_rows)",
    ),
    "rms_norm-no-epsilon-no-mean": ("rms_norm", "/ width + epsilon", "+ epsilon"),
    "rms_norm-no-projection": ("rms_norm", "grad_normal - normal * (", "grad_normal - 0.0 * ("),
    "rms_norm-weight-of-x": ("rms_norm", "grad_weight += grad_y * normal", "grad_weight += grad_y * x"),
    "swiglu-halves-swapped": ("swiglu", "y = gate * tl.sigmoid(gate) * up", "y = up * tl.sigmoid(up) * gate"),
    "swiglu-slope-of-sigmoid": ("swiglu", "(1.0 + gate * (1.0 - sigmoid))", "(1.0 - sigmoid)"),
    "bias_gelu-of-x": ("bias_gelu", "x += tl.load(bias_ptr", "y = tl.load(bias_ptr"),
    "bias_gelu-first-row-only": ("bias_gelu", "grad_bias += grad_x", "grad_bias = grad_x"),
    "bias_gelu-slope": ("bias_gelu", "3.0 * 0.044715", "0.044715"),
    "rope-backward-turns-on": ("rope", "sin = -sin", "sin = sin"),
    "rope-position-of-the-batch": ("rope", "cos_ptr + i * half", "cos_ptr + 0 * i"),
    "rope-rest-dropped": ("rope", "feature = 2 * half + tl.arange(0, REST)", "feature = half + tl.arange(0, REST)"),
    "causal_softmax-sees-the-next": ("causal_softmax", "value = tl.where(k <= q,", "value = tl.where(k <= q + 1,"),
    "causal_softmax-last-block-only": ("causal_softmax", "total = total * tl.exp(top - new_top) +", "total ="),
    "causal_softmax-slope-of-another-head": ("causal_softmax", "(row // s) % n", "(row // s + 1) % n"),
    "causal_softmax-no-product": ("causal_softmax", "(grad - product / total)", "grad"),
    "cross_entropy-padding": ("cross_entropy", "mask=column < num_true", "mask=column < width"),
    "cross_entropy-blocks-not-rescaled": ("cross_entropy", "total * tl.exp(top - new_top)", "total"),
    "cross_entropy-no-label": ("cross_entropy", "grad -= tl.where", "tl.where"),
}
FOUND = 3
"""The distance from which on a fault counts as found."""


@pytest.fixture(scope="module")
def run():
    with interpreter() as run:
        yield run


def _distances(operation: str, dtype: torch.dtype, mutant: str | None = None) -> dict[str, float]:
    """By case, of a mutant up to the first that finds it. In the interpreter's process."""
    name = f"megatron.kernels.{MODULE[operation]}"
    if mutant is None:
        module = importlib.import_module(name)
    else:
        spec = importlib.util.spec_from_file_location("mutant", mutant)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    for constant, value in SMALL.items():
        if hasattr(module, constant):
            setattr(module, constant, value)
    function = sharded_cross_entropy(module) if operation == "cross_entropy" else getattr(module, operation)
    distances = {}
    for case in _cases(operation):
        try:
            distances[str(case)] = distance(outcome(function, case, dtype, "cpu"), truth_of(case, dtype), dtype)
        except AssertionError as error:
            distances[f"{case}: {error}"] = float("inf")
        if mutant is not None and max(distances.values()) > FOUND:
            break
    return distances


def _cases(operation: str) -> list[Case]:
    return [case for case in CASES if case.operation == operation]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_triton_against_the_truth(run, operation, dtype):
    distances = run(_distances, operation, dtype)
    assert len(distances) == len(_cases(operation)) >= 4
    assert max(distances.values()) <= 1, distances


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(run, fault, tmp_path):
    operation, right, wrong = FAULTS[fault]
    source = Path(importlib.util.find_spec(f"megatron.kernels.{MODULE[operation]}").origin).read_text()
    assert right in source
    mutant = tmp_path / "mutant.py"
    mutant.write_text(source.replace(right, wrong))
    assert max(run(_distances, operation, torch.bfloat16, str(mutant)).values()) > FOUND


def _layers() -> None:
    """The layers with Triton's kernels. In the interpreter's process."""
    from megatron.kernels.kernels import TORCH, choose
    from megatron.layers.cross_entropy import cross_entropy
    from megatron.layers.norm import LayerNorm
    from megatron.layers.vocabulary import Vocabulary
    from megatron.parallel.context import ParallelContext

    alone, triton = ParallelContext.single(), choose("triton", "cpu")
    logits = torch.randn(2, 3, 24, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[0, 19, 5], [20, -1, 7]])  # the fourth is padding, the fifth nothing
    found = {}
    for kernels in (TORCH, triton):
        leaf = logits.clone().requires_grad_()
        consumed = leaf * 1.0
        address, grads = consumed.data_ptr(), []
        consumed.register_hook(grads.append)
        nll = cross_entropy(consumed, labels, Vocabulary(20, 24, alone), kernels)
        nll.backward(torch.ones_like(nll), retain_graph=True)
        assert grads[0].data_ptr() == address and nll.dtype == torch.float32
        assert nll.isnan().flatten().tolist() == [False, False, False, True, True, False]
        assert not leaf.grad[..., 20:].any()
        with pytest.raises(RuntimeError, match="no second one"):
            nll.backward(torch.ones_like(nll))
        found[kernels] = nll, leaf.grad
    for torchs, tritons in zip(*found.values()):
        torch.testing.assert_close(torchs, tritons, rtol=1e-2, atol=1e-5, equal_nan=True)
    norms = [LayerNorm(10, alone, 1e-5, kernels) for kernels in found]
    for norm in norms:
        torch.nn.init.constant_(norm.weight, 2.0)
        torch.nn.init.constant_(norm.bias, 0.5)
    x = torch.randn(2, 3, 10)
    torch.testing.assert_close(*(norm(x) for norm in norms))


def test_the_layers_take_these_kernels(run):
    run(_layers)


FAMILIES = {
    "llama": {
        "normalization": "rmsnorm",
        "swiglu": True,
        "use_rotary_position_embeddings": True,
        "add_position_embedding": False,
        "add_bias_linear": False,
        "num_key_value_heads": 2,
    },
    "bloom": {"position_embedding_type": "alibi", "add_position_embedding": False},
}


def _losses_and_gradients(family: str) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Of one model with torch's kernels and with Triton's. In the interpreter's process."""
    from model.tiny_gpt import batch, config

    from megatron.config.parallel import ParallelConfig
    from megatron.kernels.kernels import TORCH, choose
    from megatron.model.build import build_model
    from megatron.parallel.context import ParallelContext
    from megatron.parallel.rng import RandomStreams

    found, alone = [], ParallelContext.single()
    parallel = ParallelConfig(no_pipeline_parallel=True)
    for kernels in (TORCH, choose("triton", "cpu")):
        streams = RandomStreams(1, alone)
        model = build_model(config(**FAMILIES[family]), parallel, alone, streams, 1, kernels=kernels)
        loss = model(*batch())
        loss.backward()
        found.append((loss.detach(), {name: param.grad for name, param in model.named_parameters()}))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model(run, family):
    (loss, grads), (triton_loss, triton_grads) = run(_losses_and_gradients, family)
    assert torch.allclose(loss, triton_loss, rtol=0, atol=2e-6)
    assert set(grads) == set(triton_grads) and len(grads) > 10
    for name, grad in grads.items():
        torch.testing.assert_close(triton_grads[name], grad, rtol=1e-4, atol=2e-6, msg=name)
    assert any(not torch.equal(grads[name], triton_grads[name]) for name in grads)  # other kernels did run


def _refusals() -> list[str]:
    """Of shapes that do not belong together: a kernel would read beyond the smaller one."""
    from megatron.kernels.kernels import TORCH, choose

    x, cos, scores = torch.randn(2, 3, 4, 6), torch.randn(3, 3), torch.randn(2, 4, 3, 3)
    told = []
    for kernels in (TORCH, choose("triton", "cpu")):
        for operation, args in (
            ("rope", (x, cos[:2], cos[:2])),
            ("rope", (x, cos, cos[:, :2])),
            ("rope", (x, torch.randn(3, 4), torch.randn(3, 4))),
            ("causal_softmax", (scores[..., :2], 1.0, None)),
            ("causal_softmax", (scores, 1.0, torch.ones(3))),
            ("layer_norm", (x, torch.ones(5), None, 1e-5)),
            ("rms_norm", (x, torch.ones(5), 1e-5)),
            ("bias_gelu", (x, torch.ones(5))),
        ):
            try:
                getattr(kernels, operation)(*args)
            except (ValueError, RuntimeError) as error:
                told.append(f"{type(error).__name__} {error}")
    return told


def test_shapes_that_do_not_belong_together_are_refused(run):
    told = run(_refusals)
    assert len(told) == 16
    assert sum("KernelShapeError" in text and "expected" in text for text in told) == 10


def _left_to_the_reference() -> list[bool]:
    """fp64 and empty tensors, on which no kernel runs."""
    from megatron.kernels.kernels import TORCH, choose

    triton = choose("triton", "cpu")
    x, weight = torch.randn(2, 3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    args = {
        "layer_norm": (x, weight, None, 1e-5),
        "rms_norm": (x, weight, 1e-5),
        "bias_gelu": (x, weight),
        "swiglu": (torch.randn(0, 6),),
        "rope": (torch.randn(1, 0, 2, 4), torch.randn(0, 2), torch.randn(0, 2)),
        "causal_softmax": (x.new_ones(1, 2, 3, 3), 0.5, None),
    }
    return [torch.equal(getattr(TORCH, key)(*value), getattr(triton, key)(*value)) for key, value in args.items()]


def test_what_no_kernel_takes_goes_to_the_reference(run):
    assert run(_left_to_the_reference) == [True] * 6


def _tells(operation: str) -> str:
    from megatron.kernels.kernels import choose

    return choose("triton", "cpu").name[operation]


def test_the_interpreter_is_a_device_for_triton(run):
    assert run(_tells, "rope") == "triton"
