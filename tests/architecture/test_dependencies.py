"""What setup.py asks for is imported somewhere, or stands here with the reason why it is needed all the same."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_IMPORT = {
    "ninja": "DeepSpeed compiles its C++ optimizers with it at run time",
    "pybind11": "setup.py imports it to build",
}


def required(source: str) -> set[str]:
    """Names in install_requires and in the extra `train`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    by_name = {k.arg: k.value for call in calls for k in call.keywords}
    extras = by_name["extras_require"]
    (train,) = (v for k, v in zip(extras.keys, extras.values, strict=True) if ast.literal_eval(k) == "train")
    entries = [*by_name["install_requires"].elts, *train.elts]
    return {re.split(r"[=<>]", ast.literal_eval(entry))[0] for entry in entries}


def imported(sources: list[str]) -> set[str]:
    """First parts of every module that is imported anywhere in them."""
    found = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found


def unused(setup: str, sources: list[str]) -> set[str]:
    return required(setup) - imported(sources) - set(WITHOUT_IMPORT)


def _sources() -> list[str]:
    folders = ("megatron", "tools", "tb_analysis", "training_datasets")
    return [path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py")]


def test_every_dependency_is_used():
    sources = _sources()
    assert len(sources) > 100
    assert unused((ROOT / "setup.py").read_text(), sources) == set()


def test_what_programs_of_others_must_install_is_little():
    """Neither plots nor tokenizers: what ucp_deepspeed needs, and what builds it."""
    of_training = {"transformers", "tokenizers", "sentencepiece", "tiktoken", "tensorboard", "matplotlib"}
    assert required((ROOT / "setup.py").read_text()) - of_training == {
        *("torch", "deepspeed", "numpy", "safetensors", "tqdm"),
        *("pybind11", "ninja"),
    }


def test_planted_fault_a_dependency_that_nothing_imports():
    setup = (ROOT / "setup.py").read_text().replace("install_requires=[", 'install_requires=["pandas==1",')
    assert unused(setup, _sources()) == {"pandas"}
