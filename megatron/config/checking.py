"""What the checks have in common: ranges, and the legal values nearest to what was asked.

yield from at_least(1, run, "micro_batch_size")
nearest(divisors(12), 5)                    # "3, 4, 6 or 12"
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.config.errors import Problem


def divisors(number: int) -> list[int]:
    """Whole numbers that divide `number`, rising."""
    return [n for n in range(1, number + 1) if number % n == 0]


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def nearest(legal: list[int], wanted: int, count: int = 4) -> str:
    """The legal values nearest to the one asked for, rising: `2, 3, 4 or 6`."""
    closest = sorted(sorted(legal, key=lambda n: (abs(n - wanted), n))[:count])
    head, tail = [str(n) for n in closest[:-1]], str(closest[-1])
    return f"{', '.join(head)} or {tail}" if head else tail


def at_least(least: int, section: Any, *names: str) -> Iterator[Problem]:
    for name in names:
        value = getattr(section, name)
        if value < least:
            yield Problem(
                f"{flag_of(name)} is too small", found=str(value), expected=f"at least {least}", flags=(flag_of(name),)
            )


def within(low: float, high: float, section: Any, *names: str, is_open_above: bool = False) -> Iterator[Problem]:
    for name in names:
        value = getattr(section, name)
        if not low <= value <= high or (is_open_above and value == high):
            above = "<" if is_open_above else "<="
            yield Problem(
                f"{flag_of(name)} is out of range",
                found=f"{value:g}",
                expected=f"{low:g} <= value {above} {high:g}",
                flags=(flag_of(name),),
            )
