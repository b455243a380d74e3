"""Triton's interpreter for tests: kernels run on CPU tensors, in a process of its own.

TRITON_INTERPRET must stand before triton is first imported, and the tests' own process has imported it for compiling.

    with interpreter() as run:
        result = run(module_level_function, *picklable_arguments)
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:

        def run(body: Callable, *args: Any) -> Any:
            return pool.submit(body, *args).result()

        with patch.dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"):
            assert run(_is_on)
        yield run


def _is_on() -> bool:
    import triton

    return triton.knobs.runtime.interpret
