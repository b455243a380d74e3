"""What tests of several rooms share, and which of them start no other process: those of `make test-fast`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from matrix.recording import write_dataset

TESTS = Path(__file__).parent
STARTERS = ("run_ranks", "subprocess", "multiprocessing", "mp", "ProcessPoolExecutor")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Prefix of a small data set that runs may read. A test that is about its files, or what is kept beside them, makes
    one of its own."""
    return write_dataset(tmp_path_factory.mktemp("data") / "matrix_text_document")


def starts_processes(module: ModuleType) -> bool:
    """It imports something that starts ranks or programs, or a module of the tests' that does."""
    named = {getattr(value, "__module__", None) for value in vars(module).values()}
    modules = [module, *(value for value in vars(module).values() if isinstance(value, ModuleType))]
    modules += [sys.modules[name] for name in named if name in sys.modules]
    ours = [m for m in modules if TESTS in Path(getattr(m, "__file__", None) or "/").parents]
    return any(name in vars(m) for m in ours for name in STARTERS)


LONGEST_FIRST = (
    *("matrix/test_any_to_any.py", "matrix/test_any_to_any_families.py", "ucp_deepspeed/test_hf_trainer.py"),
    *("ucp_deepspeed/test_reshape.py", "matrix/test_experts_continuity.py", "fuzz/test_fuzz.py"),
    *("fuzz/test_crash_points.py", "fuzz/test_bad_nights.py", "elastic/test_elastic_job.py"),
    *("matrix/test_continuity.py", "ucp_deepspeed/test_accelerate.py", "ucp_deepspeed/test_plain_deepspeed.py"),
)
"""Modules that take more than two minutes, so that no worker is left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if starts_processes(item.module):
            item.add_marker("processes")
    folder = Path(__file__).parent
    order = {folder / name: place for place, name in enumerate(LONGEST_FIRST)}
    assert all(path.is_file() for path in order), "a module of LONGEST_FIRST is not there"
    items.sort(key=lambda item: order.get(item.path, len(order)))
