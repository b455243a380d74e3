"""No function, method or class that only tests use."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("megatron", "tools", "tb_analysis", "benchmarks")

CALLED_FROM_OUTSIDE = {
    # DeepSpeed asks an mpu by these names.
    *("get_data_parallel_rank", "get_data_parallel_world_size", "get_data_parallel_group_ranks"),
    *("get_data_parallel_src_rank", "get_pipeline_model_parallel_rank", "get_pipeline_model_parallel_world_size"),
    "get_pipeline_model_parallel_group",
    "get_last_lr",  # torch's schedulers
    "preserves_storage_sharing",  # DeepSpeed, of a checkpoint engine
    "persistent_id",
    *("reducer_override", "find_class", "persistent_load", "load_persid"),  # pickle
    *("seekable", "tell"),  # zipfile, of a file
    "filter",  # logging
    "on_step_begin",  # transformers' Trainer
    # torch, of the planner and the writer of a DCP save
    *("set_up_planner", "create_local_plan", "create_global_plan", "finish_plan", "resolve_data"),
    "write_data",
    # The library's, for programs that are not ours.
    *("read_into", "digest_tensor", "of_preset", "merge", "detokenize"),
}


def unused(sources: dict[str, str]) -> list[str]:
    """ "file: name" of what is defined in one of the sources and named in none of them, docstrings apart."""
    trees = {file: ast.parse(text) for file, text in sources.items()}
    named = Counter(name for tree in trees.values() for name in _names(tree))
    return [
        f"{file}: {node.name}"
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not re.fullmatch(r"__\w+__", node.name)
        and not named[node.name]
        and node.name not in CALLED_FROM_OUTSIDE
    ]


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value  # getattr(module, "name")


def test_nothing_is_there_for_tests_alone():
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")] + [ROOT / "pretrain_gpt.py"]
    found = unused({str(path.relative_to(ROOT)): path.read_text() for path in files})
    assert not found


def test_planted_fault():
    assert unused({"a.py": "def used(): pass\ndef left_over(): used()"}) == ["a.py: left_over"]
    assert not unused({"a.py": "class A:\n    def f(self): pass", "b.py": "from a import A\nA().f()"})
