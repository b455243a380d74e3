"""Which kernels a machine gets: what is importable is simulated."""

from __future__ import annotations

import shlex
import subprocess
import sys
import types

import pytest
import torch

from megatron.config.arguments import parse
from megatron.config.errors import ConfigError
from megatron.kernels.kernels import NORMS, OPERATIONS, TORCH, KernelsUnavailableError, choose


def _module(monkeypatch, name: str, **members) -> list:
    """Importable from now on, with functions that write down their calls."""
    calls = []
    module = types.ModuleType(name)
    for member, value in members.items():
        function = (lambda result: lambda *args: calls.append(args) or result)(value)
        setattr(module, member, function)
    parts = name.split(".")
    for i in range(1, len(parts)):
        parent = ".".join(parts[:i])
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.fixture
def with_apex(monkeypatch):
    """Its calls."""
    _module(monkeypatch, "fused_layer_norm_cuda")
    functions = {"fused_layer_norm_affine": "layer norm", "fused_rms_norm_affine": "rms norm"}
    return _module(monkeypatch, "apex.normalization.fused_layer_norm", **functions)


@pytest.fixture
def without_apex(monkeypatch):
    monkeypatch.setitem(sys.modules, "fused_layer_norm_cuda", None)


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)


def _names(mode: str, device: str = "cuda") -> dict[str, str]:
    return dict(choose(mode, device).name)


def _all(name: str, **others: str) -> dict[str, str]:
    return {**dict.fromkeys(OPERATIONS, name), **others}


def test_a_cpu_gets_torch_even_with_everything_installed(with_apex):
    assert choose("auto", "cpu") is TORCH
    assert choose("torch", "cuda") is TORCH
    assert TORCH.described() == "torch"


def test_auto_on_cuda(with_apex):
    pytest.importorskip("triton")
    kernels = choose("auto", "cuda")
    assert dict(kernels.name) == _names("apex") == _all("triton", layer_norm="apex", rms_norm="apex")
    assert kernels.described().startswith("apex: layer_norm, rms_norm; triton: swiglu, bias_gelu")
    # apex: fused_layer_norm_affine(input, weight, bias, normalized_shape, eps), fused_rms_norm_affine the same
    weight = torch.ones(3)
    assert kernels.layer_norm("x", weight, "bias", 1e-5) == "layer norm"
    assert kernels.rms_norm("x", weight, 1e-6) == "rms norm"
    assert kernels.layer_norm("x", weight, None, 1e-5) == "layer norm"
    assert with_apex[:2] == [("x", weight, "bias", (3,), 1e-5), ("x", weight, (3,), 1e-6)]
    assert torch.equal(with_apex[2][2], torch.zeros(3))


def test_auto_without_triton(with_apex, without_triton):
    assert _names("auto") == _all("torch", layer_norm="apex", rms_norm="apex")


def test_auto_with_nothing(without_apex, without_triton):
    assert choose("auto", "cuda") == TORCH


def test_apex_without_its_compiled_part_is_not_there(with_apex, without_apex):
    assert "apex" not in _names("auto").values()


def test_deepspeeds_rms_norm_where_it_takes_the_input(without_apex, without_triton, monkeypatch):
    name = "deepspeed.ops.triton_ops.fused_rms_norm"
    calls = _module(monkeypatch, name, is_available=True, assert_supported=None, fused_rms_norm="fused")
    kernels = choose("auto", "cuda")
    assert dict(kernels.name) == _all("torch", rms_norm="deepspeed")
    x, weight = torch.randn(2, 3), torch.ones(3)
    assert kernels.rms_norm(x, weight, 1e-5) == "fused"
    assert calls[-1][0] is x and calls[-1][1] is weight and calls[-1][2] == 1e-5

    def refuses(*_):
        raise RuntimeError("fused RMSNorm supports bfloat16 and float16 tensors")

    monkeypatch.setattr(sys.modules[name], "assert_supported", refuses)
    assert torch.equal(kernels.rms_norm(x, weight, 1e-5), TORCH.rms_norm(x, weight, 1e-5))


def test_deepspeeds_rms_norm_is_as_its_docstring_says():
    """The installed one: its functions are where they are looked for, and it says no without a GPU."""
    module = pytest.importorskip("deepspeed.ops.triton_ops.fused_rms_norm")
    assert module.is_available() == (torch.cuda.is_available() and not torch.version.hip)
    with pytest.raises(RuntimeError, match="(?i)cuda|gpu|triton|support"):
        module.assert_supported(torch.randn(2, 3), torch.ones(3), 1e-5)


@pytest.mark.parametrize(
    "mode, device, fixture, found",
    [
        ("apex", "cpu", "with_apex", "a model on cpu"),
        ("apex", "cuda", "without_apex", "no importable apex"),
        ("triton", "cuda", "without_triton", "no importable triton"),
        ("triton", "cpu", "without_apex", "a model on cpu"),
        ("cuda", "cuda", "without_apex", "no such choice"),
    ],
)
def test_what_is_not_there_is_refused_by_name(mode, device, fixture, found, request):
    if (mode, device) == ("triton", "cpu"):
        pytest.importorskip("triton")
    request.getfixturevalue(fixture)
    with pytest.raises(KernelsUnavailableError) as caught:
        choose(mode, device)
    text = str(caught.value)
    assert isinstance(caught.value, ConfigError)
    assert f"--fused-kernels {mode}" in text and found in text
    assert all(label in text for label in ("found:", "expected:", "where:", "what to do:"))


def test_a_plain_run_imports_no_triton():
    code = (
        "import sys; from megatron.kernels.kernels import choose; choose('auto', 'cpu'); print('triton' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_the_benchmark_says_that_a_cpu_has_nothing_to_measure(request):
    if torch.cuda.is_available():
        pytest.skip("there is something to measure")
    script = request.config.rootpath / "benchmarks" / "kernels.py"
    assert "nothing to measure" in subprocess.check_output([sys.executable, script], text=True)


def test_the_norms_are_operations():
    assert set(NORMS) < set(OPERATIONS) == set(TORCH.name)


def test_the_flag():
    required = shlex.split(
        "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1"
    )
    assert parse(required).config.run.fused_kernels == "auto"
    assert parse([*required, "--fused-kernels", "triton"]).config.run.fused_kernels == "triton"
    with pytest.raises(ConfigError, match="one of auto, apex, triton, torch"):
        parse([*required, "--fused-kernels", "xformers"])
