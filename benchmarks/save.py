"""A save, side by side: ours, and DeepSpeed's save_checkpoint with every file flushed to the disk, in one run.

    .venv/bin/python benchmarks/save.py                                  # make bench
    .venv/bin/python benchmarks/save.py --parameters 120e6 --repeats 7 --json save.json

A GPT of about that many parameters is built on two data-parallel ranks under ZeRO-1 (a process each, gloo), trained for
a step, and saved by each in turn, round by round, into fresh folders. Ours also digests the state, checksums the files
and proves copies equal. Machines are noisy: the ratios are medians of those within a round. Seconds are those of the
slowest rank; CPU seconds those of all ranks. The last saves are held against each other tensor by tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

HIDDEN, VOCABULARY, NUM_RANKS = 512, 8192, 2
Times = dict[str, list[tuple[float, float]]]
"""Seconds and CPU seconds by candidate, round after round."""


def main(argv: list[str]) -> int:
    arguments = _parse(argv)
    scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=arguments.folder))
    try:
        from harness.ranks import run_ranks
        from matrix.recording import command_line, write_dataset

        num_layers = max(1, round((arguments.parameters - VOCABULARY * HIDDEN) / (12 * HIDDEN**2)))
        flags = {"num_layers": num_layers, "hidden_size": HIDDEN, "num_attention_heads": 8, "vocab_size": VOCABULARY}
        data = write_dataset(scratch / "bench_text_document")
        line = command_line(data, zero=1, iters=1, **flags)
        by_rank = run_ranks(NUM_RANKS, _measure, line, str(scratch), arguments.repeats, timeout=1800)
        _require_equal(scratch / "stock/last", scratch / "ours/global_step1")
        size = sum(path.stat().st_size for path in (scratch / "ours/global_step1").rglob("*"))
        _report(by_rank, size, arguments.json)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=42e6, help="about how many (default 42e6)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count, after one that does not")
    parser.add_argument("--folder", default=str(ROOT), help="where the scratch folder is made (its disk is measured)")
    parser.add_argument("--json", help="write the numbers to this file too")
    return parser.parse_args(argv)


def _measure(rank: int, world_size: int, line: list[str], scratch: str, repeats: int) -> Times:
    import torch.distributed as dist

    from matrix.recording import build
    from megatron.checkpoint.saving import save
    from megatron.training.loop import fit

    run = build(line, rank, world_size)
    fit(run)
    engine, folder = run.live.engine, Path(scratch)

    def stock() -> None:
        engine.save_checkpoint(str(folder / "stock"), tag="last", save_latest=False)
        for path in sorted((folder / "stock/last").iterdir())[rank::world_size]:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        dist.barrier()

    candidates: dict[str, Callable[[], object]] = {
        "deepspeed + fsync": stock,
        "ours": lambda: save(run.live, folder / "ours", run.progress),
    }
    times: Times = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, candidate in candidates.items():
            if rank == 0:
                shutil.rmtree(folder / name.split()[0].replace("deepspeed", "stock"), ignore_errors=True)
                os.sync()
            dist.barrier()
            started, cpu = time.perf_counter(), time.process_time()
            candidate()
            dist.barrier()
            if turn:
                times[name].append((time.perf_counter() - started, time.process_time() - cpu))
    return times


def _require_equal(stock: Path, ours: Path) -> None:
    import torch

    from megatron.ucp.safe_load import load

    names = {path.name for path in stock.glob("*.pt")}
    if names != {path.name for path in ours.glob("*.pt")}:
        raise RuntimeError(f"other files: {names}")
    for name in sorted(names):
        first, second = (load(folder / name) for folder in (stock, ours))
        pairs = list(zip(_tensors(first), _tensors(second), strict=True))
        if not all(torch.equal(one, other) for one, other in pairs):
            raise RuntimeError(f"{name}: ours and DeepSpeed's differ")


def _tensors(value: object) -> list:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in inside for tensor in _tensors(part)]


def _report(by_rank: list[Times], size: int, to: str | None) -> None:
    rows = {}
    for name in by_rank[0]:
        rounds = list(zip(*(times[name] for times in by_rank), strict=True))
        rows[name] = {
            "seconds": [max(seconds for seconds, _ in of_round) for of_round in rounds],
            "cpu_seconds": [sum(cpu for _, cpu in of_round) for of_round in rounds],
        }
    stock = rows["deepspeed + fsync"]["seconds"]
    print(f"{size / 2**30:.2f} GiB from {NUM_RANKS} ranks, ZeRO-1")
    print(f"{'':20}{'min s':>8}{'median':>8}{'max':>8}{'CPU s':>8}{'x stock':>9}")
    for name, row in rows.items():
        seconds, cpu = row["seconds"], statistics.median(row["cpu_seconds"])
        ratio = statistics.median(mine / other for mine, other in zip(seconds, stock, strict=True))
        row["ratio_to_stock"] = ratio
        print(f"{name:20}{min(seconds):8.2f}{statistics.median(seconds):8.2f}{max(seconds):8.2f}{cpu:8.2f}{ratio:9.2f}")
    if to:
        Path(to).write_text(json.dumps({"bytes": size, "candidates": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
