"""What writes checkpoints, on a real disk that is too small: a tmpfs of each of many sizes, and one that is read-only.
Run as a program, as root of a namespace of its own:

    PYTHONPATH=. unshare -Urm python tests/fuzz/small_disk.py FOLDER SIZES [plant]     # prints one JSON object

The question whether there is room is left out, as if another job had filled the disk since. An operation ends with an
error that says so; what a resume takes is whole; with room it is done again to its end (crash_points.Judge).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from crash_points import OPERATIONS, Disk, Judge, prepared

from megatron.ucp import convert, native, reshape, shares
from megatron.ucp.output_file import PlainOutput

PAGE, ROOM = 4096, "size=64m"
NAMES = [name for name in OPERATIONS if name not in ("doctor --fix", "convert, going on")]


def _blur_errors() -> None:
    """The fault that has to be seen: an error of the disk that is told as something else."""
    write, native.kernel = PlainOutput.write, None

    def blurred(output: PlainOutput, content: object) -> None:
        try:
            write(output, content)
        except OSError:
            raise ValueError("something went wrong") from None

    PlainOutput.write = blurred


def main(folder: Path, num_sizes: int, plant: str = "") -> None:
    if plant:
        _blur_errors()
    judge = Judge(json.loads((folder / "states.json").read_text()))
    base, kernel = folder / "base", native.kernel
    place = folder / "small"
    place.mkdir()
    for module in (convert, reshape, shares):
        module.require_space = lambda *args: None
    needed = sum(path.stat().st_size // PAGE + 1 for path in base.rglob("*") if path.is_file())
    outcomes: dict[str, Counter] = {name: Counter() for name in NAMES}
    faults: list[str] = []
    cases = [(name, number) for number in range(num_sizes) for name in NAMES]
    for name, number in [*((name, None) for name in NAMES), *cases]:
        native.kernel = kernel if number is None or number % 2 else None
        _mount(place, ROOM)
        (place / "outside").mkdir()
        shutil.copytree(folder / "converted", place / "converted")
        run = prepared(place / "case", name, base)
        free = shutil.disk_usage(place).free
        spare = 0 if number is None else PAGE * (1 + number * 2 * needed // num_sizes)
        _mount(
            place, "remount,ro" if number is None else f"remount,size={shutil.disk_usage(place).total - free + spare}"
        )
        disk = Disk(str(place / "case"), 0, "read-only" if number is None else "full")
        outcome, why = judge.of(place / "case", run, name, disk, lambda: _mount(place, f"remount,rw,{ROOM}"))
        outcomes[name][outcome] += 1
        if outcome not in ("older", "newer"):
            what = "read-only" if number is None else f"{spare} bytes"
            faults.append(f"{name}, {what}, kernel {native.kernel is not None}: {outcome}: {why}")
        subprocess.run(["umount", place], check=True)
    print(json.dumps({"outcomes": {name: dict(each) for name, each in outcomes.items()}, "faults": faults}))


def _mount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
