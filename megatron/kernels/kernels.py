"""Which implementation of each operation a run uses: chosen once, then passed to the layers by parameter.

    kernels = choose("auto", "cuda")           # --fused-kernels
    y = kernels.rms_norm(x, weight, 1e-5)
    kernels.described()                        # "apex: layer_norm, rms_norm; triton: swiglu, ..."

| on CUDA | norms | the other operations |
|---|---|---|
| auto | NVIDIA Apex's; else DeepSpeed's (RMSNorm only) and Triton's; else torch | Triton's; else torch |
| apex | NVIDIA Apex's, or refused | as auto |
| triton | Triton's, or refused | Triton's |
| torch | torch | torch |

On a CPU auto is torch; Triton runs there only in its interpreter (TRITON_INTERPRET=1), which is for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch import Tensor

from megatron.config.errors import ConfigError, Problem
from megatron.kernels import reference
from megatron.kernels.importable import importable

MODES = ("auto", "apex", "triton", "torch")


@dataclass(frozen=True)
class Kernels:
    """One callable per operation, what it computes defined by reference.py. All but the cross entropy's two are
    differentiable, once."""

    layer_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
    """(x, weight, bias or None, epsilon) -> x's shape."""
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """(x, weight, epsilon) -> x's shape."""
    swiglu: Callable[[Tensor], Tensor]
    """[..., 2p] -> [..., p]."""
    bias_gelu: Callable[[Tensor, Tensor | None], Tensor]
    """(x, bias or None) -> x's shape."""
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(x_bsnd, cos [s, r/2], sin [s, r/2]) -> [b, s, n, d]."""
    causal_softmax: Callable[[Tensor, float, Tensor | None], Tensor]
    """(scores_bnqk, scale, slopes [n] or None) -> [b, n, q, k]."""
    cross_entropy_statistics: Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor, Tensor]]
    """(logits_nv, num_true, column_n) -> maximum, sum of exponentials, label's logit, each [n]. Consumes the logits."""
    cross_entropy_gradient: Callable[[Tensor, int, Tensor, Tensor, Tensor, Tensor], None]
    """(consumed logits, num_true, column_n, max_n, factor_n, hot_n): they become their own gradient."""
    name: Mapping[str, str] = field(compare=False)
    """Of each operation: "torch", "triton", "apex" or "deepspeed"."""

    def described(self) -> str:
        """For the log: "apex: layer_norm, rms_norm; triton: swiglu, ..."."""
        operations: dict[str, list[str]] = {}
        for operation in OPERATIONS:
            operations.setdefault(self.name[operation], []).append(operation)
        if len(operations) == 1:
            return next(iter(operations))
        return "; ".join(f"{name}: {', '.join(those)}" for name, those in sorted(operations.items()))


NORMS = ("layer_norm", "rms_norm")
OPERATIONS = (
    *NORMS,
    "swiglu",
    "bias_gelu",
    "rope",
    "causal_softmax",
    "cross_entropy_statistics",
    "cross_entropy_gradient",
)

TORCH = Kernels(
    **{operation: getattr(reference, operation) for operation in OPERATIONS}, name=dict.fromkeys(OPERATIONS, "torch")
)


class KernelsUnavailableError(ConfigError):
    """--fused-kernels asks for what this machine does not have."""


def choose(mode: str, device_type: str) -> Kernels:
    """`mode` is --fused-kernels, `device_type` where the model computes. Raises KernelsUnavailableError."""
    if mode not in MODES:
        raise _unavailable(mode, "found no such choice", f"one of {', '.join(MODES)}", "--fused-kernels auto")
    if mode == "torch":
        return TORCH
    if mode == "triton":
        return _all_triton(device_type)
    if device_type != "cuda":
        if mode == "apex":
            raise _unavailable(mode, f"a model on {device_type}", "a CUDA device", "--fused-kernels auto")
        return TORCH
    kernels = TORCH if importable("triton") is None else _triton()
    apex = _apex_norms()
    if apex is not None:
        return _with(kernels, "apex", layer_norm=apex.layer_norm, rms_norm=apex.rms_norm)
    if mode == "apex":
        raise _unavailable(
            mode,
            "no importable apex.normalization.fused_layer_norm with its compiled fused_layer_norm_cuda",
            "NVIDIA Apex, built with --cuda_ext (PyPI's apex is another project)",
            "build it from github.com/NVIDIA/apex, or --fused-kernels auto",
        )
    deepspeed = _deepspeed_rms_norm(kernels.rms_norm)
    return kernels if deepspeed is None else _with(kernels, "deepspeed", rms_norm=deepspeed)


def _all_triton(device_type: str) -> Kernels:
    triton = importable("triton")
    if triton is None:
        raise _unavailable(
            "triton",
            "no importable triton",
            "Triton, which torch's CUDA build brings",
            "pip install triton, or --fused-kernels torch",
        )
    if device_type != "cuda" and not triton.knobs.runtime.interpret:
        raise _unavailable(
            "triton",
            f"a model on {device_type}",
            "a CUDA device, or Triton's interpreter (TRITON_INTERPRET=1: slow)",
            "--fused-kernels auto, which is torch here",
        )
    return _triton()


def _triton() -> Kernels:
    """Imported no earlier: a machine without Triton needs none of it, and one without a GPU does not wait for it."""
    from megatron.kernels import triton_activations, triton_cross_entropy, triton_norms, triton_rope, triton_softmax

    return Kernels(
        layer_norm=triton_norms.layer_norm,
        rms_norm=triton_norms.rms_norm,
        swiglu=triton_activations.swiglu,
        bias_gelu=triton_activations.bias_gelu,
        rope=triton_rope.rope,
        causal_softmax=triton_softmax.causal_softmax,
        cross_entropy_statistics=triton_cross_entropy.cross_entropy_statistics,
        cross_entropy_gradient=triton_cross_entropy.cross_entropy_gradient,
        name=dict.fromkeys(OPERATIONS, "triton"),
    )


@dataclass(frozen=True)
class _ApexNorms:
    module: ModuleType

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
        bias = torch.zeros_like(weight) if bias is None else bias  # it takes both or neither
        return self.module.fused_layer_norm_affine(x, weight, bias, weight.shape, epsilon)

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Rounded once, after the multiplication with the weight; the reference rounds before it too."""
        return self.module.fused_rms_norm_affine(x, weight, weight.shape, epsilon)


def _apex_norms() -> _ApexNorms | None:
    """The Python part of Apex imports without its compiled part, and fails at the first call."""
    module = importable("apex.normalization.fused_layer_norm")
    if module is None or importable("fused_layer_norm_cuda") is None:
        return None
    wanted = ("fused_layer_norm_affine", "fused_rms_norm_affine")
    return _ApexNorms(module) if all(hasattr(module, name) for name in wanted) else None


def _deepspeed_rms_norm(otherwise: Callable[[Tensor, Tensor, float], Tensor]) -> Callable | None:
    """DeepSpeed 0.19.8's fused RMSNorm, the one norm of its that can be trained with by itself: it is
    ops/triton_ops/fused_rms_norm.py, Triton with a backward, of the same rounding as the reference, for bf16 and fp16
    up to 2048 wide. What it does not take goes to `otherwise`.

    Its other fused norms have no backward (ops/transformer/inference/op_binding/layer_norm.py, pre_rms_norm.py,
    rms_norm.py, triton/layer_norm.py; inference/v2/kernels/core_ops) or are part of a whole transformer layer in one
    kernel (ops/transformer/transformer.py).
    """
    module = importable("deepspeed.ops.triton_ops.fused_rms_norm")
    wanted = ("is_available", "assert_supported", "fused_rms_norm")
    if not all(hasattr(module, name) for name in wanted) or not module.is_available():
        return None

    def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        if x.numel() == 0:
            return otherwise(x, weight, epsilon)
        try:
            module.assert_supported(x, weight, epsilon)
        except RuntimeError:
            return otherwise(x, weight, epsilon)
        return module.fused_rms_norm(x, weight, epsilon)

    return rms_norm


def _with(kernels: Kernels, name: str, **operations: Callable) -> Kernels:
    return replace(kernels, **operations, name={**kernels.name, **dict.fromkeys(operations, name)})


def _unavailable(mode: str, found: str, expected: str, fix: str) -> KernelsUnavailableError:
    problem = Problem(
        f"--fused-kernels {mode} cannot be had here",
        found=found,
        expected=expected,
        flags=("--fused-kernels",),
        fix=fix,
    )
    return KernelsUnavailableError(problem)
