"""The flags of tb_analysis_script.py: upstream's names and defaults, then those of the verdict.

args = parse(["--tb_dir", "runs/ex1/tensorboard", "--skip_csv"])
"""

from __future__ import annotations

import argparse

from tb_analysis.verdict import FIRST_TOLERANCE, TOLERANCE

GRAD_NORM_KEY = "grad-norm/grad-norm"
ANALYZERS = ("universal_checkpointing",)

EXIT_CODES = "exit codes: 0 every Target PASS, 1 a Target FAIL, 2 wrong usage or nothing to compare"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tb_analysis_script.py",
        description="Compare the curves of resumed runs (Targets) with the uninterrupted one (Source).",
        epilog=EXIT_CODES,
    )
    upstream = parser.add_argument_group("what to read and write (as upstream)")
    upstream.add_argument(
        "--tb_dir",
        default=["."],
        nargs="+",
        help="folder searched for event files, at any depth (.); several: each holds a Source and its Targets",
    )
    upstream.add_argument("--tb_event_key", default="lm-loss-training/lm loss", help="scalar (%(default)s)")
    upstream.add_argument("--analyzer", default=ANALYZERS[0], choices=ANALYZERS)
    upstream.add_argument("--plot_name", default="uni_ckpt_char.png", help="picture (%(default)s)")
    upstream.add_argument("--plot_title", default="", help="default: made from the topologies")
    upstream.add_argument("--plot_x_label", default="Training step")
    upstream.add_argument("--plot_y_label", default="LM loss")
    upstream.add_argument("--skip_plot", action="store_true")
    upstream.add_argument("--lanes", action="store_true", help="a lane for each Target, however few there are")
    upstream.add_argument("--use_sns", action="store_true", help="seaborn's look, if it is installed")
    upstream.add_argument("--skip_csv", action="store_true")
    upstream.add_argument("--csv_name", default="", help="put before each CSV file's name; may hold a folder")
    upstream.add_argument("--plot_only", action="store_true", help="read CSV files, not events")
    upstream.add_argument("--csv_dir", default=".", help="folder of the CSV files for --plot_only (.)")

    verdict = parser.add_argument_group("the verdict")
    verdict.add_argument(
        "--tolerance",
        type=_positive,
        help="bound of max |delta|; default: twice a control run's, else by precision "
        + ", ".join(f"{k} {v:g}" for k, v in TOLERANCE.items()),
    )
    verdict.add_argument(
        "--first_tolerance",
        type=_positive,
        help="bound of |delta| at the first common step; default by precision "
        + ", ".join(f"{k} {v:g}" for k, v in FIRST_TOLERANCE.items()),
    )
    verdict.add_argument("--precision", choices=tuple(TOLERANCE), help="default: by run.json, else fp32")
    verdict.add_argument("--source", help="folder name of the Source, if several runs could be it")
    verdict.add_argument("--last_step", type=int, help="judge up to this step; default: the Source's last")
    verdict.add_argument(
        "--grad_norm_tolerance", type=_positive, help=f"judge {GRAD_NORM_KEY!r} as well: bound of its relative distance"
    )
    verdict.add_argument(
        "--log_dir",
        help="judge state digests as well: folder of the runs' logs <run>.log, seen from each --tb_dir (../logs)",
    )
    verdict.add_argument("--markdown", help="write the verdict as a Markdown page to this file")
    verdict.add_argument("--verdict_json", help="write the numbers of the verdict to this file")
    return parser.parse_args(argv)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not greater than 0")
    return value
