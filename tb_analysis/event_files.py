"""Find event files and read one scalar out of them.

The idea: a folder that directly holds event files is a run; all its event files together are its curve. The
records are read with TensorBoard's own file loader, without EventAccumulator's reservoir (which by default
keeps only a random 10,000 of the scalars).

    for folder in find_run_folders(Path("runs/ex1/tensorboard")):
        curve = read_curve(folder, "lm-loss-training/lm loss")
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

from tb_analysis.curves import Curve, Point
from tb_analysis.errors import MissingKeyError, NoRunsError

EVENT_FILE_MARK = "events.out.tfevents"


def find_run_folders(tb_dir: Path) -> list[Path]:
    """Every folder at or below ``tb_dir`` that holds an event file itself, sorted by path."""
    if not tb_dir.is_dir():
        raise NoRunsError(f"--tb_dir {tb_dir}: no such folder. Give the folder that holds the runs' folders.")
    folders = sorted({file.parent for file in tb_dir.rglob(f"*{EVENT_FILE_MARK}*") if file.is_file()})
    if not folders:
        raise NoRunsError(
            f"no event file ({EVENT_FILE_MARK}*) at or below --tb_dir {tb_dir}. "
            "Pass --tensorboard-dir to the training run, and its folder or a parent of it here."
        )
    return folders


def read_curve(folder: Path, key: str) -> Curve:
    """The scalar ``key`` of all event files of one folder, merged (see ``Curve.from_points``)."""
    keys: set[str] = set()
    points: list[Point] = []
    for file in sorted(folder.glob(f"*{EVENT_FILE_MARK}*")):
        for tag, point in _scalars(file):
            if isinstance(point, Point):
                keys.add(tag)
            if tag != key:
                continue
            if isinstance(point, Point):
                points.append(point)
            else:
                points = [known for known in points if known.step < point]
    if not points:
        found = ", ".join(repr(k) for k in sorted(keys)) or "no scalars at all"
        raise MissingKeyError(f"{folder}: no scalar {key!r}; found: {found}. Give one with --tb_event_key.")
    return Curve.from_points(points)


def _scalars(file: Path) -> Iterator[tuple[str, Point | int]]:
    """(tag, a point of its curve, or the step at which a resumed run ended it: megatron/training/tensorboard.py)."""
    # EventFileLoader turns old-style simple_value summaries (torch's writer) into tensors, so both kinds
    # of writer are read by the one line below. A truncated last record, the mark of a killed run, ends the
    # file quietly.
    for event in EventFileLoader(str(file)).Load():
        if not event.HasField("summary"):
            continue
        for value in event.summary.value:
            if value.WhichOneof("value") is None:
                yield value.tag, event.step
            if not value.HasField("tensor"):
                continue
            array = make_ndarray(value.tensor)
            if array.size == 1 and array.dtype.kind in "fiu":
                yield value.tag, Point(event.step, event.wall_time, float(array.reshape(-1)[0]))
