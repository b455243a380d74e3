"""A module of a package that need not be installed, or that need not have compiled here.

triton = importable("triton")        # the module, or None
"""

from __future__ import annotations

import importlib
from types import ModuleType


def importable(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None
