"""Every Triton kernel is compiled, without a GPU, to PTX and machine code for sm_80, sm_90 and sm_100.

The assemblers are those that come with Triton (ptxas, and ptxas-blackwell for sm_100); a missing one fails by name.
"""

from __future__ import annotations

import importlib
import itertools

import pytest

from megatron.kernels.kernels import OPERATIONS

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402 - after the check that triton is there
from triton.compiler import ASTSource  # noqa: E402

MODULES = ("triton_norms", "triton_activations", "triton_rope", "triton_softmax", "triton_cross_entropy")
ARCHITECTURES = (80, 90, 100)

FLOAT32 = {
    "mean_ptr",
    "rstd_ptr",
    "grad_weight_ptr",
    "grad_bias_ptr",
    "cos_ptr",
    "sin_ptr",
    "slopes_ptr",
    "max_ptr",
    "sum_ptr",
    "target_ptr",
    "factor_ptr",
    "hot_ptr",
}
"""Whatever the precision of the run; other pointers are in that."""
TYPES = {"column_ptr": "*i64", "epsilon": "fp32", "scale": "fp32"}
# As for a hidden size of 4096, a context of 8192, heads of 128 rotated in part, a vocabulary of 50304.
CONSTANTS = {
    "norm_forward": {"BLOCK": 4096},
    "norm_backward": {"BLOCK": 4096},
    "swiglu_forward": {"BLOCK": 1024},
    "swiglu_backward": {"BLOCK": 1024},
    "bias_gelu_forward": {"BLOCK": 1024},
    "bias_gelu_backward": {"BLOCK": 1024},
    "rotate": {"HEADS": 16, "HALF": 32, "REST": 64},
    "softmax_forward": {"BLOCK": 4096},
    "softmax_backward": {"BLOCK": 4096},
    "statistics": {"BLOCK": 4096},
    "gradient": {"BLOCK": 4096},
}
SWITCHES = ("IS_CENTRED", "HAS_BIAS", "IS_BACKWARD", "HAS_SLOPES")


def _kernels() -> dict:
    modules = [importlib.import_module(f"megatron.kernels.{name}") for name in MODULES]
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.JITFunction)
    }


@pytest.fixture(scope="module", autouse=True)
def _fresh_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module", autouse=True)
def _not_interpreted():
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled")


def test_every_kernel_is_in_the_table():
    assert set(_kernels()) == set(CONSTANTS)
    # forward and backward of each, the two norms sharing theirs, the rotation its own backward
    assert len(CONSTANTS) == 2 * (len(OPERATIONS) - 2) - 1


def _compiled(kernel, constants: dict, element: str, architecture: int, num_warps: int = 8):
    names = kernel.arg_names
    signature = {
        name: "constexpr"
        if name in constants
        else TYPES.get(name) or ("*fp32" if name in FLOAT32 else f"*{element}" if name.endswith("_ptr") else "i32")
        for name in names
    }
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": num_warps})


def _variants(name: str) -> list[dict]:
    switches = [switch for switch in SWITCHES if switch in _kernels()[name].arg_names]
    everything = [{**CONSTANTS[name], **dict.fromkeys(switches, value)} for value in (True, False)]
    return everything if switches else everything[:1]


TARGETS = [*itertools.product(("fp32", "bf16"), ARCHITECTURES), ("fp16", 90)]


@pytest.mark.parametrize(
    "element, architecture", TARGETS, ids=[f"{element}-sm_{number}" for element, number in TARGETS]
)
@pytest.mark.parametrize("name", sorted(CONSTANTS))
def test_compiles(name, element, architecture):
    for constants in _variants(name):
        compiled = _compiled(_kernels()[name], constants, element, architecture)
        assert f".target sm_{architecture}" in compiled.asm["ptx"]
        assert name in compiled.asm["ptx"]
        assert compiled.asm["cubin"][:4] == b"\x7fELF" and len(compiled.asm["cubin"]) > 1000


@pytest.mark.parametrize("name", sorted(CONSTANTS))
def test_compiles_where_every_size_is_one(name):
    """Triton makes constants of such arguments."""
    kernel = _kernels()[name]
    integers = {
        arg
        for arg in kernel.arg_names
        if arg not in SWITCHES + tuple(TYPES) + tuple(CONSTANTS[name]) and not arg.endswith("_ptr")
    }
    assert integers
    for constants in _variants(name):
        _compiled(kernel, {**constants, **dict.fromkeys(integers, 1)}, "bf16", 90)


def test_a_planted_fault_does_not_compile():
    """What the interpreter lets pass: a type that the compiler does not take."""
    kernel = _kernels()["gradient"]
    with pytest.raises(triton.CompilationError, match="power of 2"):
        _compiled(kernel, {"BLOCK": 48}, "bf16", 90)  # not a power of two
