"""Damage to what DeepSpeed's own .pt files hold: every value in them removed, of a wrong type, out of range; and
tensors that are not what they seem. Such folders carry no checksums, so all that can be asked is a message, or an
output that says that it is unverified."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from fuzz.bases import Base
from fuzz.faults import Fault, chosen

from harness.pt_files import save_again

Where = tuple[Any, ...]
WRONG_TYPES = [None, True, 7, -1.5, "text", [], {}, [[["deep"]]], b"bytes", torch.zeros(3)]


def faults(bases: Iterable[Base], seed: int) -> Iterator[Fault]:
    for base in bases:
        if not base.is_proven:
            yield from _of_base(base, seed)


def _of_base(base: Base, seed: int) -> Iterator[Fault]:
    seen: set[str] = set()
    for path in sorted(base.folder.rglob("*.pt")):
        relative = path.relative_to(base.folder).as_posix()
        kind = re.sub(r"^zero/.*/", "zero/*/", re.sub(r"\d+", "N", relative))
        content = torch.load(path, weights_only=False)  # of the run that saved it a moment ago
        for where in _places(content):
            if base.is_universal and "model_states" in kind and len(where) > 1:
                continue  # copied as it is
            place = f"{kind}: {' / '.join(re.sub(r'[0-9]+', 'N', str(part)) for part in where)}"
            if place in seen:
                continue
            seen.add(place)
            rng = random.Random(f"{seed} {base.name} {place}")
            value = _at(content, where)
            found = [Fault(f"{place} is removed", base.name, _Change(relative, where, _remove))]
            wrong = [v for v in WRONG_TYPES if type(v) is not type(value)]
            for index, other in chosen(wrong, 1, rng):
                found.append(
                    Fault(f"{place} is of a wrong type ({index})", base.name, _Change(relative, where, _Put(other)))
                )
            for _, (what, odd) in chosen(list(_out_of_range(value).items()), 1, rng):
                found.append(Fault(f"{place} is {what}", base.name, _Change(relative, where, _Put(odd))))
            for _, fault in chosen(found, 1, rng):
                yield fault


def change_pickles(folder: Path, change: Callable[[Any, Path], Any]) -> None:
    for path in sorted(folder.rglob("*.pt")):
        save_again(change(torch.load(path, weights_only=False), path), path)


def _places(value: Any, where: Where = (), depth: int = 0) -> Iterator[Where]:
    """Of tables and lists of more than three entries the first one."""
    if where:
        yield where
    if depth > 6:
        return
    if isinstance(value, dict):
        is_table = all("." in str(key) for key in value)  # by parameters' names
        entries: list[Any] = list(value)[:1] if is_table else list(value)
    elif isinstance(value, (list, tuple)):
        entries = list(range(min(1, len(value))))
    elif hasattr(value, "__dict__") and not torch.is_tensor(value) and not isinstance(value, Enum):
        value, entries = vars(value), list(vars(value))
    else:
        return
    for key in entries:
        if not isinstance(key, str) or not any(key.startswith(name) for name in _UNREAD):
            yield from _places(value[key], (*where, key), depth + 1)


_UNREAD = ("ds_config", "random_", "np_random", "cuda_rng")
"""What nobody reads is damaged as a whole only."""


def _at(content: Any, where: Where) -> Any:
    for part in where:
        content = vars(content)[part] if _has_attributes(content) else content[part]
    return content


def _has_attributes(value: Any) -> bool:
    return not isinstance(value, (dict, list, tuple)) and hasattr(value, "__dict__")


def _out_of_range(value: Any) -> dict[str, Any]:
    if torch.is_tensor(value):
        flat = value.detach().reshape(-1).float()
        return {
            "empty": flat[:0],
            "a number": torch.tensor(1.0),
            "one element longer": torch.cat([flat, flat[:1], torch.zeros(1)])[: flat.numel() + 1],
            "one element shorter": flat[: max(0, flat.numel() - 1)].clone(),
            "of no stride": torch.zeros(1).expand(max(1, flat.numel())),
            "of no stride and endless": torch.zeros(1).expand(1 << 26),
            "of whole numbers": flat.long(),
            "of complex numbers": flat.to(torch.complex64),
            "of truth values": flat > 0,
            "upside down": value.detach().clone().unsqueeze(0).unsqueeze(0),
            "sparse": flat.to_sparse(),
            "not there (meta)": flat.to("meta"),
        }
    if isinstance(value, bool) or value is None:
        return {}
    if isinstance(value, (int, float)):
        return {
            "below zero": -1,
            "far below zero": -(2**62),
            "far too large": 2**62,
            "ten million": 10**7,
            "beyond any number": 10**400,
            "no number": math.nan,
            "endless": math.inf,
            "zero": 0,
        }
    if isinstance(value, str):
        return {"empty": "", "far too long": "x" * 70_000, "half a character": "\ud83d", "outside": "../../home/x"}
    if isinstance(value, torch.Size):
        return {"endless": (2**31, 2**31), "below zero": (-1, -1), "empty": (), "of no number": ("a",)}
    if isinstance(value, (list, tuple)):
        return {"emptied": type(value)(), "doubled": type(value)([*value, *value]), "of nothing": [None]}
    if isinstance(value, dict):
        return {"emptied": type(value)(), "with a number as a key": {**value, 7: 7}, "with more": {**value, "x": [1]}}
    return {}


class _Put:
    def __init__(self, value: Any):
        self.value = value

    def __call__(self, owner: Any, key: Any) -> None:
        owner[key] = self.value


def _remove(owner: Any, key: Any) -> None:
    del owner[key]


class _Change:
    def __init__(self, relative: str, where: Where, change: Callable[[Any, Any], None]):
        self.relative, self.where, self.change = relative, where, change

    def __call__(self, run: Path, folder: Path, rng: random.Random) -> None:
        path = folder / self.relative
        save_again(_changed(torch.load(path, weights_only=False), self.where, self.change), path)


def _changed(value: Any, where: Where, change: Callable[[Any, Any], None]) -> Any:
    """The same structure with one place changed; tuples are made anew."""
    first, *rest = where
    is_tuple = isinstance(value, tuple)
    owner = list(value) if is_tuple else vars(value) if _has_attributes(value) else value
    if rest:
        owner[first] = _changed(owner[first], tuple(rest), change)
    else:
        change(owner, first)
    return tuple(owner) if is_tuple else value
