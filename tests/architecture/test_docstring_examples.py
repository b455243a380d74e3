"""Examples in docstrings call what is there, with arguments that it takes.

They are not run: most need ranks or files. Names are looked up in the docstring's own module, then in the project;
calls are held against signatures.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    path
    for room in ("megatron", "tools", "tb_analysis")
    for path in sorted((ROOT / room).rglob("*.py"))
    if path.name != "__main__.py"
]


READERS_OWN = {"read_my_part", "choose_tag", "open_them", "main"}
"""Calls that stand for whatever the reader would do there."""


@functools.cache
def _defined_in() -> dict[str, list[Path]]:
    """By name, the modules that define a function or class of it."""
    homes: dict[str, list[Path]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                homes.setdefault(node.name, []).append(path)
    return homes


def _module(path: Path) -> ModuleType:
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    return importlib.import_module(name)


def examples(source: str) -> Iterator[list[ast.Module]]:
    """Of each docstring, the stretches of lines that are Python and call something."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            blocks = [block for block in map(_parsed, text.split("\n\n")) if block is not None]
            if blocks:
                yield blocks


def _parsed(block: str) -> ast.Module | None:
    try:
        tree = ast.parse(textwrap.dedent(block).strip("\n"))
    except SyntaxError:
        return None
    return tree if any(isinstance(node, ast.Call) for node in ast.walk(tree)) else None


def faults(blocks: list[ast.Module], module: Any) -> list[str]:
    """Names that are nowhere, and calls that would raise a TypeError."""
    known: dict[str, Any] = {**vars(builtins), "Path": Path, **vars(module)}
    found = []
    for block in blocks:
        for node in ast.walk(block):
            if isinstance(node, ast.ImportFrom) and node.module:
                origin = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(origin, alias.name):
                        found.append(f"{node.module} has no {alias.name}")
                    known[alias.asname or alias.name] = getattr(origin, alias.name, None)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                known[node.id] = None
            elif isinstance(node, ast.FunctionDef):
                known[node.name] = None
        for call in (node for node in ast.walk(block) if isinstance(node, ast.Call)):
            found += _call_faults(call, known)
    return found


def _call_faults(call: ast.Call, known: dict[str, Any]) -> list[str]:
    path, node = [], call.func
    while isinstance(node, ast.Attribute):
        path.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return []
    if node.id not in known and node.id in _defined_in():
        homes = [getattr(_module(home), node.id) for home in _defined_in()[node.id]]
        by_home = [_call_faults(call, {**known, node.id: home}) for home in homes]
        return min(by_home, key=len)
    if node.id not in known:
        return (
            [] if path or node.id in READERS_OWN else [f"{node.id} is not in the module"]
        )  # an object that the reader has
    target: Any = known[node.id]
    for attribute in path:
        if not isinstance(target, type | ModuleType):
            return []
        if not hasattr(target, attribute):
            return [f"{node.id} has no {attribute}"]
        target = getattr(target, attribute)
    is_open = any(
        isinstance(argument, ast.Starred) or (isinstance(argument, ast.Constant) and argument.value is ...)
        for argument in call.args
    ) or any(keyword.arg is None for keyword in call.keywords)
    if not callable(target) or is_open:
        return []
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):
        return []
    try:
        signature.bind(*call.args, **{keyword.arg: None for keyword in call.keywords})
    except TypeError as error:
        return [f"{ast.unparse(call)}: {error}"]
    return []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_resolve(path):
    found = list(examples(path.read_text()))
    if not found:
        return
    try:
        module = _module(path)
    except ImportError as error:
        assert "triton" in str(error), error  # the kernels of a package that CI does not have
        return
    assert not [fault for blocks in found for fault in faults(blocks, module)]


def test_most_modules_have_an_example():
    assert sum(bool(list(examples(path.read_text()))) for path in FILES) > 60


def _one(text: str, **names: Any) -> list[str]:
    (blocks,) = examples(f'"""Does it.\n\n    {text}\n"""')
    return faults(blocks, SimpleNamespace(**names))


def _save(live: Any, folder: Path, *, tag: str = "") -> None:
    pass


def test_planted_faults():
    assert not _one("save(live, folder, tag='x')", save=_save)
    assert _one("sove(live, folder)") == ["sove is not in the module"]
    assert "missing a required argument: 'folder'" in _one("save(live)", save=_save)[0]
    assert "unexpected keyword argument 'name'" in _one("save(live, folder, name=1)", save=_save)[0]
    assert "too many positional" in _one("progress_of(common, sizes, 3)")[0]  # of megatron/checkpoint/restoring.py
    assert _one("Path.none(folder)", Path=Path) == ["Path has no none"]
    assert _one("from pathlib import Pith\n    Pith(1)") == ["pathlib has no Pith"]
