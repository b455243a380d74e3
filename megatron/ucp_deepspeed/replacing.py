"""Replace attributes of classes and modules that are others', and put them back.

replaced = Replaced()
replaced.add([Replacement(DeepSpeedEngine, "load_checkpoint", make)])       # make(stock) gives what stands there
replaced.undo()

replaced.when_imported("transformers.trainer", replacements)       # at once, if it is there already
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Replacement:
    owner: Any
    name: str
    make: Callable[[Any], Any]
    """Gives what is to stand there, from what stood there."""


class Replaced:
    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []
        self._waiting: list[_AfterImport] = []

    def __bool__(self) -> bool:
        return bool(self._before)

    def add(self, replacements: Iterable[Replacement]) -> None:
        """All of them or, where something to replace is not there, none. Raises AttributeError."""
        replacements = list(replacements)
        stock = [getattr(each.owner, each.name) for each in replacements]
        for each, before in zip(replacements, stock, strict=True):
            setattr(each.owner, each.name, each.make(before))
            self._before.append((each.owner, each.name, before))

    def when_imported(self, name: str, replacements: Callable[[ModuleType], list[Replacement]]) -> None:
        if module := sys.modules.get(name):
            self.add(replacements(module))
            return
        finder = _AfterImport(name, lambda module: self.add(replacements(module)))
        sys.meta_path.insert(0, finder)
        self._waiting.append(finder)

    def undo(self) -> None:
        for finder in self._waiting:
            if finder in sys.meta_path:
                sys.meta_path.remove(finder)
        for owner, name, before in reversed(self._before):
            setattr(owner, name, before)
        self._before.clear()
        self._waiting.clear()


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets the others find a module, and does something once it has been executed."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]):
        self._name, self._then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)  # so that the search below does not end here again
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
