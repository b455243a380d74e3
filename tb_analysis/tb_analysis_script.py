#!/usr/bin/env python3
"""Say by a number and a picture whether resumed training goes on as the uninterrupted run did.

    python3 tb_analysis/tb_analysis_script.py --tb_dir runs/ex1/tensorboard --plot_name ucp_training_loss.png
    python3 tb_analysis/tb_analysis_script.py --tb_dir runs/ex1/tensorboard --tolerance 1e-4 --skip_plot
    python3 tb_analysis/tb_analysis_script.py --plot_only --csv_dir runs/ex1/csv --plot_name again.png
    python3 tb_analysis/tb_analysis_script.py --tb_dir runs/fig7/7b/*/tensorboard --grad_norm_tolerance 1e-4 \\
        --log_dir ../logs --markdown fig7b.md

Each folder with event files below --tb_dir is a run. Runs are Source (uninterrupted), Target (resumed) or
control (the Source's topology with only the order of float sums changed); ``runs.py`` tells how they are
known. Exit code: 0 every Target PASS, 1 a Target FAIL, 2 wrong usage or nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):
    # Run as a file, Python looks for imports in this folder; the package is found from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tb_analysis.arguments import GRAD_NORM_KEY, parse
from tb_analysis.csv_files import csv_path, read_csv_folder, write_csv
from tb_analysis.errors import AnalysisError
from tb_analysis.event_files import find_run_folders, read_curve
from tb_analysis.logs import read_digests
from tb_analysis.report import as_json, markdown, summary, table
from tb_analysis.runs import Group, Run, describe, group, settle_roles
from tb_analysis.verdict import Limits, Verdict, judge

PASS, FAIL, USAGE = 0, 1, 2


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.plot_only:
            groups = [group(settle_roles(read_csv_folder(Path(args.csv_dir))), args.source)]
        else:
            groups = [group(settle_roles(_runs_of_events(Path(d), args)), args.source) for d in args.tb_dir]
        csv_files = _csv_files(groups, args)
    except AnalysisError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE

    with_digests = args.log_dir is not None
    limits = Limits(
        args.first_tolerance, args.tolerance, args.precision, args.last_step, args.grad_norm_tolerance, with_digests
    )
    verdicts = [judge(compared, limits) for compared in groups]
    for path, (source, run) in csv_files.items():
        write_csv(path, source.curve, run.curve)
    if not args.skip_plot:
        _plot(verdicts, args)
    if args.verdict_json:
        Path(args.verdict_json).write_text(json.dumps(as_json(verdicts), indent=2) + "\n")
    if args.markdown:
        Path(args.markdown).write_text(markdown(verdicts, args.plot_title, None if args.skip_plot else args.plot_name))
    print(table(verdicts))
    if not all(verdict.comparisons for verdict in verdicts):
        print(f"error: {summary(verdicts)}. Targets are runs named target_* or resumed ones.", file=sys.stderr)
        return USAGE
    return PASS if all(verdict.is_pass for verdict in verdicts) else FAIL


def _runs_of_events(tb_dir: Path, args: argparse.Namespace) -> list[Run]:
    runs = []
    for folder in find_run_folders(tb_dir):
        run = describe(folder.resolve().name, read_curve(folder, args.tb_event_key), folder)
        if args.grad_norm_tolerance is not None:
            run = replace(run, grad_norm=read_curve(folder, GRAD_NORM_KEY))
        if args.log_dir is not None:
            run = replace(run, digests=read_digests(tb_dir / args.log_dir / f"{run.name}.log"))
        runs.append(run)
    return runs


def _csv_files(groups: list[Group], args: argparse.Namespace) -> dict[Path, tuple[Run, Run]]:
    """Which file is written of which (Source, run). Raises AnalysisError if two runs would share one."""
    files: dict[Path, tuple[Run, Run]] = {}
    if args.skip_csv or args.plot_only:
        return files
    for compared in groups:
        for run in compared.runs:
            path = csv_path(args.csv_name, run)
            if path in files:
                raise AnalysisError(f"two runs named {run.name}: both would be {path}. Rename a folder, or --skip_csv.")
            files[path] = (compared.source, run)
    return files


def _plot(verdicts: list[Verdict], args: argparse.Namespace) -> None:
    # Imported here: with --skip_plot the verdict needs no matplotlib.
    from tb_analysis.lanes import draw_lanes
    from tb_analysis.picture import MAX_TARGETS, Labels, draw, save, use_seaborn

    if args.use_sns and not use_seaborn():
        print("note: seaborn is not installed, drawn with matplotlib's own look (pip install seaborn)")
    labels = Labels(args.plot_title, args.plot_x_label, args.plot_y_label)
    if len(verdicts) == 1 and len(verdicts[0].comparisons) <= MAX_TARGETS and not args.lanes:
        figure = draw(verdicts[0], labels)
    else:
        figure = draw_lanes(verdicts, labels)
    save(figure, Path(args.plot_name))


if __name__ == "__main__":
    sys.exit(main())
