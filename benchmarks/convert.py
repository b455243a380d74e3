"""Conversion, side by side: ours, `cp` of the same bytes, and DeepSpeed's own converter, in one run.

    .venv/bin/python benchmarks/convert.py                      # make bench
    .venv/bin/python benchmarks/convert.py --parameters 200e6 --repeats 5 --json convert.json

A GPT of about that many parameters is built on two data-parallel ranks under ZeRO-1 and saved natively (one rank
process each, gloo). Then, round by round, each candidate reads the save and writes its output on the same disk, as a
process of its own, its start counted. Before each, outputs of the round before are gone and the disk is quiet for six
seconds: ext4 passes over the numbers of files that were removed in the last five, which makes new ones dear.

Machines are noisy: the printed ratios are medians over rounds of ours to the other within the same round. Memory is the
most that a candidate's processes held at once, looked at fifty times a second: anonymous, which is theirs, and mapped
pages of files, which the kernel may take back. Every output is checked: ours by `verify`, DeepSpeed's tensor by tensor
against ours.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

HIDDEN = 768
VOCABULARY = 8192
OURS, STOCK = "ours (2 workers)", "deepspeed (2 + 2 workers)"
QUIET_SECONDS = 6
BLOCK_BYTES = 512
"""Of getrusage's counts."""

Commands = list[list[str]]


def main(argv: list[str]) -> int:
    arguments = _parse(argv)
    scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=arguments.folder))
    try:
        native = _make_native(scratch, arguments.parameters)
        size = sum(path.stat().st_size for path in native.rglob("*") if path.is_file())
        print(f"native save: {size / 2**30:.2f} GiB in {native.name}, 2 ranks, ZeRO-1")
        candidates: dict[str, Callable[[Path], Commands]] = {
            "ours (1 worker)": lambda output: _ours(native, output, 1),
            OURS: lambda output: _ours(native, output, 2),
            "cp + sync": lambda output: _copy(native, output),
            **({} if arguments.without_stock else {STOCK: lambda output: _stock(native, output)}),
        }
        samples = _measure(candidates, scratch, arguments.repeats)
        written = _check(scratch, list(candidates))
        _report(samples, size, written, arguments.json)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=60e6, help="about how many (default 60e6)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count, after one that does not")
    parser.add_argument("--folder", default=str(ROOT), help="where the scratch folder is made (its disk is measured)")
    parser.add_argument("--without_stock", action="store_true", help="leave DeepSpeed's converter out")
    parser.add_argument("--json", help="write the numbers to this file too")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Sample:
    """Of one run of one candidate, all its processes together."""

    seconds: float
    cpu_seconds: float
    anonymous_bytes: int
    mapped_bytes: int
    disk_read_bytes: int
    """From the device; what lay in the page cache is not among it."""
    disk_written_bytes: int


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


def _ours(native: Path, output: Path, num_workers: int) -> Commands:
    script = str(ROOT / "tools/ds_to_universal.py")
    folders = "--input_folder", str(native), "--output_folder", str(output)
    return [[sys.executable, script, *folders, "--num_workers", str(num_workers)]]


def _copy(native: Path, output: Path) -> Commands:
    return [["cp", "-r", str(native), str(output)], ["sync", "-f", str(output)]]


def _stock(native: Path, output: Path) -> Commands:
    folders = "--input_folder", str(native), "--output_folder", str(output)
    workers = "--num_extract_workers", "2", "--num_merge_workers", "2"
    return [[sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *folders, *workers]]


def _measure(candidates: dict[str, Callable[[Path], Commands]], scratch: Path, repeats: int) -> dict[str, list[Sample]]:
    """By candidate, round after round; the outputs of the last round stay."""
    samples: dict[str, list[Sample]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for index in range(len(candidates)):
            shutil.rmtree(scratch / f"out{index}", ignore_errors=True)
        for index, (name, commands) in enumerate(candidates.items()):
            output = scratch / f"out{index}" / "global_step1_universal"
            output.parent.mkdir()
            os.sync()
            time.sleep(QUIET_SECONDS)
            sample = _run(commands(output))
            if turn:
                samples[name].append(sample)
    return samples


def _run(commands: Commands) -> Sample:
    """Whole processes, as a user starts them; their imports count."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    anonymous = mapped = 0
    for command in commands:
        with tempfile.TemporaryFile("w+") as told:
            process = subprocess.Popen(command, stdout=told, stderr=told, env=environment)
            while process.poll() is None:
                now = _memory(process.pid)
                anonymous, mapped = max(anonymous, now[0]), max(mapped, now[1])
                time.sleep(0.02)
            if process.returncode:
                told.seek(0)
                raise RuntimeError(f"{' '.join(command)} failed:\n{told.read()[-4000:]}")
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    blocks = after.ru_inblock - before.ru_inblock, after.ru_oublock - before.ru_oublock
    return Sample(seconds, cpu, anonymous, mapped, blocks[0] * BLOCK_BYTES, blocks[1] * BLOCK_BYTES)


def _memory(pid: int) -> tuple[int, int]:
    """(anonymous, mapped) bytes of a process and its children."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, ValueError):  # it has just ended
        return 0, 0
    own = [1024 * int(fields.get(name, "0").split()[0]) for name in ("RssAnon", "RssFile")]
    for child in children:
        own = [a + b for a, b in zip(own, _memory(int(child)), strict=True)]
    return own[0], own[1]


def _check(scratch: Path, names: list[str]) -> int:
    """Raises where an output is not what it should be. Bytes of ours."""
    import torch

    from megatron.ucp.safe_load import load
    from megatron.ucp.verify import verify

    outputs = {name: scratch / f"out{index}" / "global_step1_universal" for index, name in enumerate(names)}
    if not verify(outputs[OURS]).is_sound:
        raise RuntimeError(f"our output is not sound: {verify(outputs[OURS])}")
    for name in json.loads((outputs[OURS] / "ucp.json").read_text())["parameters"] if STOCK in outputs else ():
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            first, second = (load(outputs[of] / "zero" / name / f"{state}.pt")["param"] for of in (OURS, STOCK))
            if not torch.equal(first, second):
                raise RuntimeError(f"{name} {state}: ours and DeepSpeed's differ")
    return sum(path.stat().st_size for path in outputs[OURS].rglob("*") if path.is_file())


def _report(samples: dict[str, list[Sample]], size: int, written: int, to: str | None) -> None:
    print(f"read {size / 2**30:.2f} GiB, written by ours {written / 2**30:.2f} GiB")
    heads = ("min s", "median", "max", "x ours", "CPU s", "anon MiB", "mapped", "disk out")
    print(f"{'':26}" + "".join(f"{head:>10}" for head in heads))
    summary = {}
    for name, of_rounds in samples.items():
        seconds = [sample.seconds for sample in of_rounds]
        ratios = [other / mine.seconds for other, mine in zip(seconds, samples[OURS], strict=True)]
        summary[name] = {
            "seconds": {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)},
            "ratio_to_ours": {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)},
            "cpu_seconds": statistics.median(sample.cpu_seconds for sample in of_rounds),
            "anonymous_bytes": max(sample.anonymous_bytes for sample in of_rounds),
            "mapped_bytes": max(sample.mapped_bytes for sample in of_rounds),
            "disk_written_bytes": statistics.median(sample.disk_written_bytes for sample in of_rounds),
            "rounds": [asdict(sample) for sample in of_rounds],
        }
        of = summary[name]
        numbers = [f"{of['seconds'][key]:10.2f}" for key in ("min", "median", "max")]
        numbers += [f"{of['ratio_to_ours']['median']:10.2f}", f"{of['cpu_seconds']:10.2f}"]
        numbers += [f"{of[key] / 2**20:10.0f}" for key in ("anonymous_bytes", "mapped_bytes", "disk_written_bytes")]
        print(f"{name:26}" + "".join(numbers))
    if to:
        Path(to).write_text(json.dumps({"bytes_in": size, "bytes_out": written, "candidates": summary}, indent=1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
