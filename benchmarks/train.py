"""Training, side by side: ours, Hugging Face's Trainer, a plain PyTorch loop and torch's FSDP2, in one run.

    .venv/bin/python benchmarks/train.py                                  # make bench
    .venv/bin/python benchmarks/train.py --size 125m --rounds 5 --json train.json
    .venv/bin/python benchmarks/train.py --candidates "plain loop" "ours, ZeRO-1" "HF Trainer"

One GPT, the same first weights, batches, precision and number of threads for each; they stay alive and take turns of a
few steps, in another order each round, so that what the machine does besides hits all of them. Numbers are medians
over rounds, ratios are taken within a round: CPU seconds a step of all ranks, over the plain loop's (another process's
load moves them less than it moves the wall's). Losses must agree step by step, or nothing is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks/train_candidates.py"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from train_candidates import CANDIDATES, Task  # noqa: E402 (the folder is on the path only now)

SIZES = {
    "5m": {"layers": 5, "hidden": 256, "heads": 4, "vocabulary": 4096, "sequence": 256, "batch": 4},
    "23m": {"layers": 6, "hidden": 512, "heads": 8, "vocabulary": 8192, "sequence": 256, "batch": 4},
    "125m": {"layers": 12, "hidden": 768, "heads": 12, "vocabulary": 50304, "sequence": 256, "batch": 4},
}
YARDSTICK = "plain loop"
LARGEST_DIFFERENCE = {"fp32": 2e-4, "bf16": 5e-2}
"""Between two losses of the same step: rounding, with the learning rate of the benchmark and so few steps."""


class DifferentTrainingError(RuntimeError):
    """Two candidates did not train the same: their times say nothing about each other."""


class Ranks:
    """The processes of one candidate."""

    def __init__(self, task: Task, threads: int) -> None:
        self.task, port = task, _free_port()
        self.log = Path(task.scratch) / f"{task.candidate}.log"
        with self.log.open("w") as log:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, SCRIPT, replace(task, rank=rank, port=port).to_json()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=_environment(threads),
                )
                for rank in range(CANDIDATES[task.candidate].ranks)
            ]
        self._answers()

    def turn(self) -> dict:
        for process in self.processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = self._answers()
        losses = answers[0]["losses"]
        seconds = max(answer["seconds"] for answer in answers)
        return {"seconds": seconds, "cpu": sum(answer["cpu"] for answer in answers), "losses": losses}

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def _answers(self) -> list[dict]:
        lines = [process.stdout.readline() for process in self.processes]
        if not all(lines):
            raise RuntimeError(f"{self.task.candidate} ended:\n{self.log.read_text()[-4000:]}")
        return [json.loads(line) for line in lines]


def main(argv: list[str]) -> int:
    arguments = _parse(argv)
    names = [name for name in arguments.candidates if name != YARDSTICK]
    rows: dict[str, dict] = {}
    scratch = tempfile.mkdtemp(prefix="bench-")
    try:
        in_all = (arguments.rounds + 1) * arguments.steps
        size = SIZES[arguments.size]
        task = Task(
            YARDSTICK, 0, 0, scratch, **size, precision=arguments.precision, steps=in_all, in_a_turn=arguments.steps
        )
        _prepare(task)
        # Those of one rank and those of two apart: not all fit into memory at once.
        for ranks in (1, 2):
            group = [name for name in names if CANDIDATES[name].ranks == ranks]
            if group or ranks == 1:
                measured = _measure([YARDSTICK, *group], task, arguments)
                # The yardstick runs beside both: each is held against the turns that it had beside them.
                rows |= {f"{name} (again)" if name in rows else name: row for name, row in measured.items()}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _report(rows, arguments)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="23m", help="parameters (default 23m)")
    parser.add_argument("--rounds", type=int, default=5, help="that count, after one that does not")
    parser.add_argument("--steps", type=int, default=4, help="in a turn")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--precision", choices=LARGEST_DIFFERENCE, default="fp32")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), metavar="NAME",
                        help="of: " + "; ".join(CANDIDATES))  # fmt: skip
    parser.add_argument("--json", help="write the numbers to this file too")
    return parser.parse_args(argv)


def _prepare(task: Task) -> None:
    """The data set, and what the others are given of it and of ours: weights.pt and batches.pt."""
    import numpy as np

    from megatron.data.indexed_dataset import IndexedDatasetWriter

    generator = np.random.default_rng(0)
    num_tokens = (task.steps + 2) * task.batch * (task.sequence + 1)
    with IndexedDatasetWriter(Path(task.scratch) / "text", dtype=np.uint16) as writer:
        writer.add_document([*generator.integers(task.vocabulary - 1, size=num_tokens).tolist(), task.vocabulary - 1])
    of_ours = replace(task, candidate="ours, ZeRO-0")
    subprocess.run([sys.executable, SCRIPT, of_ours.to_json(), "prepare"], env=_environment(1), check=True)


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}


def _measure(names: list[str], task: Task, arguments: argparse.Namespace) -> dict[str, dict]:
    started: list[Ranks] = []
    order = random.Random(0)
    turns: dict[str, list[dict]] = {name: [] for name in names}
    try:
        started += [Ranks(replace(task, candidate=name), arguments.threads) for name in names]
        for turn in range(arguments.rounds + 1):
            for ranks in order.sample(started, len(started)):
                turns[ranks.task.candidate].append(ranks.turn())
            _require_equal(turns, turn, LARGEST_DIFFERENCE[arguments.precision])
            if sys.stderr.isatty():
                print(f"round {turn} of {arguments.rounds}", end="\r", file=sys.stderr)
    finally:
        for ranks in started:
            ranks.end()
    rows = {}
    for name, all_turns in turns.items():
        counted = all_turns[1:]
        cpu = [turn["cpu"] / arguments.steps for turn in counted]
        yardstick = [turn["cpu"] / arguments.steps for turn in turns[YARDSTICK][1:]]
        rows[name] = {
            "cpu_seconds_a_step": cpu,
            "seconds_a_step": [turn["seconds"] / arguments.steps for turn in counted],
            "ratios": [mine / plain for mine, plain in zip(cpu, yardstick, strict=True)],
            "last_loss": all_turns[-1]["losses"][-1],
        }
    return rows


def _require_equal(turns: dict[str, list[dict]], turn: int, largest: float) -> None:
    expected = turns[YARDSTICK][turn]["losses"]
    for name, of_one in turns.items():
        losses = of_one[turn]["losses"]
        if len(losses) != len(expected) or max(abs(a - b) for a, b in zip(losses, expected, strict=True)) > largest:
            raise DifferentTrainingError(f"round {turn}: {name} had losses {losses}, the {YARDSTICK} {expected}")


def _report(rows: dict[str, dict], arguments: argparse.Namespace) -> None:
    size = SIZES[arguments.size]
    tokens = size["batch"] * size["sequence"]
    print(f"{arguments.size}, {arguments.precision}, {tokens} tokens a step, {arguments.threads} thread(s) a process")
    print(f"{'':22}{'tokens/s':>9}{'CPU s a step':>14}{'x plain':>9}{'min':>7}{'max':>7}{'last loss':>12}")
    for name, row in rows.items():
        ratios = row["ratios"]
        print(
            f"{name:22}{tokens / statistics.median(row['seconds_a_step']):9,.0f}"
            f"{statistics.median(row['cpu_seconds_a_step']):14.3f}{statistics.median(ratios):9.3f}"
            f"{min(ratios):7.3f}{max(ratios):7.3f}{row['last_loss']:12.6f}"
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), "candidates": rows}, indent=1))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
