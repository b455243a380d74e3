"""What --estimate says a rank needs, beside what it took: peak memory of real steps under several topologies.

    .venv/bin/python benchmarks/memory.py                        # make bench
    .venv/bin/python benchmarks/memory.py --hidden 256 --layers 4 --json memory.json

Each topology trains a few steps on the CPU, a process for each rank. What is measured is resident memory at its
highest, over what the process had before the model was built, less what the same takes with a model of nearly nothing
(the libraries' own). The allocator gives every tensor its own pages here and hands them back at once, so that resident
is what is in use.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

# Read by glibc when a process starts: those of the ranks do.
os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

LLAMA = {
    "swiglu": True,
    "normalization": "rmsnorm",
    "position_embedding_type": "rope",
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
}
CASES: dict[str, tuple[int, dict]] = {
    "one rank": (1, {}),
    "one rank, ZeRO-1": (1, {"zero": 1}),
    "dp2, ZeRO-1": (2, {"zero": 1}),
    "dp2, ZeRO-2": (2, {"zero": 2}),
    "dp2, ZeRO-3": (2, {"zero": 3}),
    "dp2, ZeRO-1, bf16": (2, {"zero": 1, "bf16": True}),
    "tp2, ZeRO-1": (2, {"tp": 2, "zero": 1}),
    "pp2, ZeRO-1": (2, {"pp": 2, "zero": 1, "micro_batch": 2}),
    "tp2 dp2, ZeRO-1": (4, {"tp": 2, "zero": 1, "micro_batch": 2}),
    "sp2, ZeRO-1": (2, {"zero": 1, "ds_sequence_parallel_size": 2}),
    "recomputed": (1, {"recompute_granularity": "full", "recompute_method": "uniform"}),
    "dropout": (1, {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "LLaMA, ZeRO-1": (1, {**LLAMA, "zero": 1}),
    "4 experts, ep2, ZeRO-1": (2, {"num_experts": 4, "topk": 2, "zero": 1, "moe_expert_parallel_size": 2}),
}
NEARLY_NOTHING = {"hidden": 32, "layers": 2, "vocabulary": 128, "sequence": 16}


def main(argv: list[str]) -> int:
    from matrix.recording import write_dataset

    arguments = _parse(argv)
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        data = write_dataset(Path(scratch) / "text_document", num_documents=400)
        print(f"{'MiB of the fullest rank':26}{'measured':>10}{'estimate':>10}{'':>9}")
        for name in arguments.cases:
            rows[name] = row = _measure(name, data, arguments)
            off = row["estimate"] / row["measured"] - 1
            print(f"{name:26}{row['measured']:10.0f}{row['estimate']:10.0f}{off:+9.1%}", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1))
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="; ".join(CASES))
    parser.add_argument("--json", help="write the numbers to this file too")
    return parser.parse_args(argv)


def _measure(name: str, data: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """MiB: measured and estimated, of the rank that took most."""
    from harness.ranks import run_ranks
    from megatron.config.arguments import parse
    from megatron.model.memory import worst_stage

    ranks, flags = CASES[name]
    sizes = {key: getattr(arguments, key) for key in NEARLY_NOTHING}
    libraries = run_ranks(ranks, _peak, _line(data, flags, **NEARLY_NOTHING), timeout=600)
    taken = run_ranks(ranks, _peak, _line(data, flags, **sizes), timeout=600)
    config = parse(_line(data, flags, **sizes)).config.validate(ranks)
    _, memory = worst_stage(config, config.parallel.topology(ranks), config.parallel.zero_stage)
    measured = max(own - without for own, without in zip(taken, libraries, strict=True))
    return {"measured": measured, "estimate": memory.peak / 2**20}


def _line(data: Path, flags: dict, hidden: int, layers: int, vocabulary: int, sequence: int) -> list[str]:
    from matrix.recording import command_line

    of_model = {
        "hidden_size": hidden,
        "num_layers": layers,
        "num_attention_heads": 8 if hidden % 512 == 0 else 4,
        "vocab_size": vocabulary - 1,
        "seq_length": sequence,
        "max_position_embeddings": sequence,
        "micro_batch": 4,
        "iters": 3,
    }
    return command_line(data, **{**of_model, **flags})


def _peak(rank: int, world_size: int, line: list[str]) -> float:
    """MiB that a run took at its highest over what there was before it. A rank's body."""
    import torch

    from matrix.recording import build
    from megatron.training.loop import fit

    torch.ones(64, 64) @ torch.ones(64, 64)  # the matrix library is loaded at its first product
    before = _status("VmRSS")
    fit(build(line, rank, world_size))
    return _status("VmHWM") - before


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
