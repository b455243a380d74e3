"""The compiled part of ucp (kernel.cpp); None if it was installed without a compiler (Python does it then), or where
what was compiled is of other sources than these."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

VERSION = 2
"""Of what Python expects of the kernel; kernel.cpp has the same number."""


def usable(module: ModuleType) -> ModuleType | None:
    """The module, or None with a warning where it was compiled from older or newer sources."""
    found = getattr(module, "VERSION", 1)
    if found == VERSION:
        return module
    warnings.warn(
        f"the compiled kernel of megatron.ucp is of version {found}, these sources want {VERSION}: Python does its "
        "work, slower. To build it: pip install -e . (or make install)",
        stacklevel=2,
    )
    return None


kernel: ModuleType | None
try:
    kernel = usable(importlib.import_module("megatron.ucp._kernel"))
except ImportError:
    kernel = None
