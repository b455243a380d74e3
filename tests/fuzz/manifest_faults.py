"""Damage to ucp.json: every field removed, of a wrong type, out of range (each signed anew, as a stranger would), and
one bit of its key or its value flipped (the checksum being the old one, as a disk would)."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fuzz.bases import Base
from fuzz.faults import Fault, chosen

from megatron.ucp.manifest import MANIFEST_NAME

Where = tuple[str | int, ...]
_TABLES = {"parameters", "files", "digests", "expert_digests", "fragments", "groups", "scalars", "shapes"}
"""Their keys are names: of each table the first entry stands for all."""
_DEPTH_OF_REQUIRED = {"topology": 2, "optimizer": 2, "files": 3, "digests": 3, "parameters": 3}
"""Fields of format version 2 that have to be there, as parts of their path."""
WRONG_TYPES = [None, True, 7, -1.5, "text", [], {}, [[["deep"]]], {"a": {"b": None}}]


def faults(bases: Iterable[Base], seed: int) -> Iterator[Fault]:
    """Each field of the first base that has it. Of universal folders, which are read by the same code, one of the
    faults of a field that native ones have too."""
    seen: set[Where] = set()
    for base in bases:
        if not base.is_proven:
            continue
        data = json.loads((base.folder / MANIFEST_NAME).read_text())
        for where in _fields(data):
            place = _without_names(where)
            found = list(_of_field(base, where, data, seed))
            if place not in seen:
                yield from found
            elif base.is_universal:
                yield random.Random(f"{seed} {where}").choice(found)
            seen.add(place)


def _without_names(where: Where) -> Where:
    return tuple("*" if i and where[i - 1] in _TABLES else part for i, part in enumerate(where))


def _of_field(base: Base, where: Where, data: dict[str, Any], seed: int) -> Iterator[Fault]:
    name = ".".join(map(str, where))
    rng = random.Random(f"{seed} {base.name} {name}")
    value = _at(data, where)

    def signed(kind: str, change, told: bool = False, where=where, name=name) -> Fault:
        return Fault(f"ucp.json: {name} {kind}", base.name, _Signed(where, change), told, is_signed=True)

    if isinstance(where[-1], str):
        yield signed("is removed", _remove, told=len(where) == _DEPTH_OF_REQUIRED.get(where[0], 1) or len(where) == 1)
    wrong = [v for v in WRONG_TYPES if not _is_alike(v, value)]
    for index, other in chosen(wrong, 1, rng):
        yield signed(f"is of a wrong type ({index}: {json.dumps(other)})", _Put(other))
    is_degree = str(where[-1]).endswith("p_size")
    for index, other in chosen([*out_of_range(value), *([10**6] if is_degree else [])], 1, rng):
        yield signed(f"is out of range ({index}: {json.dumps(other)[:40]})", _Put(other))
    for part in ("value", "key"):
        if part == "value" or isinstance(where[-1], str):
            yield Fault(f"ucp.json: a bit of the {part} of {name} is flipped", base.name, _Flip(where, part), True)


def _fields(data: Any, where: Where = ()) -> Iterator[Where]:
    """Every distinct place: of tables and lists the first entry."""
    if where:
        yield where
    if isinstance(data, dict):
        keys = list(data)[:1] if where and where[-1] in _TABLES else list(data)
        if where[:1] in (("digests",), ("expert_digests",)):
            keys = keys[:1]
        for key in keys:
            yield from _fields(data[key], (*where, key))
    elif isinstance(data, list) and data:
        yield from _fields(data[0], (*where, 0))


def _at(data: Any, where: Where) -> Any:
    for part in where:
        data = data[part]
    return data


def _is_alike(value: Any, original: Any) -> bool:
    if type(value) is type(original):
        return True
    return isinstance(original, (int, float)) and not isinstance(original, bool) and value == 7


def out_of_range(value: Any) -> list[Any]:
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int):
        return [-1, -(2**63), 2**64, 10**400, math.inf, math.nan, value + 0.5]
    if isinstance(value, float):
        return [math.nan, math.inf, -math.inf, -1.0, -1e300, 10**400]
    if isinstance(value, str):
        return ["", "x" * 70_000, "../../home/x", "/etc/passwd", "a\0b", "\ud83d", "\u202e", "-0"]
    if isinstance(value, list):
        return [[], [*value, *value], ((value or [0]) * 20_000)[:20_000], [*value, None], [value] * 3]
    return [{}, {**value, "extra": {"a": [1]}}, {**value, "": 0}, {f"k{i}": None for i in range(20_000)}]


class _Put:
    def __init__(self, value: Any):
        self.value = value

    def __call__(self, owner: Any, key: str | int) -> None:
        owner[key] = copy.deepcopy(self.value)


def _remove(owner: Any, key: str | int) -> None:
    del owner[key]


class _Signed:
    """A change with the checksum that belongs to it."""

    def __init__(self, where: Where, change):
        self.where, self.change = where, change

    def __call__(self, run: Path, folder: Path, rng: random.Random) -> None:
        data = json.loads((folder / MANIFEST_NAME).read_text())
        self.change(_at(data, self.where[:-1]), self.where[-1])
        (folder / MANIFEST_NAME).write_bytes(sign(data))


def sign(data: dict[str, Any]) -> bytes:
    """By FORMAT.md: the SHA-256 of the file with 64 zeros in its place. Nothing where `checksum` itself was changed."""
    checksum = data.get("checksum")
    if not isinstance(checksum, str) or len(checksum) != 64:
        return json.dumps(data, indent=1).encode()
    data["checksum"] = "0" * 64
    text = json.dumps(data, indent=1)
    return text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1).encode()


class _Flip:
    """One bit of the text of a value or a key, where it stands."""

    def __init__(self, where: Where, part: str):
        self.where, self.part = where, part

    def __call__(self, run: Path, folder: Path, rng: random.Random) -> None:
        raw = (folder / MANIFEST_NAME).read_bytes()
        data = json.loads(raw)
        owner, key = _at(data, self.where[:-1]), self.where[-1]
        mark = "@" * 24  # finds the place in the text: nothing else is written so
        if self.part == "key":
            fields = {(mark if k == key else k): v for k, v in owner.items()}
            owner.clear()
            owner.update(fields)
        else:
            owner[key] = mark
        start = json.dumps(data, indent=1).encode().index(mark.encode()) - 1
        old = json.dumps(key) if self.part == "key" else _text(_at(json.loads(raw), self.where), len(self.where))
        assert raw[start : start + len(old)] == old.encode(), (self.where, raw[start : start + 40], old[:40])
        flipped = bytearray(raw)
        flipped[start + rng.randrange(len(old))] ^= 1 << rng.randrange(7)
        (folder / MANIFEST_NAME).write_bytes(flipped)


def _text(value: Any, depth: int) -> str:
    return json.dumps(value, indent=1).replace("\n", "\n" + " " * depth)
