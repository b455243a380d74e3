"""A name of DeepSpeed's that is not there any more stops the run, with the version found and expected."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import deepspeed.runtime.pipe.engine
import pytest

from harness.ranks import RankFailure, run_ranks
from matrix.recording import build, command_line
from megatron.engine import deepspeed_names as names
from megatron.engine.deepspeed_names import BUILT, METHODS, WORDS, DeepSpeedChangedError

METHOD_CASES = [(path, method) for path, methods in METHODS.items() for method in methods]
WORD_CASES = [(module, word) for module, words in WORDS.items() for word in words]
EXPECTED = f"Expected: DeepSpeed {names.WRITTEN_FOR}. What to do: pip install"


def test_this_deepspeed_has_them_all():
    names.require_names()
    assert deepspeed.__version__ == names.WRITTEN_FOR


@pytest.mark.parametrize(("path", "method"), METHOD_CASES)
def test_a_method_that_is_not_there_is_told(path, method, monkeypatch):
    owner = names._class(path)
    defined_in = next(base for base in owner.__mro__ if method in vars(base))
    monkeypatch.delattr(defined_in, method)
    with pytest.raises(DeepSpeedChangedError) as caught:
        names.require_names()
    assert f"{path} has no method {method}" in str(caught.value) and EXPECTED in str(caught.value)


@pytest.mark.parametrize(("path", "method"), METHOD_CASES)
def test_a_method_of_another_shape_is_told(path, method, monkeypatch):
    monkeypatch.setattr(names._class(path), method, lambda self, something_new, *rest: None)
    with pytest.raises(DeepSpeedChangedError) as caught:
        names.require_names()
    assert f"{path}.{method} takes (self, something_new, rest)" in str(caught.value)


@pytest.mark.parametrize(("module", "word"), WORD_CASES)
def test_a_word_that_deepspeed_does_not_use_any_more_is_told(module, word, monkeypatch):
    """What we set there would be read by nobody."""
    read = Path.read_text

    def without(self, *args, **kwargs):
        return re.sub(rf"\b{word}\b", "renamed", read(self, *args, **kwargs))

    monkeypatch.setattr(Path, "read_text", without)
    with pytest.raises(DeepSpeedChangedError) as caught:
        names.require_names()
    assert f"{module} does not use the name {word}" in str(caught.value)


def test_a_class_that_is_not_there_is_told(monkeypatch):
    monkeypatch.delattr(deepspeed.runtime.pipe.engine, "PipelineEngine")
    with pytest.raises(DeepSpeedChangedError, match="there is no deepspeed.runtime.pipe.engine.PipelineEngine"):
        names.require_names()


# -- what is built --------------------------------------------------------------------------------------------------

ENGINES = {
    "ZeRO-0": {"zero": 0, "no_pipeline_parallel": True},
    "pipeline of ZeRO-1": {"zero": 1},
    "ZeRO-3": {"zero": 3},
    "bf16": {"zero": 1, "bf16": True, "no_pipeline_parallel": True},
}


@contextlib.contextmanager
def _removed(owner: object, name: str):
    """The attribute is gone, wherever it comes from: the object, torch's table of submodules, or a class."""
    tables = [table for table in (vars(owner), vars(owner).get("_modules", {})) if name in table]
    if tables:
        values = [table.pop(name) for table in tables]
        yield
        for table, value in zip(tables, values, strict=True):
            table[name] = value
        return
    home = next(base for base in type(owner).__mro__ if name in vars(base))
    value = vars(home)[name]
    delattr(home, name)
    yield
    setattr(home, name, value)


def _untold(rank: int, world_size: int, argv: list[str]) -> tuple[list[str], int]:
    """(attributes whose absence was not told, how many were tried)."""
    engine = build(argv, rank, world_size).live.engine
    names.require_built(engine)
    untold, tried = [], 0
    for path, attributes in BUILT.items():
        for owner in (engine, engine.optimizer):
            for attribute in attributes if isinstance(owner, names._class(path)) else ():
                tried += 1
                told = ""
                with _removed(owner, attribute):
                    try:
                        names.require_built(engine)
                    except DeepSpeedChangedError as error:
                        told = str(error)
                if f"{path} has no {attribute}" not in told or EXPECTED not in told:
                    untold.append(f"{path} {attribute}")
    return untold, tried


@pytest.mark.parametrize("kind", ENGINES)
def test_an_attribute_that_is_not_built_is_told(kind, data):
    untold, tried = run_ranks(1, _untold, command_line(data, **ENGINES[kind]))[0]
    assert untold == [] and tried > 10


def _build_renamed(rank: int, world_size: int, argv: list[str]) -> None:
    from deepspeed import DeepSpeedEngine

    DeepSpeedEngine._take_the_step = DeepSpeedEngine._take_model_step
    del DeepSpeedEngine._take_model_step
    build(argv, rank, world_size)


def test_a_run_does_not_start_with_a_renamed_method(data):
    with pytest.raises(RankFailure, match="DeepSpeedChangedError.*_take_model_step"):
        run_ranks(1, _build_renamed, command_line(data))
