"""What a save behind training costs training: how long the loop waits, and how much slower the steps beside it are.

    .venv/bin/python benchmarks/async_save.py                                # make bench
    .venv/bin/python benchmarks/async_save.py --parameters 120e6 --rounds 5 --json async_save.json

A GPT of about that many parameters trains on one rank under ZeRO-1, on all processors, and saves every --interval
steps: in one run as training waits, in another with --async-save. *Stall* is what the loop waited; *beside* is the
median of the steps between begin and durable over the median of the others; *lost* is the stall plus what those steps
took longer. The memcpy is of the bytes that are staged, into memory that was touched before, in the same process.
Machines are noisy: medians, with the least and the most.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

HIDDEN, VOCABULARY = 512, 8192


def main(argv: list[str]) -> int:
    arguments = _parse(argv)
    scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=arguments.folder))
    try:
        from harness.ranks import run_ranks
        from matrix.recording import command_line, write_dataset

        num_layers = max(1, round((arguments.parameters - VOCABULARY * HIDDEN) / (12 * HIDDEN**2)))
        flags = {"num_layers": num_layers, "hidden_size": HIDDEN, "num_attention_heads": 8, "vocab_size": VOCABULARY}
        flags |= {"seq_length": 128, "max_position_embeddings": 128, "save_interval": arguments.interval}
        data = write_dataset(scratch / "bench_text_document")
        rows = {}
        for name, is_behind in (("training waits", None), ("--async-save", True)):
            line = command_line(
                data,
                zero=1,
                iters=arguments.interval * (arguments.rounds + 1) + arguments.interval - 1,
                global_batch_size=arguments.batch,
                save=scratch / name.strip("-"),
                async_save=is_behind,
                **flags,
            )
            (rows[name],) = run_ranks(1, _measure, line, timeout=3600)
            shutil.rmtree(scratch / name.strip("-"))
        _report(rows, arguments.json)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=42e6, help="about how many (default 42e6)")
    parser.add_argument("--rounds", type=int, default=5, help="saves that count, after one that does not")
    parser.add_argument("--interval", type=int, default=12, help="steps between saves")
    parser.add_argument("--batch", type=int, default=4, help="samples of 128 tokens a step")
    parser.add_argument("--folder", default=str(ROOT), help="where the scratch folder is made (its disk is measured)")
    parser.add_argument("--json", help="write the numbers to this file too")
    return parser.parse_args(argv)


def _measure(rank: int, world_size: int, line: list[str]) -> dict[str, list[float]]:
    import os

    import torch

    from matrix.recording import build
    from megatron.training.loop import fit

    torch.set_num_threads(os.cpu_count() or 1)
    run = build(line, rank, world_size)
    begun: list[tuple[int, float]] = []
    stalls: dict[int, float] = {}
    durable: dict[int, float] = {}

    def times(iteration: int, seconds: dict[str, float]) -> None:
        if "checkpoint" in seconds:
            stalls[iteration] = seconds["checkpoint"]

    def save(iteration: int, stage: str, seconds: float) -> None:
        if stage == "staged":  # with what the next step's optimizer waited for
            stalls[iteration] = seconds
        if stage == "durable":
            durable[iteration] = seconds

    run.run_log.times, run.run_log.save = times, save
    fit(run, lambda iteration: begun.append((iteration, time.perf_counter())))
    starts = dict(begun)
    first, *counted = sorted(stalls)
    interval = run.config.checkpoint.save_interval
    counted = [iteration for iteration in counted if iteration % interval == 0]
    steps = {i: starts[i + 1] - starts[i] - stalls.get(i, 0.0) for i in starts if i + 1 in starts and i > first}
    beside = {save: _beside(save, durable, starts, stalls) for save in counted}
    quiet = statistics.median(
        seconds for i, seconds in steps.items() if not any(i in among for among in beside.values())
    )
    slower = [max(0.0, sum(steps[i] - quiet for i in among if i in steps)) for among in beside.values()]
    return {
        "stall": [stalls[save] for save in counted],
        "durable": [durable.get(save, stalls[save]) for save in counted],
        "step": [quiet],
        "beside": [
            statistics.median(steps[i] for i in among if i in steps) / quiet for among in beside.values() if among
        ],
        "lost": [stalls[save] + more for save, more in zip(counted, slower, strict=True)],
        "memcpy": _memcpy(run.live),
    }


def _beside(save: int, durable: dict[int, float], starts: dict[int, float], stalls: dict[int, float]) -> list[int]:
    """The steps that a save behind went on beside."""
    if save not in durable or save + 1 not in starts:
        return []
    ends = starts[save + 1] - stalls[save] + durable[save]
    return [i for i in sorted(starts) if i > save and i + 1 in starts and starts[i] < ends]


def _memcpy(live: object) -> list[float]:
    import torch

    from megatron.checkpoint.live_memory import LiveMemory
    from megatron.checkpoint.staging_memory import bytes_to_copy
    from megatron.checkpoint.state_digest import digest_rows

    memory = LiveMemory()
    digest_rows(live.state, memory.hold)  # type: ignore[attr-defined]
    source = torch.ones(bytes_to_copy(memory.tensors), dtype=torch.uint8)
    target, seconds = torch.ones_like(source), []
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return seconds


def _report(rows: dict[str, dict[str, list[float]]], to: str | None) -> None:
    print(f"{'':18}{'stall s':>22}{'x memcpy':>10}{'durable s':>11}{'step s':>8}{'beside':>8}{'lost s':>8}")
    for name, row in rows.items():
        stall, memcpy = row["stall"], statistics.median(row["memcpy"])
        middle = statistics.median(stall)
        shown = f"{middle:.3f} ({min(stall):.3f}-{max(stall):.3f})"
        beside = f"{statistics.median(row['beside']):.2f}" if row["beside"] else "-"
        durable, lost = (statistics.median(row[key]) for key in ("durable", "lost"))
        print(
            f"{name:18}{shown:>22}{middle / memcpy:>10.1f}{durable:>11.2f}{row['step'][0]:>8.3f}{beside:>8}{lost:>8.2f}"
        )
    if to:
        Path(to).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
