"""How long a job stands when it loses a rank, an agent, or is joined by one.

    .venv/bin/python benchmarks/recovery.py                       # make bench
    .venv/bin/python benchmarks/recovery.py --rounds 5 --json recovery.json

Four agents of one rank each train a small GPT (tp2 dp2 of four ranks, dp3 of three) with a store beside them. *Again*:
from the event to the first line of an iteration after it. *Back*: iterations that are trained a second time. An agent
that is killed takes its rank along; the others learn of it by the broken connection, and wait for the agent's seat to
become free. Not shown: several machines, a GPU. Machines are noisy: medians, with the least and the most.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

EVENTS = ("a rank is killed", "an agent is killed", "an agent comes")


def main(argv: list[str]) -> int:
    arguments = _parse(argv)
    from elastic.job import ElasticJob

    from matrix.recording import command_line, write_dataset

    seconds: dict[str, list[float]] = {event: [] for event in EVENTS}
    back: dict[str, list[int]] = {event: [] for event in EVENTS}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.folder) as folder:
        data = write_dataset(Path(folder) / "bench_text_document")
        flags = command_line(
            data, tp=2, zero=1, micro_batch=2, iters=10**6, global_batch_size=12, hidden_size=64, log_interval=1,
            save=Path(folder) / "save", save_interval=20, keep_last=3,
        )  # fmt: skip
        job = ElasticJob(Path(folder), "1:4", flags)
        try:
            for _ in range(4):
                job.add()
            job.until(lambda: job.newest_iteration() >= 30)
            for _ in range(arguments.rounds):
                alive = [agent for agent in job.agents if agent.poll() is None]
                events: list[Callable[[], object]] = [job.ranks_of(alive[-1])[0].kill, alive[-1].kill, job.add]
                for name, event in zip(EVENTS, events, strict=True):
                    took, lost = _measured(job, event)
                    seconds[name].append(took)
                    back[name].append(lost)
                    print(f"{name:20} again after {took:5.1f} s, {lost} iterations back", flush=True)
                    at = job.newest_iteration()
                    job.until(lambda at=at: job.newest_iteration() >= at + 25)
        finally:
            job.close()
    print(f"\n{'':20} {'again s':>8} {'least':>6} {'most':>6} {'back, most':>11}")
    for name in EVENTS:
        each = seconds[name]
        print(f"{name:20} {statistics.median(each):8.1f} {min(each):6.1f} {max(each):6.1f} {max(back[name]):11}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"seconds": seconds, "back": back}, indent=1) + "\n")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of the three events")
    parser.add_argument("--folder", help="where the scratch folder is made")
    parser.add_argument("--json", help="write the numbers to this file too")
    return parser.parse_args(argv)


def _measured(job, event: Callable[[], object]) -> tuple[float, int]:
    """(seconds until an iteration after the event is told, iterations that were lost)."""
    starts = job.text().count("elastic: ")
    started = time.monotonic()
    event()
    job.until(lambda: job.text().count("elastic: ") > starts)
    reached = job.newest_iteration()
    while not (told := _after_last_start(job)):
        time.sleep(0.02)
    return time.monotonic() - started, max(0, reached - (told - 1))


def _after_last_start(job) -> int | None:
    """The first iteration that the newest set of ranks has told of."""
    parts = [part for log in sorted(job.folder.glob("agent*.log")) for part in _parts(log.read_text(errors="replace"))]
    newest = max(parts, key=lambda part: part[0])[1]
    step = re.search(r"\] iteration +(\d+)/", newest)
    return int(step[1]) if step else None


def _parts(text: str) -> list[tuple[str, str]]:
    """(time of its first line with one, text) of each set of ranks whose rank 0 this agent had."""
    parts = []
    for part in text.split("elastic: ")[1:]:
        clock = re.search(r"^\[(\d\d:\d\d:\d\d)\]", part, re.MULTILINE)
        parts.append((clock[1] if clock else "99", part))
    return parts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
