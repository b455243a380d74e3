"""Checks of JSON values that come out of a file: each takes a place and a value, and adds what is wrong.

A check is a function, a bigger one is made of smaller ones, and none stops at the first fault.

    check = record({"bytes": whole(), "crc32": hexadecimal(8)}, required=("bytes", "crc32"))
    check(lambda place, what: faults.append(f"{place}: {what}"), "files.a", {"bytes": -1})
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

MAX_COUNT = 1 << 62
"""Of samples, tokens, bytes: what an int64 holds, with room to add."""
MAX_DEPTH = 24
"""Of values of any kind."""
MAX_TEXT, MAX_KEY = 1 << 16, 1 << 12
"""Characters."""

Add = Callable[[str, str], None]
"""Takes a fault: its place and what is wrong there."""
_HEX = re.compile(r"[0-9a-f]*")
_SHOWN = 60


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def whole(low: int = 0, high: int = MAX_COUNT, optional: bool = False):
    def check(add: Add, place: str, value: Any) -> bool:
        if optional and value is None:
            return True
        if isinstance(value, bool) or not isinstance(value, int):
            add(place, f"{shown(value)} is no whole number")
        elif not low <= value <= high:
            add(place, f"{shown(value)} is not from {low} to {high}")
        else:
            return True
        return False

    return check


def number(low: float = -math.inf, high: float = math.inf, optional: bool = False):
    def check(add: Add, place: str, value: Any) -> None:
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            add(place, f"{shown(value)} is no number")
        elif abs(value) > 1e300 or value != value:
            add(place, f"{shown(value)} is not finite")
        elif not low <= value <= high:
            add(place, f"{shown(value)} is not from {low} to {high}")

    return check


def flag(add: Add, place: str, value: Any) -> None:
    if not isinstance(value, bool):
        add(place, f"{shown(value)} is neither true nor false")


def one_of(*allowed: Any):
    def check(add: Add, place: str, value: Any) -> None:
        if type(value) not in {type(a) for a in allowed} or value not in allowed:
            add(place, f"{shown(value)} is none of {', '.join(map(str, allowed))}")

    return check


def text(add: Add, place: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        add(place, f"{shown(value)} is no text, or too long")


def hexadecimal(digits: int):
    def check(add: Add, place: str, value: Any) -> None:
        if not isinstance(value, str) or len(value) != digits or not _HEX.fullmatch(value):
            add(place, f"{shown(value)} is not {digits} lower-case hexadecimal digits")

    return check


def plain(add: Add, place: str, value: Any, depth: int = 0) -> None:
    """JSON values of any kind, not too deep."""
    if depth > MAX_DEPTH:
        add(place, f"is nested more than {MAX_DEPTH} deep")
    elif isinstance(value, dict):
        for key, entry in value.items():
            plain(add, place, entry, depth + 1)
            if len(key) > MAX_KEY:
                add(place, f"has a key of more than {MAX_KEY} characters")
    elif isinstance(value, list):
        for entry in value:
            plain(add, place, entry, depth + 1)


def mapping(check: Callable[..., Any], name: Callable[..., Any] | None = None, optional: bool = False):
    """An object whose values all pass `check`, and its keys `name`."""

    def check_all(add: Add, place: str, value: Any) -> None:
        if optional and value is None:
            return
        if not isinstance(value, dict):
            add(place, f"{shown(value)} is no object")
            return
        for key, entry in value.items():
            if name is not None:
                name(add, place, key)
            check(add, f"{place}.{key}", entry)

    return check_all


def list_of(check: Callable[..., Any], low: int = 0, high: int = MAX_COUNT):
    def check_all(add: Add, place: str, value: Any) -> None:
        if not isinstance(value, list):
            add(place, f"{shown(value)} is no list")
        elif not low <= len(value) <= high:
            add(place, f"has {len(value)} entries, not {low} to {high}")
        else:
            for index, entry in enumerate(value):
                check(add, f"{place}[{index}]", entry)

    return check_all


def record(fields: Mapping[str, Callable[..., Any]], required: tuple[str, ...] = (), is_open: bool = False):
    """An object with these fields and, unless it `is_open`, no others."""

    def check_all(add: Add, place: str, value: Any) -> None:
        if not isinstance(value, dict):
            add(place, f"{shown(value)} is no object")
            return
        for key in required:
            if key not in value:
                add(f"{place}.{key}", "is missing")
        for key, entry in value.items():
            if key in fields:
                fields[key](add, f"{place}.{key}", entry)
            elif is_open:
                plain(add, f"{place}.{key}", entry)
            else:
                add(f"{place}.{key}", "is not known")

    return check_all


def passes(check: Callable[..., Any], value: Any) -> bool:
    """Whether it finds nothing."""
    found: list[str] = []
    check(lambda place, what: found.append(what), "", value)
    return not found
