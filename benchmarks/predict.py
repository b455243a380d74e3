"""What `ucp plan --bandwidth measured` tells of this machine, beside what then happens: a save, a conversion, a resume.

    .venv/bin/python benchmarks/predict.py                                  # make bench
    .venv/bin/python benchmarks/predict.py --parameters 42e6 120e6 200e6 --repeats 5 --json predict.json

A GPT of about that many parameters on two data-parallel ranks under ZeRO-1 (a process each, gloo), resumed on two
tensor-parallel ones. Round by round: the prediction, with the seconds that it takes; a save into a fresh folder; a
resume from it, or a conversion of it (`ucp convert`, two workers, its start counted) and a resume from that, in turns;
of what is read for a resume the page cache has let go, and nobody has read it since it was written. Save and resume are
counted as the log tells them, without starting processes and building the model. Machines are noisy, so that every
round has its own prediction.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

HIDDEN, VOCABULARY, NUM_RANKS = 768, 8192, 2
STEPS = ("save", "convert", "load, direct", "load, universal")
QUIET_SECONDS = 6
"""ext4 passes over the numbers of files that were removed in the last five, which makes new ones dear."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, nargs="+", default=[42e6], help="about how many (default 42e6)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--folder", default=str(ROOT), help="where the scratch folder is made (its disk is measured)")
    parser.add_argument("--json", help="write the numbers to this file too")
    arguments = parser.parse_args(argv)
    rows: dict[str, list[dict[str, list[float]]]] = {}
    for parameters in arguments.parameters:
        scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=arguments.folder))
        try:
            rows[f"{parameters / 1e6:.0f} M"] = _rounds(scratch, parameters, arguments.repeats)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        _report(f"{parameters / 1e6:.0f} M", rows[f"{parameters / 1e6:.0f} M"])
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1))
    return 0


def _rounds(scratch: Path, parameters: float, repeats: int) -> list[dict[str, list[float]]]:
    """By round and step: predicted and measured seconds."""
    from harness.ranks import run_ranks
    from matrix.recording import command_line, write_dataset

    data = write_dataset(scratch / "bench_text_document")
    num_layers = max(1, round((parameters - VOCABULARY * HIDDEN) / (12 * HIDDEN**2)))
    model = {"num_layers": num_layers, "hidden_size": HIDDEN, "num_attention_heads": 12, "vocab_size": VOCABULARY}
    rounds = []
    # The first plan has no checkpoint to ask about; it is saved outside the rounds.
    first = command_line(data, zero=1, iters=1, save=scratch / "first", save_interval=1, **model)
    run_ranks(NUM_RANKS, _save, first, timeout=1800)
    for turn in range(repeats):
        for name in ("run", "out"):
            shutil.rmtree(scratch / name, ignore_errors=True)
        os.sync()
        time.sleep(QUIET_SECONDS)
        native, universal = scratch / "run/global_step1", scratch / "out/global_step1_universal"
        predicted = _predicted(scratch / "first/global_step1")
        saving = command_line(data, zero=1, iters=1, save=scratch / "run", save_interval=1, **model)
        measured = {"save": max(run_ranks(NUM_RANKS, _save, saving, timeout=1800))}
        source = native
        if turn % 2:
            universal.parent.mkdir()
            started = time.perf_counter()
            _ucp("convert", str(native), str(universal), "--num_workers", str(NUM_RANKS))
            measured["convert"] = time.perf_counter() - started
            source = universal
        _let_go(source)
        loading = command_line(data, tp=NUM_RANKS, zero=1, iters=1, **model)
        kind = "universal" if source == universal else "direct"
        measured[f"load, {kind}"] = max(run_ranks(NUM_RANKS, _load, loading, str(source), timeout=1800))
        rounds.append({step: [predicted[step.split(",")[0]], seconds] for step, seconds in measured.items()})
    return rounds


def _predicted(folder: Path) -> dict[str, float]:
    told = _ucp("plan", str(folder), "--tp", str(NUM_RANKS), "--bandwidth", "measured", "--json")
    return json.loads(told)["predicted_seconds"]


def _ucp(*arguments: str) -> str:
    command = [sys.executable, "-m", "megatron.ucp", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def _save(rank: int, world_size: int, line: list[str]) -> float:
    from matrix.recording import build
    from megatron.training.loop import fit

    told = _listen("megatron.checkpoint.saving")
    fit(build(line, rank, world_size))
    return told[-1]


def _load(rank: int, world_size: int, line: list[str], source: str) -> float:
    from matrix.recording import build
    from megatron.checkpoint.loading import load
    from megatron.checkpoint.resume import ResumePlan, open_planned

    told = _listen("megatron.checkpoint.loading")
    kind = "universal" if source.endswith("universal") else "direct"
    load(build(line, rank, world_size).live, open_planned(ResumePlan(kind, Path(source), "")))
    return told[-1]


def _listen(logger: str) -> list[float]:
    """Seconds of each save or load that it tells from here on."""
    seconds: list[float] = []
    handler = logging.Handler()
    handler.emit = lambda record: seconds.extend(
        float(found[1]) for found in [re.search(r" in ([0-9.]+) s", record.getMessage())] if found
    )
    logging.getLogger(logger).setLevel(logging.INFO)
    logging.getLogger(logger).addHandler(handler)
    return seconds


def _let_go(folder: Path) -> None:
    """The page cache drops its files."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def _report(name: str, rounds: list[dict[str, list[float]]]) -> None:
    print(f"{name:18}{'predicted s':>12}{'measured':>10}{'measured / predicted: median, min, max':>42}")
    for step in STEPS:
        pairs = [of_round[step] for of_round in rounds if step in of_round]
        if not pairs:
            continue
        predicted, measured = zip(*pairs, strict=True)
        ratios = [took / told for told, took in pairs]
        medians = f"{statistics.median(predicted):12.2f}{statistics.median(measured):10.2f}"
        print(f"  {step:16}{medians}{statistics.median(ratios):26.2f}{min(ratios):8.2f}{max(ratios):8.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
