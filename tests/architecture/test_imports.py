"""Imports go one way, there is no cycle, and the two leaves stand alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron"

# What a part of the house may import of ours, besides itself.
ALLOWED = {
    "config": {"ucp", "data"},
    "data": set(),
    "ucp": set(),
    "kernels": {"config"},
    "parallel": {"config", "ucp"},
    "layers": {"kernels", "parallel", "config", "ucp"},
    "model": {"layers", "kernels", "parallel", "config", "ucp"},
    "engine": {"model", "layers", "kernels", "parallel", "config", "ucp"},
    "checkpoint": {"engine", "model", "layers", "parallel", "config", "ucp"},
    "ucp_deepspeed": {"checkpoint", "engine", "parallel", "ucp"},
    "training": {"checkpoint", "engine", "model", "layers", "kernels", "parallel", "config", "ucp", "data"},
    "elastic": {"training", "parallel", "config", "ucp"},
}
TRAINER = ("megatron.training", "megatron.checkpoint", "megatron.engine")
MIN_MODULES = 40
"""A floor: an empty glob must not pass."""


def _modules() -> dict[str, Path]:
    files = [path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def _imports(source: str, module: str, is_package: bool) -> set[str]:
    """Every module named in an import, those inside functions and under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, *filter(None, [node.module])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def _graph() -> dict[str, set[str]]:
    modules = _modules()
    graph = {}
    for name, path in modules.items():
        imported = _imports(path.read_text(), name, path.name == "__init__.py")
        graph[name] = {other for other in imported if other in modules and other != name}
    return graph


def forbidden_arrows(graph: dict[str, set[str]]) -> list[str]:
    bad = []
    for name, imported in graph.items():
        part = name.split(".")[1] if "." in name else None
        for other in imported:
            other_part = other.split(".")[1] if "." in other else None
            if part is None or other_part is None or part == other_part:
                continue  # `megatron` itself holds only the version
            if other_part not in ALLOWED[part]:
                bad.append(f"{name} -> {other}")
    return sorted(bad)


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    state: dict[str, int] = {}
    trail: list[str] = []

    def visit(node: str) -> list[str] | None:
        state[node] = 1
        trail.append(node)
        for other in sorted(graph.get(node, ())):
            if state.get(other) == 1:
                return trail[trail.index(other) :] + [other]
            if other not in state and (found := visit(other)):
                return found
        trail.pop()
        state[node] = 2
        return None

    for node in sorted(graph):
        if node not in state and (found := visit(node)):
            return found
    return None


def test_imports_go_one_way():
    graph = _graph()
    assert len(graph) >= MIN_MODULES
    assert forbidden_arrows(graph) == []


def test_no_cycle():
    assert find_cycle(_graph()) is None


IMPORT_EACH_FIRST = """
import importlib, os, sys, traceback
import numpy, torch
failed = []
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
print(failed)
"""


def _cannot_be_imported_first(names: list[str], cwd: Path) -> str:
    command = [sys.executable, "-c", IMPORT_EACH_FIRST, *names]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=True).stdout.strip()


def test_each_module_of_the_library_can_be_imported_first():
    """Importing a module imports its packages too, so that there are cycles that no arrow shows."""
    names = sorted(name for name in _modules() if name.startswith("megatron.ucp."))
    assert len(names) > MIN_MODULES
    assert _cannot_be_imported_first([n for n in names if not n.endswith("__main__")], ROOT) == "[]"


def test_a_module_that_cannot_be_imported_first_is_named(tmp_path):
    (tmp_path / "house").mkdir()
    (tmp_path / "house/__init__.py").write_text("from house import first")
    (tmp_path / "house/first.py").write_text("import outside\nfloor = 1")
    (tmp_path / "outside.py").write_text("from house.first import floor")
    assert _cannot_be_imported_first(["house.first", "outside"], tmp_path) == "['house.first']"
    (tmp_path / "outside.py").write_text("")
    assert _cannot_be_imported_first(["house.first", "outside"], tmp_path) == "[]"


def test_planted_faults_are_found():
    planted = {"megatron.ucp.plan": {"megatron.engine.engine"}, "megatron.engine.engine": set()}
    assert forbidden_arrows(planted) == ["megatron.ucp.plan -> megatron.engine.engine"]
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert _imports("def f():\n    from ..engine import engine", "megatron.ucp.plan", False) == {
        "megatron.engine",
        "megatron.engine.engine",
    }


@pytest.mark.parametrize(
    "module, forbidden",
    [
        ("megatron.ucp", ("deepspeed", *TRAINER, "megatron.model", "megatron.layers", "megatron.config")),
        ("megatron.ucp.cli", ("deepspeed", "torch", "transformers", *TRAINER, "megatron.config")),
        ("megatron.ucp.sources.foreign", ("deepspeed", "torch")),
        ("megatron.ucp.convert_command", ("deepspeed", "torch")),
        ("megatron.ucp.save_worker", ("deepspeed", "torch", "transformers", *TRAINER, "megatron.config")),
        ("megatron.data", ("deepspeed", "megatron.ucp", *TRAINER)),
        ("megatron.config.arguments", ("deepspeed", "torch", *TRAINER)),
        ("megatron.elastic.cli", ("deepspeed", "torch", *TRAINER)),
    ],
)
def test_importing_pulls_in_nothing_it_must_not(module, forbidden):
    code = f"import sys, {module}; print([m for m in sys.modules if m.startswith({forbidden!r})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_only_the_launch_modules_read_the_environment():
    may = {"megatron/training/launch.py", "megatron/elastic/launch.py", "megatron/elastic/proxy.py"}
    readers = [
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*.py")
        if any(word in path.read_text() for word in ("os.environ", "os.getenv"))
    ]
    assert set(readers) == may


def test_nothing_calls_the_gpu_directly():
    callers = [
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*.py")
        if "torch.cuda" in path.read_text() and "kernels" not in path.parts
    ]
    assert callers == []


def test_package_root_holds_only_the_version():
    imported = _imports((PACKAGE / "__init__.py").read_text(), "megatron", True)
    assert imported == {"pkgutil", "pkgutil.extend_path"}  # so that megatron-core is found beside it


def test_every_folder_of_modules_is_a_package():
    """setuptools leaves out, in silence, what is none."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert len(folders) > 8
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []
