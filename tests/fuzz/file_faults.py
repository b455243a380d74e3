"""Damage to files: every kind of file flipped, cut off, zeroed at its end, exchanged, replaced by a stranger's,
missing, doubled, or turned into something that is no file."""

from __future__ import annotations

import io
import os
import random
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from fuzz.bases import Base
from fuzz.faults import WAYS, Fault, Plant, chosen

FLIPS, CUTS = 3, 1
OF_EACH_LIST = 2
"""Of strangers' files, doubles and things that are no file, for each kind of file; which ones, the seed says."""


def faults(bases: Iterable[Base], seed: int) -> Iterator[Fault]:
    for base in bases:
        for kind, paths in _kinds(base).items():
            yield from _of_kind(base, kind, paths, seed)


def _of_kind(base: Base, kind: str, paths: list[str], seed: int) -> Iterator[Fault]:
    rng = random.Random(f"{seed} {base.name} {kind}")
    is_pointer = kind == "pointer"
    told = base.is_proven and not is_pointer

    def fault(what: str, plant: Plant, told: bool = told, kind=kind) -> Fault:
        return Fault(
            f"{kind}: {what}", base.name, plant, must_be_told=told, ways=("doctor", "load") if is_pointer else WAYS
        )

    for number in range(FLIPS):
        yield fault(f"a bit is flipped ({number})", _edited(paths, seed, number, _flip))
    for number in range(CUTS):
        yield fault(f"is cut off ({number})", _edited(paths, seed, number, _cut))
        yield fault(f"ends in zeros ({number})", _edited(paths, seed, number, _zero_tail))
    yield fault("is empty", _edited(paths, seed, 0, lambda raw, rng: b""))
    yield fault("has a byte more", _edited(paths, seed, 0, lambda raw, rng: raw + b"\0"))
    for _, (name, content) in chosen(list(STRANGERS.items()), OF_EACH_LIST, rng):
        yield fault(f"is {name}", _edited(paths, seed, 0, lambda raw, rng, content=content: content))
    yield fault("is missing", _on_one(paths, seed, lambda run, path, rng: path.unlink()))
    for _, (name, replace) in chosen(list(NO_FILES.items()), OF_EACH_LIST, rng):
        yield fault(f"is {name}", _on_one(paths, seed, replace))
    if is_pointer:
        return
    for _, name in chosen(list(DOUBLES), OF_EACH_LIST - 1, rng):
        yield fault(f"is there again, as {name}", _on_one(paths, seed, _Double(name)))
    for number in range(1):
        yield fault(f"is exchanged with another ({number})", _Exchange(paths, seed, number))


def _kinds(base: Base) -> dict[str, list[str]]:
    """Paths relative to the run folder by kind: numbers in names and the names of parameters do not count."""
    kinds: dict[str, list[str]] = {}
    for path in [
        base.pointer,
        *sorted(p.relative_to(base.run).as_posix() for p in base.folder.rglob("*") if p.is_file()),
    ]:
        kind = re.sub(r"\d+", "N", path.removeprefix(f"{base.tag}/"))
        kind = "pointer" if path == base.pointer else re.sub(r"^zero/.*/", "zero/*/", kind)
        kinds.setdefault(kind, []).append(path)
    return kinds


def _edited(paths: list[str], seed: int, number: int, edit) -> Plant:
    def plant(run: Path, path: Path, rng: random.Random) -> None:
        path.write_bytes(edit(path.read_bytes(), rng))

    return _on_one(paths, (seed, number), plant)


def _on_one(paths: list[str], seed: object, change) -> Plant:
    def plant(run: Path, folder: Path, rng: random.Random) -> None:
        rng = random.Random(f"{seed} {rng.random()}")
        change(run, run / rng.choice(paths), rng)

    return plant


def _flip(raw: bytes, rng: random.Random) -> bytes:
    flipped = bytearray(raw)
    flipped[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _cut(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.choice([1, len(raw) // 2, len(raw) - 1, rng.randrange(len(raw))])]


def _zero_tail(raw: bytes, rng: random.Random) -> bytes:
    size = rng.choice([1, 22, 512, 4096, rng.randrange(len(raw)) + 1])
    kept = raw[: max(0, len(raw) - size)]
    zeroed = kept + bytes(len(raw) - len(kept))
    return zeroed if zeroed != raw else _flip(raw, rng)


def _archive(data: bytes) -> bytes:
    """A .pt file with this pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


STRANGERS = {
    "text": b"hello\n" * 40,
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "JSON": b'{"a": [1, 2, 3]}\n',
    "an HTML page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "a deep list": b"[" * 30_000,
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n",
    "a pickle of another program": b"\x80\x04\x95\x11\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94]\x94(K\x01K\x02es.",
    "a pickle that runs code": b"cos\nsystem\n(S'touch executed'\ntR.",
    "a pickle that asks for memory": b"cbuiltins\nbytearray\n(L9999999999L\ntR.",
    "an archive that asks for memory": _archive(b"\x80\x02cbuiltins\nbytearray\nJ\0\0\0\x20\x85R."),
    "a broken archive": b"PK\x03\x04" + bytes(60) + b"PK\x05\x06" + b"\xff" * 18,
}


def _link_to(target: str):
    def replace(run: Path, path: Path, rng: random.Random) -> None:
        path.unlink()
        os.symlink(target, path)

    return replace


def _link_to_bystander(run: Path, path: Path, rng: random.Random) -> None:
    path.unlink()
    os.symlink(run.parent / "somebody's file", path)


def _link_to_itself_elsewhere(run: Path, path: Path, rng: random.Random) -> None:
    """The right content, but not in the folder."""
    elsewhere = run.parent / "elsewhere"
    shutil.move(path, elsewhere)
    os.symlink(elsewhere, path)


def _folder(run: Path, path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _fifo(run: Path, path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


NO_FILES = {
    "a link to a device without end": _link_to("/dev/zero"),
    "a link to nothing": _link_to("nowhere"),
    "a link to itself": lambda run, path, rng: _link_to(path.name)(run, path, rng),
    "a link to somebody's file": _link_to_bystander,
    "a link to the right content elsewhere": _link_to_itself_elsewhere,
    "a folder": _folder,
    "a FIFO": _fifo,
}


class _Double:
    def __init__(self, name: str):
        self.name = name

    def __call__(self, run: Path, path: Path, rng: random.Random) -> None:
        double = path.with_name(DOUBLES[self.name](path.name))
        if double.exists():
            double = path.with_name(f"more_{path.name}")
        shutil.copy(path, double)


DOUBLES = {
    "a copy": lambda name: f"{name} (1)",
    "a rank more": lambda name: re.sub(r"\d+", lambda m: str(int(m[0]) + 64), name, count=1),
    "a number written otherwise": lambda name: re.sub(r"\d+", lambda m: f"000{m[0]}", name, count=1),
    "another precision": lambda name: f"bf16_{name}",
}


class _Exchange:
    """Two files change places: of one kind where there are several, else of two kinds."""

    def __init__(self, paths: list[str], seed: int, number: int):
        self.paths, self.seed, self.number = paths, seed, number

    def __call__(self, run: Path, folder: Path, rng: random.Random) -> None:
        every = sorted(p for p in folder.rglob("*") if p.is_file())
        own = sorted(run / path for path in self.paths)
        for _ in range(100):
            one, other = rng.choice(own), rng.choice(own if len(own) > 1 and self.number == 0 else every)
            if one.read_bytes() != other.read_bytes():
                break
        a, b = one.read_bytes(), other.read_bytes()
        if a == b:  # all are alike: then one that differs
            b = a[:-1] + bytes([a[-1] ^ 1])
        one.write_bytes(b)
        other.write_bytes(a)
