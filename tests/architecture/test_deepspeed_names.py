"""What is private in DeepSpeed is named in one list, and used in the rooms that may."""

import ast
from pathlib import Path

from megatron.engine.deepspeed_names import BUILT, METHODS, WORDS

PACKAGE = Path(__file__).resolve().parents[2] / "megatron"
MAY = "engine"
NOT_DEEPSPEEDS = {
    "training/presence.py": {"_get_default_store"},  # torch's
    "training/reporting.py": {"_exit"},  # os
    "training/stop_signal.py": {"_exit"},
    "training/tensorboard.py": {"_get_file_writer"},  # torch's
    "training/trainable.py": {"_non_persistent_buffers_set"},  # torch's
}


def private_names(source: str) -> set[str]:
    """Attributes of other objects that start with an underscore or `ds_`, and methods that `super()` is asked for;
    not what the file itself defines, sets on `self` or declares."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    own |= {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node)
    }
    found = set()
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr.startswith(("_", "ds_")) and not node.attr.startswith("__"):
            is_supers = isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"
            if is_supers or node.attr not in own:
                found.add(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and str(name.value).startswith(("_", "ds_")):
                found.add(name.value)
    return found


def _is_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def test_only_the_rooms_that_may_use_them_and_all_are_in_the_list():
    listed = {name for methods in METHODS.values() for name in methods}
    listed |= {name for names in (*WORDS.values(), *BUILT.values()) for name in names}
    used, elsewhere, unlisted = set(), [], []
    for room in ("engine", "checkpoint", "training", "ucp_deepspeed", "model", "layers", "parallel", "kernels"):
        for path in sorted((PACKAGE / room).glob("*.py")):
            place = f"{room}/{path.name}"
            names = private_names(path.read_text()) - NOT_DEEPSPEEDS.get(place, set())
            used |= names
            if room != MAY:
                elsewhere += [f"{place}: {name}" for name in sorted(names)]
            unlisted += [f"{place}: {name}" for name in sorted(names - listed)]
    assert elsewhere == [] and unlisted == []
    assert len(used) > 15


def test_planted_faults_are_found():
    assert private_names("def f(engine):\n    engine._take_it()") == {"_take_it"}
    assert private_names("class A:\n    def _f(self):\n        super()._f()") == {"_f"}
    assert private_names("class A:\n    def _f(self):\n        self._f()") == set()
    assert private_names("x = getattr(p, 'ds_id', None)") == {"ds_id"}
