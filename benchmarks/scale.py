"""Opening, inspecting, planning and quickly verifying checkpoints of many ranks: seconds and memory.

    .venv/bin/python benchmarks/scale.py                       # make bench
    .venv/bin/python benchmarks/scale.py --cases 7B 1T --json scale.json

Models and numbers of ranks as in the paper's evaluation (Lian et al., "Universal Checkpointing", USENIX ATC 2025);
how 7B, 13B and 42B are cut, and what each is resumed on, is ours. The folders are fabricated: a ucp.json as a save of
ZeRO-1 writes it, and the files of all ranks with their names, sizes and pickles, but with holes where tensors lie
(sparse files), so that a checkpoint of 12 TB takes megabytes. Each question is asked in a process of its own, start
included:

    open      read ucp.json, compare the sizes of all files, know where every element lies
    inspect   `ucp inspect`
    quick     `ucp verify --quick`: sizes, and that every element is held exactly once
    plan      `ucp plan`: what each rank of another topology would read, of all states
    read      one rank's first GiB of masters, straight from the files (of holes: the time of all but the disk)
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402 (the folder above has to be on the path first)
from megatron.ucp.layout import Cut, Layout, Part, ShardRank
from megatron.ucp.manifest import FileInfo, Manifest, OptimizerInfo, ParameterInfo, write_manifest
from megatron.ucp.sources.optimizer_file import FlatContent, file_content
from megatron.ucp.topology import Topology

STATES = ("fp32", "exp_avg", "exp_avg_sq")
QUESTIONS = ("open", "inspect", "quick", "plan", "read")
READ_BYTES = 1 << 30


@dataclass(frozen=True)
class Case:
    num_layers: int
    hidden: int
    vocabulary: int
    source: Topology
    target: Topology
    """Of the plan."""
    num_experts: int = 0


PAPER = {
    "7B": (4, 0.29, 0.73, 0.36),
    "13B": (8, 0.38, 1.17, 0.47),
    "42B MoE": (8, 0.42, 2.64, 0.58),
    "176B": (48, 0.48, 1.67, 0.68),
    "1T": (128, 0.50, 2.93, 0.69),
}
"""Its Table 3: nodes, and minutes of a save, a transformation and a load, end to end."""

CASES = {
    "7B": Case(32, 4096, 32000, Topology(dp_size=2, tp_size=2, pp_size=2), Topology(dp_size=4, tp_size=1, pp_size=1)),
    "13B": Case(40, 5120, 50304, Topology(dp_size=4, tp_size=2, pp_size=2), Topology(dp_size=2, tp_size=4, pp_size=2)),
    "42B MoE": Case(24, 2560, 50304, Topology(dp_size=32, tp_size=2), Topology(dp_size=16, tp_size=2), num_experts=32),
    "176B": Case(70, 14336, 250880, Topology(8, 2, 24), Topology(dp_size=4, tp_size=4, pp_size=12)),
    "1T": Case(128, 25600, 51200, Topology(8, 8, 16), Topology(dp_size=4, tp_size=8, pp_size=16)),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--folder", default=str(ROOT), help="where the scratch folder is made")
    parser.add_argument("--json", help="write the numbers to this file too")
    parser.add_argument("--bandwidth", default="3GB/s", help="of each of the paper's nodes, for the prediction")
    parser.add_argument("--ask", nargs=3, metavar=("QUESTION", "CASE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.ask:
        print(json.dumps(_answer(arguments.ask[0], CASES[arguments.ask[1]], Path(arguments.ask[2]))))
        return 0
    scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=arguments.folder))
    rows = {}
    try:
        print(
            f"{'':10}{'ranks':>6}{'params':>8}{'files':>7}{'TB':>7}" + "".join(f"{q + ' s, MB':>16}" for q in QUESTIONS)
        )
        for name in arguments.cases:
            manifest = fabricate(CASES[name], scratch / name)
            size = sum(info.bytes for info in manifest.files.values())
            answers = {question: _ask(question, name, scratch / name) for question in QUESTIONS}
            rows[name] = {
                "files": len(manifest.files),
                "bytes": size,
                "parameters": len(manifest.parameters),
                **answers,
            }
            numbers = (
                f"{manifest.topology.world_size:6}{len(manifest.parameters):8}{len(manifest.files):7}{size / 1e12:7.2f}"
            )
            print(
                f"{name:10}{numbers}"
                + "".join(f"{a['seconds']:9.2f},{a['peak_bytes'] / 1e6:6.0f}" for a in answers.values())
            )
            rows[name] |= _beside_the_paper(name, scratch / name, arguments.bandwidth)
            shutil.rmtree(scratch / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"\nminutes: the disk's alone at {arguments.bandwidth} a node, and the paper's, end to end on its machines")
    print(f"{'':10}{'nodes':>6}" + "".join(f"{step:>9}{'paper':>7}" for step in ("save", "convert", "load")))
    for name, row in rows.items():
        pairs = zip(row["predicted_minutes"], PAPER[name][1:], strict=True)
        print(f"{name:10}{PAPER[name][0]:6}" + "".join(f"{ours:9.2f}{paper:7.2f}" for ours, paper in pairs))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1))
    return 0


def _beside_the_paper(name: str, folder: Path, bandwidth: str) -> dict[str, object]:
    """`ucp plan`'s prediction, for the paper's nodes."""
    target = CASES[name].target
    degrees = [f"--{axis}={getattr(target, f'{axis}_size')}" for axis in ("dp", "tp", "pp", "ep")]
    command = [sys.executable, "-m", "megatron.ucp", "plan", str(folder), *degrees, "--json", "--bandwidth", bandwidth]
    done = subprocess.run(
        [*command, "--nodes", str(PAPER[name][0])], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds = json.loads(done.stdout)["predicted_seconds"]
    return {"predicted_minutes": [seconds[step] / 60 for step in ("save", "convert", "load")]}


def _ask(question: str, name: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--ask", question, name, str(folder)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{question} of {name} failed:\n{done.stderr[-4000:]}")
    return {"seconds": time.perf_counter() - started, **json.loads(done.stdout.splitlines()[-1])}


def _answer(question: str, case: Case, folder: Path) -> dict[str, float]:
    from megatron.ucp import cli
    from megatron.ucp.execute import read_into
    from megatron.ucp.runs import shard_runs
    from megatron.ucp.sources import open_source

    target = case.target
    degrees = [f"--{axis}={getattr(target, f'{axis}_size')}" for axis in ("dp", "tp", "pp", "ep")]
    commands = {"inspect": ["inspect"], "quick": ["verify", "--quick"], "plan": ["plan", *degrees]}
    if question in commands:
        command, *flags = commands[question]
        if code := cli.main([command, str(folder), *flags]):
            raise RuntimeError(f"exit code {code}")
    else:
        import numpy as np

        source = open_source(folder)
        source.pieces(next(iter(source.manifest.parameters)), "fp32")
        num_bytes = 0
        for name, info in source.manifest.parameters.items() if question == "read" else ():
            numel = math.prod(info.layout.shard_shape(ShardRank(0, target.tp_size, 0, target.ep_size)))
            numel = min(numel, (READ_BYTES - num_bytes) // 4)
            runs = shard_runs(info.layout, ShardRank(0, target.tp_size, 0, target.ep_size), 0, numel)
            read_into(source, name, "fp32", runs, np.empty(numel, np.float32))
            num_bytes += 4 * numel
            if num_bytes >= READ_BYTES:
                break
    # Not getrusage: its peak is the parent's too, out of which this process was made.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"peak_bytes": 1024 * int(status["VmHWM"].split()[0])}


# -- what is asked about ---------------------------------------------------------------------------------------------


def fabricate(case: Case, folder: Path) -> Manifest:
    """A checkpoint of holes. Returns its manifest."""
    import torch

    folder.mkdir()
    topology = case.source
    parameters = dict(_parameters(case))
    fragments: dict[str, list[list[int]]] = {}
    with torch.serialization.skip_data():
        for pp in range(topology.pp_size):
            for tp in range(topology.tp_size):
                mp_rank = topology.mp_rank(pp=pp, tp=tp)
                names = [name for name, info in parameters.items() if pp in info.pp_stages]
                shard = ShardRank(tp, topology.tp_size)
                sizes = [math.prod(parameters[name].layout.shard_shape(shard)) for name in names]
                partition = -(-sum(sizes) // topology.zero_size)
                offset = 0
                for name, size in zip(names, sizes, strict=True):
                    for rank in range(offset // partition, -(-(offset + size) // partition)):
                        start, stop = max(offset, rank * partition), min(offset + size, (rank + 1) * partition)
                        fragments.setdefault(name, []).append(
                            [mp_rank, rank, 0, start - rank * partition, stop - start]
                        )
                    offset += size
                torch.save({"module": {}, "ds_version": "0.19.8"}, folder / f"mp_rank_{mp_rank:02d}_model_states.pt")
                for rank in range(topology.zero_size):
                    held = min(partition, max(0, sum(sizes) - rank * partition))
                    # Never touched, so that they take no memory, and the file gets a hole for each.
                    tensors = {state: torch.empty(held if state == "fp32" else partition) for state in STATES}
                    state = {**{key: tensors[key] for key in STATES[1:]}, "step": 1.0}
                    flat = FlatContent(0, tensors["fp32"], state, padding=partition - held)
                    group, common = {"lr": 1e-4}, {"loss_scaler": None}
                    count = topology.zero_size
                    content = file_content([flat], [group], common, zero_stage=1, num_ranks=count, config=None)
                    torch.save(content, folder / f"zero_pp_rank_{rank}_mp_rank_{mp_rank:02d}_optim_states.pt")
    manifest = Manifest(
        kind="native",
        topology=topology,
        parameters=parameters,
        zero_stage=1,
        is_pipelined=topology.pp_size > 1,
        optimizer=OptimizerInfo(groups={"decay": {"lr": 1e-4}}),
        common={"iteration": 1},
        files={path.name: FileInfo(path.stat().st_size, "00000000") for path in sorted(folder.iterdir())},
        fragments={name: sorted(parts) for name, parts in fragments.items()},
        unverified="fabricated",
    )
    write_manifest(folder, manifest)
    return manifest


def _parameters(case: Case) -> Iterator[tuple[str, ParameterInfo]]:
    hidden, last = case.hidden, case.source.pp_size - 1
    per_stage = -(-case.num_layers // case.source.pp_size)

    def info(layout: Layout, *stages: int) -> ParameterInfo:
        return ParameterInfo(layout, "decay", STATES, 1.0, pp_stages=stages)

    yield "embedding.word_embeddings.weight", info(Layout.shard_v((case.vocabulary, hidden)), 0)
    head = 128
    fused = tuple(Part(hidden, unit=head) for _ in range(3))
    for number in range(case.num_layers):
        stage, name = number // per_stage, f"layers.{number}"
        inner = 4 * hidden
        experts = (case.num_experts,) if case.num_experts and number % 2 else ()
        layouts = {
            "input_norm.weight": Layout.replicate((hidden,)),
            "attention.query_key_value.weight": Layout.shard_nc((3 * hidden, hidden), 0, fused),
            "attention.query_key_value.bias": Layout.shard_nc((3 * hidden,), 0, fused),
            "attention.dense.weight": Layout.shard_h((hidden, hidden)),
            "attention.dense.bias": Layout.replicate((hidden,)),
            "post_norm.weight": Layout.replicate((hidden,)),
        }
        if experts:
            up, down = (*experts, inner, hidden), (*experts, hidden, inner)
            layouts["mlp.experts.dense_h_to_4h"] = Layout.shard_hy(up, (Cut(1, (Part(inner),)),))
            layouts["mlp.experts.dense_4h_to_h"] = Layout.shard_hy(down, (Cut(2, (Part(inner),)),))
        else:
            layouts["mlp.dense_h_to_4h.weight"] = Layout.shard_v((inner, hidden))
            layouts["mlp.dense_h_to_4h.bias"] = Layout.shard_v((inner,))
            layouts["mlp.dense_4h_to_h.weight"] = Layout.shard_h((hidden, inner))
            layouts["mlp.dense_4h_to_h.bias"] = Layout.replicate((hidden,))
        yield from ((f"{name}.{rest}", info(layout, stage)) for rest, layout in layouts.items())
    yield "final_norm.weight", info(Layout.replicate((hidden,)), last)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
