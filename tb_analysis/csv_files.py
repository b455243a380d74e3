"""One CSV file per run: ``step,value,delta``, delta = run - Source (empty where the Source has no such step).

The idea: the file's name carries the run's name (``uc_out_<run>.csv``), so that a folder of CSV files is a
set of runs again. Files of the upstream script (an unnamed index column, then ``step,value``) are read too.

    write_csv(Path("out/uc_out_target_tp1_pp1_dp1.csv"), source_curve, run.curve)
    runs = read_csv_folder(Path("out"))
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from tb_analysis.curves import Curve, Point
from tb_analysis.errors import NoRunsError, RunFileError
from tb_analysis.runs import Run, describe

NAME_MARK = "uc_out_"


def csv_path(prefix: str, run: Run) -> Path:
    """``prefix`` is what --csv_name gives: put in front of the name, folders included."""
    return Path(f"{prefix}{NAME_MARK}{run.name}.csv")


def write_csv(path: Path, source: Curve, curve: Curve) -> None:
    """Values are written with ``repr``: read back they are the same bits."""
    steps, deltas = source.delta(curve)
    delta_at = dict(zip(steps.tolist(), deltas.tolist()))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "value", "delta"])
        for step, value in zip(curve.steps.tolist(), curve.values.tolist()):
            writer.writerow([step, repr(value), repr(delta_at[step]) if step in delta_at else ""])


def read_csv_folder(csv_dir: Path) -> list[Run]:
    """The runs of every CSV file of a folder (not of its sub-folders)."""
    files = sorted(csv_dir.glob("*.csv")) if csv_dir.is_dir() else []
    if not files:
        raise NoRunsError(f"no *.csv in --csv_dir {csv_dir}. Give the folder the CSV files were written to.")
    return [describe(file.stem.rpartition(NAME_MARK)[2], _read(file)) for file in files]


def _read(file: Path) -> Curve:
    with file.open(newline="") as stream:
        reader = csv.DictReader(stream)
        if not {"step", "value"} <= set(reader.fieldnames or ()):
            raise RunFileError(
                f"{file}: found columns {reader.fieldnames}, expected step and value. "
                "Keep only the CSV files of runs in --csv_dir."
            )
        try:
            points = [Point(int(row["step"]), 0.0, float(row["value"])) for row in reader]
        except (TypeError, ValueError) as error:
            raise RunFileError(f"{file}: line {reader.line_num}: {error}. Write the file again.") from error
    if not points:
        raise RunFileError(f"{file}: no line after the header. Write the file again.")
    curve = Curve.from_points(points)
    if len(curve) != len(points):
        repeated = len(points) - len(np.unique(curve.steps))
        raise RunFileError(f"{file}: {repeated} steps occur twice. Write the file again.")
    return curve
