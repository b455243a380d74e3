"""Hostile names: of a parameter, a state, a file, a group, a layer, a pointer, each wherever it stands."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fuzz.bases import Base
from fuzz.faults import HOSTILE_NAMES, ODD_NAMES, WAYS, Fault, Plant
from fuzz.manifest_faults import sign
from fuzz.pickle_faults import change_pickles

from megatron.ucp.manifest import MANIFEST_NAME


def faults(bases: Iterable[Base], seed: int) -> Iterator[Fault]:
    """The seed chooses nothing: all names are tried at each place, in the first base of its kind."""
    seen: set[tuple[bool, bool, str]] = set()
    for base in bases:
        places = {**_places(base), "the pointer": (lambda value, base=base: _Point(base, value), False)}
        for place, (plant, is_refused) in places.items():
            kind = base.is_proven, base.is_universal, place
            if kind not in seen:
                seen.add(kind)
                yield from _of_place(base, place, plant, is_refused)


def _of_place(base: Base, place: str, plant: Callable[[str], Plant], is_refused: bool) -> Iterator[Fault]:
    is_pointer = place == "the pointer"
    for name, value in {**HOSTILE_NAMES, **ODD_NAMES}.items():
        told = is_refused and name in HOSTILE_NAMES
        is_another = not told and not is_pointer
        ways = ("doctor", "load") if is_pointer else WAYS
        yield Fault(f"{place} is named: {name}", base.name, plant(value), told, ways, is_another=is_another)


def _places(base: Base) -> dict[str, tuple[Callable[[str], Plant], bool]]:
    """By what is named: how it is renamed, and whether verify refuses a hostile name there."""
    if not base.is_proven:
        if base.is_universal:
            return {"a parameter's folder": (_RenameFolder, False)}
        return {"a parameter in the files": (_RenameInPickles, False)}
    data = json.loads((base.folder / MANIFEST_NAME).read_text())
    name = list(data["parameters"])[0]
    places = {
        "a parameter": (lambda value: _Rename({name: value}), True),
        "a state": (lambda value: _Rename({"exp_avg": value}), True),
        "a file": (lambda value: _Rename({list(data["files"])[0]: value}), True),
        "the file of random streams": (lambda value: _Rename({"rng_state.safetensors": value}), True),
        "a group": (lambda value: _Rename({"decay": value}), False),
        "a kind of optimizer": (lambda value: _Rename({"AdamW": value}), False),
    }
    if data["pipeline_layers"]:
        places["a layer"] = (lambda value: _Rename({data["pipeline_layers"][0]: value}), False)
    if data["source"]:
        places["the folder that it was made from"] = (lambda value: _Rename({data["source"]["folder"]: value}), False)
    return places


class _Rename:
    """A word of ucp.json by another, as a key and as a value, wherever it stands; signed anew."""

    def __init__(self, names: dict[str, str]):
        self.names = names

    def __call__(self, run: Path, folder: Path, rng: random.Random) -> None:
        data = json.loads((folder / MANIFEST_NAME).read_text())
        (folder / MANIFEST_NAME).write_bytes(sign(renamed(data, self.names)))


def renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return type(value)((names.get(k, k) if isinstance(k, str) else k, renamed(v, names)) for k, v in value.items())
    if isinstance(value, list):
        return [renamed(entry, names) for entry in value]
    return names.get(value, value) if isinstance(value, str) else value


class _RenameFolder:
    """Of a universal folder without ucp.json. A disk has no names with a '/' or a zero byte, nor any of 300 bytes."""

    def __init__(self, name: str):
        self.name = "".join(c for c in self.name_on_disk(name) if c not in "/\0")

    @staticmethod
    def name_on_disk(name: str) -> str:
        name = name.encode("utf-8", "surrogateescape" if "\ud83d" not in name else "replace").decode("utf-8", "replace")
        return name[:255] if name not in ("", ".", "..") else "..."

    def __call__(self, run: Path, folder: Path, rng: random.Random) -> None:
        parameter = sorted((folder / "zero").iterdir())[0]
        parameter.rename(parameter.with_name(self.name or "..."))


class _RenameInPickles:
    """In DeepSpeed's own files, where a parameter's name is a key of several tables."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, run: Path, folder: Path, rng: random.Random) -> None:
        def change(content: Any, path: Path) -> Any:
            first = next(n for table in change.model["param_shapes"] for n in table)
            return renamed(content, {first: self.name})

        import torch

        model = sorted(folder.glob("*mp_rank_00_model_states.pt"))[0]
        change.model = torch.load(model, weights_only=False)
        change_pickles(folder, change)


class _Point:
    def __init__(self, base: Base, name: str):
        self.pointer, self.name = base.pointer, name

    def __call__(self, run: Path, folder: Path, rng: random.Random) -> None:
        (run / self.pointer).write_bytes(self.name.encode("utf-8", "surrogatepass"))
