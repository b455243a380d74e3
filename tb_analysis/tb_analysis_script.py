#!/usr/bin/env python3
"""Say by a number and a picture whether resumed training goes on as the uninterrupted run did.

    python3 tb_analysis/tb_analysis_script.py --tb_dir runs/ex1/tensorboard --plot_name ucp_training_loss.png
    python3 tb_analysis/tb_analysis_script.py --tb_dir runs/ex1/tensorboard --tolerance 1e-4 --skip_plot
    python3 tb_analysis/tb_analysis_script.py --plot_only --csv_dir runs/ex1/csv --plot_name again.png

Each folder with event files below --tb_dir is a run. Runs are Source (uninterrupted), Target (resumed) or
control (the Source's topology with only the order of float sums changed); ``runs.py`` tells how they are
known. Exit code: 0 every Target PASS, 1 a Target FAIL, 2 wrong usage or nothing to compare.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __package__ in (None, ""):
    # Run as a file, Python looks for imports in this folder; the package is found from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tb_analysis.arguments import parse
from tb_analysis.csv_files import csv_path, read_csv_folder, write_csv
from tb_analysis.errors import AnalysisError
from tb_analysis.event_files import find_run_folders, read_curve
from tb_analysis.report import as_json, summary, table
from tb_analysis.runs import Run, describe, group, settle_roles
from tb_analysis.verdict import Limits, judge

PASS, FAIL, USAGE = 0, 1, 2


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        runs = read_csv_folder(Path(args.csv_dir)) if args.plot_only else _runs_of_events(args)
        compared = group(settle_roles(runs), args.source)
    except AnalysisError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE

    limits = Limits(args.first_tolerance, args.tolerance, args.precision, args.last_step)
    verdict = judge(compared, limits)
    if not args.skip_csv and not args.plot_only:
        for run in compared.runs:
            write_csv(csv_path(args.csv_name, run), compared.source.curve, run.curve)
    if not args.skip_plot:
        _plot(verdict, args)
    if args.verdict_json:
        Path(args.verdict_json).write_text(json.dumps(as_json(verdict), indent=2) + "\n")
    print(table(verdict))
    if not verdict.comparisons:
        print(f"error: {summary(verdict)}. Targets are runs named target_* or resumed ones.", file=sys.stderr)
        return USAGE
    return PASS if verdict.is_pass else FAIL


def _runs_of_events(args) -> list[Run]:
    root = Path(args.tb_dir)
    return [
        describe(folder.resolve().name, read_curve(folder, args.tb_event_key), folder)
        for folder in find_run_folders(root)
    ]


def _plot(verdict, args) -> None:
    # Imported here: with --skip_plot the verdict needs no matplotlib.
    from tb_analysis.picture import Labels, draw, save, use_seaborn

    if args.use_sns and not use_seaborn():
        print("note: seaborn is not installed, drawn with matplotlib's own look (pip install seaborn)")
    figure = draw(verdict, Labels(args.plot_title, args.plot_x_label, args.plot_y_label))
    save(figure, Path(args.plot_name))


if __name__ == "__main__":
    sys.exit(main())
