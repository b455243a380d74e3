"""The compiled part of ucp (kernel.cpp); None if it was installed without a compiler (numpy and torch do it then)."""

from __future__ import annotations

import importlib
from types import ModuleType

kernel: ModuleType | None
try:
    kernel = importlib.import_module("megatron.ucp._kernel")
except ImportError:
    kernel = None
