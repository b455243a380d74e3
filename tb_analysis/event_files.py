"""Find event files and read one scalar out of them.

The idea: a folder that directly holds event files is a run; all its event files together are its curve. The
records are read with TensorBoard's own file loader, without EventAccumulator's reservoir (which by default
keeps only a random 10,000 of the scalars).

    for folder in find_run_folders(Path("runs/ex1/tensorboard")):
        curve = read_curve(folder, "lm-loss-training/lm loss")
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.util.tensor_util import make_ndarray

from tb_analysis.curves import Curve, Point
from tb_analysis.errors import MissingKeyError, NoRunsError, RunFileError

EVENT_FILE_MARK = "events.out.tfevents"
_HEADER_BYTES = 12
_FRAME_BYTES = _HEADER_BYTES + 4
"""Of a record: its length (8) with a checksum (4), and after the data another."""


def find_run_folders(tb_dir: Path) -> list[Path]:
    """Every folder at or below ``tb_dir`` that holds an event file itself, sorted by path."""
    if not tb_dir.is_dir():
        raise NoRunsError(f"--tb_dir {tb_dir}: no such folder. Give the folder that holds the runs' folders.")
    folders = sorted({file.parent for file in _files(tb_dir, f"**/*{EVENT_FILE_MARK}*")})
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
    for file in _files(folder, f"*{EVENT_FILE_MARK}*"):
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


def _files(folder: Path, pattern: str) -> list[Path]:
    """Regular files only: a FIFO of that name would be waited for."""
    return sorted(file for file in folder.glob(pattern) if file.is_file())


def _scalars(file: Path) -> Iterator[tuple[str, Point | int]]:
    """(tag, a point of its curve, or the step at which a resumed run ended it: megatron/training/tensorboard.py).

    Raises RunFileError for a file that is damaged: TensorBoard's loader ends it there, as if the run had."""
    size, read = file.stat().st_size, 0
    for record in RawEventFileLoader(str(file)).Load():
        read += _FRAME_BYTES + len(record)
        event = _parsed(Event.FromString, record, file)
        for value in event.summary.value:
            kind = value.WhichOneof("value")  # of old writers a simple_value, of new ones (and torch's) either
            if kind is None:
                yield value.tag, event.step
            array = np.asarray(value.simple_value)
            if kind == "tensor":
                array = _parsed(make_ndarray, value.tensor, file)
            if kind in ("tensor", "simple_value") and array.size == 1 and array.dtype.kind in "fiu":
                yield value.tag, Point(event.step, event.wall_time, float(array.reshape(-1)[0]))
    if read < size and not _is_cut_off(file, read):
        raise RunFileError(
            f"{file}: damaged at byte {read} of {size}; what follows cannot be read. Copy it again from where it was "
            "written, or move it away to compare without it."
        )


def _parsed(parse: Callable[[Any], Any], content: Any, file: Path) -> Any:
    try:
        return parse(content)
    except (DecodeError, TypeError, ValueError) as error:
        raise RunFileError(f"{file}: no event file ({error}). Copy it again, or move it away.") from error


def _is_cut_off(file: Path, start: int) -> bool:
    """Whether the file ends within the record that begins there, the mark of a killed run, or in zeros, of a machine
    that lost its power."""
    with file.open("rb") as stream:
        stream.seek(start)
        rest = stream.read()
    if len(rest) < _HEADER_BYTES or not any(rest):
        return True
    length, checksum = struct.unpack("<QI", rest[:_HEADER_BYTES])
    return checksum == masked_crc32c(rest[:8]) and _FRAME_BYTES + length > len(rest)
