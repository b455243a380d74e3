"""Everything that only a GPU can tell, in one command and one table; for a machine with one GPU and no network.

    python tools/gpu_check.py                              # make gpu; under 25 minutes
    python tools/gpu_check.py --only kernels training      # some of: tests kernels training journey save
    python tools/gpu_check.py --rehearsal                  # on a CPU, with tiny models: does the check itself work?

Each line says what was asked, what was found, and whether that is as it must be. What did not come to its turn in
--minutes says so. Exit code 1 if anything failed. --markdown writes the table for docs/MEASURED.md, with the card's
name.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron.data.indexed_dataset import IndexedDatasetWriter  # noqa: E402 (the root is on the path only now)

SHAPES = {
    "tiny": {"num-layers": 2, "hidden-size": 64, "num-attention-heads": 4, "seq-length": 64, "micro-batch-size": 2},
    "125M": {
        "num-layers": 12,
        "hidden-size": 768,
        "num-attention-heads": 12,
        "seq-length": 1024,
        "micro-batch-size": 8,
    },
    "1B": {"num-layers": 24, "hidden-size": 2048, "num-attention-heads": 16, "seq-length": 2048, "micro-batch-size": 4},
}
VOCABULARY = {"tiny": 512, "125M": 50304, "1B": 50304}
OK, FAILED, NOT_RUN = "ok", "FAILED", "not run"
WITHIN = 0.15
"""Of --estimate, that a measured peak may be off."""


@dataclass(frozen=True)
class Row:
    what: str
    found: str
    verdict: str


class Check:
    """One run of the check: its scratch folder, its device, and the time it has left."""

    def __init__(self, scratch: Path, is_rehearsal: bool, minutes: float) -> None:
        self.scratch, self.is_rehearsal = scratch, is_rehearsal
        self._ends = time.monotonic() + 60 * minutes
        self.said = ""
        """All that the last process printed."""

    def run(self, command: list[str | Path], device: str | None = None, limit: float = 600) -> tuple[int, str]:
        """(exit code, output) of a process; 124 if it did not end in time. `device` "cpu" hides the GPU."""
        environment = dict(os.environ)
        if device == "cpu" or self.is_rehearsal:
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        limit, self.said = min(limit, self._ends - time.monotonic()), ""
        if limit <= 0:
            return 124, "out of time"
        try:
            done = subprocess.run(
                [str(word) for word in command],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired as late:
            return 124, str(late.stdout or "")
        self.said = done.stdout
        return done.returncode, done.stdout

    def data(self, shape: str) -> Path:
        """A data set of random tokens."""
        prefix = self.scratch / f"{shape}_text"
        if not prefix.with_suffix(".bin").exists():
            import numpy as np

            generator = np.random.default_rng(0)
            with IndexedDatasetWriter(prefix, dtype=np.uint16) as writer:
                for _ in range(16):
                    tokens = generator.integers(VOCABULARY[shape] - 1, size=1 << (13 if shape == "tiny" else 17))
                    writer.add_document([*tokens.tolist(), VOCABULARY[shape] - 1])
        return prefix

    def flags(self, shape: str, steps: int, **more: object) -> list[str]:
        """Of pretrain_gpt.py; True gives a bare flag."""
        values: dict[str, object] = {
            **SHAPES[shape],
            "vocab-size": VOCABULARY[shape] - 1,
            "tokenizer-type": "NullTokenizer",
            "data-path": self.data(shape),
            "split": "100,0,0",
            "num-workers": 0,
            "train-iters": steps,
            "lr": 1e-4,
            "lr-decay-style": "constant",
            "hidden-dropout": 0,
            "attention-dropout": 0,
            "eval-iters": 0,
            "log-interval": max(1, steps // 4),
            "zero-stage": 1,
            **{name.replace("_", "-"): value for name, value in more.items()},
        }
        line: list[str] = []
        for name, value in values.items():
            if value is True:
                line.append(f"--{name}")
            elif value is not None and value is not False:
                line += [f"--{name}", str(value)]
        return line


def main(argv: list[str]) -> int:
    arguments = _parse(argv)
    card = "a CPU (rehearsal)" if arguments.rehearsal else _card()
    if card is None:
        print("no CUDA device: nothing was checked. --rehearsal runs the check itself on a CPU", file=sys.stderr)
        return 2
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        check = Check(Path(scratch), arguments.rehearsal, arguments.minutes)
        for name in arguments.only:
            for row in SECTIONS[name](check):
                rows.append(row)
                print(f"{row.verdict:8}{row.what:58}{row.found}", flush=True)
                if row.verdict == FAILED:
                    print(f"--- what it printed\n{check.said[-20_000:]}\n---", file=sys.stderr, flush=True)
    failed = [row for row in rows if row.verdict == FAILED]
    print(f"{card}: {len(rows)} checks, {len(failed)} failed")
    if arguments.markdown:
        lines = [f"On {card}:", "", "| check | found | |", "|---|---|---|"]
        lines += [f"| {row.what} | {row.found.replace(' |', ',')} | {row.verdict} |" for row in rows]
        Path(arguments.markdown).write_text("\n".join(lines) + "\n")
    return 1 if failed else 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="PART")
    parser.add_argument("--minutes", type=float, default=24, help="after which nothing more is begun (default 24)")
    parser.add_argument("--markdown", help="write the table to this file too")
    parser.add_argument("--rehearsal", action="store_true", help="tiny models, on a CPU")
    return parser.parse_args(argv)


def _card() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


# -- the parts -------------------------------------------------------------------------------------------------------


def tests(check: Check) -> Iterator[Row]:
    """The tests that need a GPU, which show as skipped elsewhere."""
    code, said = check.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels", "-p", "no:cacheprovider"]
    )
    last = said.strip().splitlines()[-1] if said.strip() else "no output"
    is_fine = code == 0 and ("passed" in last or check.is_rehearsal)
    yield Row("tests marked gpu", last.strip("= "), _verdict(is_fine, code))


def kernels(check: Check) -> Iterator[Row]:
    """Every Triton kernel, forward and backward, beside torch."""
    for dtype in ("bf16", "fp16"):
        code, said = check.run([sys.executable, "benchmarks/kernels.py", "--dtype", dtype])
        lines = re.findall(r"^(\w+) +([\d.]+) +([\d.]+) +([\d.]+) +(\d+)$", said, re.M)
        for name, plain, fused, ratio, rate in lines:
            yield Row(f"{name}, {dtype}", f"torch {plain} ms, Triton {fused} ms, {ratio} x, {rate} GB/s", OK)
        if code or not (lines or check.is_rehearsal):
            yield Row(f"kernels, {dtype}", _last(said), _verdict(False, code))


def training(check: Check) -> Iterator[Row]:
    """Steps of a model, with torch's operations and fused ones, compiled or not; its peak beside the estimate."""
    steps = 8 if check.is_rehearsal else 100
    precisions = ("fp32",) if check.is_rehearsal else ("bf16", "fp16")
    for shape in ("tiny",) if check.is_rehearsal else ("125M", "1B"):
        for precision in precisions:
            for kernels_of, is_compiled in (("torch", False), ("auto", False), ("auto", True)):
                if check.is_rehearsal and is_compiled:
                    continue  # the tests compile on a CPU
                if shape == "1B" and precision == "fp16":
                    continue
                yield _trained(check, shape, precision, kernels_of, is_compiled, steps)
        yield _peak(check, shape, precisions[0])


def _trained(check: Check, shape: str, precision: str, kernels_of: str, is_compiled: bool, steps: int) -> Row:
    more = {precision: precision != "fp32", "fused_kernels": kernels_of, "torch_compile": is_compiled}
    code, said = check.run([sys.executable, "pretrain_gpt.py", *check.flags(shape, steps, **more)])
    what = f"{shape}, {precision}, kernels {kernels_of}{', compiled' if is_compiled else ''}, {steps} steps"
    last = _steps(said)
    if code or not last or last[-1][0] != steps:
        return Row(what, _last(said), _verdict(False, code))
    _, loss, rest = last[-1]
    is_learning = float(loss) < float(last[0][1]) + 0.1
    return Row(what, f"loss {loss}, {rest}", _verdict(is_learning, 0))


def _steps(said: str) -> list[tuple[int, str, str]]:
    """(iteration, loss, what the line says of speed and memory) of each line of the training log."""
    found = re.findall(r"iteration +(\d+)/\d+ .*? loss ([\d.]+) .*? ([\d,]+ tokens/s .*?GiB)", said)
    return [(int(iteration), loss, rest) for iteration, loss, rest in found]


def _peak(check: Check, shape: str, precision: str) -> Row:
    """Peak memory as the accelerator counts it beside --estimate; on a CPU, where it is not counted, the estimate."""
    what = f"{shape}, {precision}: peak memory beside --estimate"
    more = {precision: precision != "fp32"}
    asked = [*check.flags(shape, 4, **more), "--estimate", "--gpus", "1"]
    code, said = check.run([sys.executable, "pretrain_gpt.py", *asked])
    stage = re.search(r"^stage 0 .* ([\d.]+)$", said, re.M)
    if code or stage is None:
        return Row(what, _last(said), _verdict(False, code))
    estimate = float(stage[1])
    code, said = check.run([sys.executable, "pretrain_gpt.py", *check.flags(shape, 4, **more)])
    measured = re.findall(r"([\d.]+) GiB", said)
    if code or not measured:
        return Row(what, _last(said), _verdict(False, code))
    if check.is_rehearsal:
        return Row(what, f"estimate {estimate:.2f} GiB; not counted on a CPU", OK)
    off = estimate / float(measured[-1]) - 1
    found = f"measured {measured[-1]} GiB, estimate {estimate:.2f} GiB, {off:+.0%}"
    return Row(what, found, _verdict(abs(off) <= WITHIN, 0))


def journey(check: Check) -> Iterator[Row]:
    """A Source of eight gloo ranks on the CPU, tp2 pp2 dp2, goes on on the GPU: the digest must be that of the save."""
    save = check.scratch / "source"
    cut = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "global_batch_size": 8}
    flags = check.flags("tiny", 6, **cut, distributed_backend="gloo", save=save, save_interval=3)
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8"]
    code, said = check.run([*ranks, "pretrain_gpt.py", *flags, "--exit-interval", "3"], device="cpu")
    if code:
        yield Row("a Source of tp2 pp2 dp2 on the CPU", _last(said), _verdict(False, code))
        return
    saved = json.loads((save / "global_step3" / "ucp.json").read_text())
    yield Row("a Source of tp2 pp2 dp2 on the CPU", f"{len(saved['parameters'])} parameters, 8 ranks", OK)
    for precision in ("fp32",) if check.is_rehearsal else ("bf16", "fp16", "fp32"):
        more = {"global_batch_size": 8, precision: precision != "fp32", "load": save, "train_iters": 6}
        code, said = check.run([sys.executable, "pretrain_gpt.py", *check.flags("tiny", 6, **more)])
        proof = re.search(r"state digest (\w+) equals the one at save \((\w+) resume\)", said)
        last = _steps(said)
        is_fine = code == 0 and proof is not None and bool(last) and last[-1][0] == 6
        found = f"digest {proof[1][:8]}..., loss {last[-1][1]} at 6" if proof and last else _last(said)
        yield Row(f"its Target on one rank in {precision}", found, _verdict(is_fine, code))


def save(check: Check) -> Iterator[Row]:
    """Seconds of a save, from the training log."""
    shape, precision = ("tiny", "fp32") if check.is_rehearsal else ("1B", "bf16")
    folder = check.scratch / "saved"
    flags = check.flags(shape, 4, **{precision: precision != "fp32"}, save=folder, save_interval=2)
    code, said = check.run([sys.executable, "pretrain_gpt.py", *flags])
    told = re.findall(r"^.*saved .*$", said, re.M)
    found = re.sub(r"^\[.*?\] ", "", told[-1]) if told else _last(said)
    yield Row(f"a save of {shape}", found.replace(str(folder), "..."), _verdict(code == 0 and len(told) == 2, code))


SECTIONS: dict[str, Callable[[Check], Iterator[Row]]] = {
    "tests": tests,
    "kernels": kernels,
    "training": training,
    "journey": journey,
    "save": save,
}


def _verdict(is_fine: bool, code: int) -> str:
    return OK if is_fine else NOT_RUN if code == 124 else FAILED


def _last(said: str) -> str:
    """The last line that says what is wrong, or anything at all."""
    lines = [line.strip() for line in said.splitlines() if re.search(r"\w", line)]
    errors = [line for line in lines if re.search(r"Error\b", line)]
    return (errors or lines or ["no output"])[-1][:200]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
