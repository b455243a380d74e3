"""Every damage that the fuzz plants, as a table: where, what, and whether it has to be told.

A fault is a name, a base and a function that damages a copy of it. Which faults there are follows from
what the bases hold (each field of ucp.json, each kind of file, each place of a name, each value in a .pt file of
DeepSpeed's), so that a new field or file is damaged without a line here. Random choices come from the fault's name and
SEED: a failure is the same in every run.

    for fault in all_faults(bases): fault.plant(run_folder, checkpoint_folder, random.Random(...))
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fuzz.bases import Base

Plant = Callable[[Path, Path, random.Random], None]


WAYS = ("open", "verify", "convert", "reshape", "diff", "doctor", "load")


@dataclass(frozen=True)
class Fault:
    name: str
    base: str
    plant: Plant
    must_be_told: bool = False
    """By verify. Otherwise it is enough that what comes out is right, or carries a doubt."""
    ways: tuple[str, ...] = WAYS
    """Of reading: those that may see it."""
    is_signed: bool = False
    """ucp.json was changed and signed anew: what comes out may say the same of all but the tensors."""
    is_another: bool = False
    """What comes out is of another model, with right names of its own; only that nothing breaks is judged."""


def all_faults(bases: dict[str, Base], seed: int) -> list[Fault]:
    from fuzz import file_faults, manifest_faults, name_faults, pickle_faults

    kinds = manifest_faults, file_faults, name_faults, pickle_faults
    found = [fault for kind in kinds for fault in kind.faults(bases.values(), seed)]
    names = [(fault.base, fault.name) for fault in found]
    assert len(set(names)) == len(names), "two faults of one name"
    return found


def chosen(values: list, count: int, rng: random.Random) -> Iterator[tuple[int, object]]:
    """Some of the values, each with its index."""
    for index in sorted(rng.sample(range(len(values)), min(count, len(values)))):
        yield index, values[index]


HOSTILE_NAMES = {
    "empty": "",
    "here": ".",
    "up": "..",
    "outside": "../x",
    "far outside": "../../home/x",
    "absolute": "/etc/passwd",
    "endless": "/dev/zero",
    "up from inside": "a/../../x",
    "backslashes": "..\\x",
    "zero byte": "a\0b",
    "line break": "a\nb",
    "escape": "\x1b[2J",
    "half a character": "\ud83d",
    "right to left": "\u202egnp",
    "long": "x" * 300,
    "very long": "x" * 70_000,
    "deep": "a/" * 40 + "b",
    "slash at the end": "a/",
}
"""No name of anything in a checkpoint, and each could do harm."""
ODD_NAMES = {"command": "$(touch x)", "option": "-rf", "format": "%s{0}", "blank": " ", "dots": "...", "step": "step"}
"""Names that a checkpoint may have, as long as nothing is made of them."""
