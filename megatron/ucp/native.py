"""The compiled part of ucp (kernel.cpp); None if it was installed without a compiler (numpy and torch do it then)."""

from __future__ import annotations

from types import ModuleType

kernel: ModuleType | None
try:
    from megatron.ucp import _kernel as kernel
except ImportError:
    kernel = None
