"""Conversion, side by side: ours, `cp` of the same bytes, and DeepSpeed's own converter, in one run.

    .venv/bin/python benchmarks/convert.py                      # make bench
    .venv/bin/python benchmarks/convert.py --parameters 200e6 --repeats 5

A GPT of about that many parameters is built on two data-parallel ranks under ZeRO-1 and saved natively (one rank
process each, gloo). Then, round by round, each candidate reads the save and writes its output on the same disk.
Machines are noisy: the printed ratios are medians over rounds of ours to the other within the same round.
Every output is checked: ours by `verify`, DeepSpeed's tensor by tensor against ours.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

HIDDEN = 768
VOCABULARY = 8192


def main(argv: list[str]) -> int:
    arguments = _parse(argv)
    scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=arguments.folder))
    try:
        native = _make_native(scratch, arguments.parameters)
        size = sum(path.stat().st_size for path in native.rglob("*") if path.is_file())
        print(f"native save: {size / 2**30:.2f} GiB in {native.name}, 2 ranks, ZeRO-1")
        candidates: dict[str, Callable[[Path], None]] = {
            "ours (1 worker)": lambda output: _ours(native, output, 1),
            "ours (2 workers)": lambda output: _ours(native, output, 2),
            "cp + sync": lambda output: _copy(native, output),
            "deepspeed (2 + 2 workers)": lambda output: _stock(native, output),
        }
        times = _measure(candidates, scratch, arguments.repeats)
        _check(scratch, native)
        _report(times, size)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=60e6, help="about how many (default 60e6)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count, after one that does not")
    parser.add_argument("--folder", default=str(ROOT), help="where the scratch folder is made (its disk is measured)")
    return parser.parse_args(argv)


def _make_native(scratch: Path, parameters: float) -> Path:
    from harness.ranks import run_ranks
    from matrix.recording import command_line, train, write_dataset

    data = write_dataset(scratch / "bench_text_document")
    num_layers = max(1, round((parameters - VOCABULARY * HIDDEN) / (12 * HIDDEN**2)))
    argv = command_line(
        data, zero=1, iters=1, save=scratch, save_interval=1, num_layers=num_layers, hidden_size=HIDDEN,
        num_attention_heads=12, vocab_size=VOCABULARY,
    )  # fmt: skip
    run_ranks(2, train, argv, timeout=900)
    return scratch / "global_step1"


def _run(*command: str) -> None:
    """A whole process, as a user starts it; its imports count."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _ours(native: Path, output: Path, num_workers: int) -> None:
    script = str(ROOT / "tools/ds_to_universal.py")
    _run(sys.executable, script, "--input_folder", str(native), "--output_folder", str(output), "--num_workers",
         str(num_workers))  # fmt: skip


def _copy(native: Path, output: Path) -> None:
    _run("cp", "-r", str(native), str(output))
    _run("sync", "-f", str(output))


def _stock(native: Path, output: Path) -> None:
    _run(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(native),
         "--output_folder", str(output), "--num_extract_workers", "2", "--num_merge_workers", "2")  # fmt: skip


def _measure(candidates: dict[str, Callable[[Path], None]], scratch: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds by candidate, round after round; the outputs of the last round stay."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for index, (name, run) in enumerate(candidates.items()):
            output = scratch / f"out{index}" / "global_step1_universal"
            shutil.rmtree(output.parent, ignore_errors=True)
            output.parent.mkdir()
            started = time.perf_counter()
            run(output)
            if turn:
                times[name].append(time.perf_counter() - started)
    return times


def _check(scratch: Path, native: Path) -> None:
    import torch

    from megatron.ucp.safe_load import load
    from megatron.ucp.verify import verify

    ours, stock = (scratch / f"out{index}" / "global_step1_universal" for index in (0, 3))
    if not verify(ours).is_sound:
        raise RuntimeError(f"our output is not sound: {verify(ours)}")
    for name in json.loads((ours / "ucp.json").read_text())["parameters"]:
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            first, second = (load(folder / "zero" / name / f"{state}.pt")["param"] for folder in (ours, stock))
            if not torch.equal(first, second):
                raise RuntimeError(f"{name} {state}: ours and DeepSpeed's differ")


def _report(times: dict[str, list[float]], size: int) -> None:
    print(f"{'':28}{'min s':>8}{'median':>8}{'max':>8}{'GiB/s':>8}{'x ours':>8}")
    ours = times["ours (2 workers)"]
    for name, seconds in times.items():
        median = statistics.median(seconds)
        ratio = statistics.median(other / mine for other, mine in zip(seconds, ours, strict=True))
        print(f"{name:28}{min(seconds):8.2f}{median:8.2f}{max(seconds):8.2f}{size / 2**30 / median:8.2f}{ratio:8.2f}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
