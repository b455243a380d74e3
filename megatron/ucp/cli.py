"""The command line of the checkpoint library: `python -m megatron.ucp COMMAND DIR...`, installed as `ucp`.

Questions about any checkpoint folder, DeepSpeed's or universal, of any topology.

    inspect DIR              what is in it
    latest DIR               which checkpoint of a run folder a resume would take; on stderr: why not another
    doctor DIR               what is each thing in a run folder; --full reads every byte, --fix mends what has one
                             right answer           exit 0 all is well, 1 not
    verify DIR               is it whole            exit 0 sound, 1 not; --quick: by sizes, reading no data
    diff A B                 the same state?        exit 0 equal, 1 not
    plan DIR --tp 2 --dp 2   what would each rank of that topology read; --bandwidth 5GB/s or measured (by files of its
                             own): how long a save, a conversion and a resume would take
    convert DIR OUT          make a universal folder; of Megatron-Core's folder, too
    convert DIR OUT --share 0/4            one of four processes that make it, anywhere that sees the disk
    convert DIR OUT --to zero2 --dp 3      make DeepSpeed's own files of ZeRO-2 on 3 ranks
    import MODEL OUT         a model folder of Hugging Face's as a universal folder
    export DIR MODEL         any checkpoint's weights as a model folder of Hugging Face's
    export DIR OUT --format dcp            all of it as a PyTorch DCP folder, for FSDP2 programs

--json prints one JSON object instead of text. Exit code 2: wrong usage, or a folder that is no checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from megatron.ucp.convert import Conversion, convert
from megatron.ucp.diff import diff
from megatron.ucp.digest import total
from megatron.ucp.disk_rates import Rates, measured_rates
from megatron.ucp.doctor import examine, mend
from megatron.ucp.errors import NotACheckpointError, UcpError
from megatron.ucp.huggingface_commands import add_export, add_import
from megatron.ucp.manifest import Manifest, left_out
from megatron.ucp.plan import plan, predicted_seconds
from megatron.ucp.progress_line import ProgressLine
from megatron.ucp.reshape import Reshaped, reshape
from megatron.ucp.run_folder import find_checkpoints
from megatron.ucp.shares import Share, convert_share
from megatron.ucp.sources import PROGRAMS, Source, find_checkpoint, open_source
from megatron.ucp.targets.native_target import NAMES, NativeTarget
from megatron.ucp.targets.universal import tensor_bytes
from megatron.ucp.topology import Topology
from megatron.ucp.verify import verify

OK, NOT, USAGE = 0, 1, 2
_MAX_RANKS = 1 << 16
_LEAST_MEASURED, _MOST_MEASURED = 1 << 28, 1 << 30
"""Bytes."""
_BANDWIDTH = "of each node's disk, or `measured`: of this one, with files beside the folder. How long things will take"


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.run is _convert and (arguments.to is None) != (arguments.dp is None):
        parser.error("--to and --dp belong together: the ZeRO stage, and the ranks that are to load it")
    if arguments.run is _convert and arguments.to and arguments.share:
        parser.error("--share divides the conversion to a universal folder, not that to DeepSpeed's own files (--to)")
    if arguments.run is _convert and (renaming := _renaming(arguments)) and (arguments.to or arguments.share):
        parser.error(f"{renaming[0]} is for a conversion to a universal folder, without --to or --share")
    if arguments.run is _convert and arguments.adapter and not arguments.like:
        parser.error("--adapter belongs to --like; beside a model folder it is for ucp import")
    if arguments.run is _convert and len(_renaming(arguments)) > 1:
        parser.error(f"{' and '.join(_renaming(arguments))} exclude each other")
    try:
        code, data, text = arguments.run(arguments)
    except NotACheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except (UcpError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return NOT
    try:
        print(json.dumps(data, indent=1) if arguments.json else text, flush=True)
    except BrokenPipeError:  # `| head` has read enough; the interpreter must not flush what is left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _renaming(arguments: argparse.Namespace) -> list[str]:
    """Flags that make another Source of the folder."""
    given = {"--like": arguments.like, "--from": arguments.program, "--vocab-size": arguments.vocab_size}
    return [flag for flag, value in given.items() if value]


def _parser() -> argparse.ArgumentParser:
    # The text after the drawing line of the docstring is the manual.
    parser = argparse.ArgumentParser(
        prog="ucp", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, *folders: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name)
        for folder in folders:
            p.add_argument(folder)
        p.add_argument("--json", action="store_true", help="print one JSON object")
        p.add_argument(
            "--column_parallel", action="append", default=[], metavar="REGEX", help="for foreign checkpoints"
        )
        p.set_defaults(run=run)
        return p

    command("inspect", _inspect, "folder")
    command("latest", _latest, "folder")
    p = command("doctor", _doctor, "folder")
    p.add_argument("--full", action="store_true", help="checksums and digests too: reads everything")
    p.add_argument("--fix", action="store_true", help="mend pointers, interrupted replacements, left-overs and marks")
    p.add_argument("--num_workers", type=int, default=2)
    p = command("verify", _verify, "folder")
    p.add_argument("--num_workers", type=int, default=2)
    p.add_argument("--quick", action="store_true", help="sizes of the files and their tiling, without reading data")
    command("diff", _diff, "left", "right").add_argument(
        "--full", action="store_true", help="read every element, even where saved digests are equal"
    )
    p = command("plan", _plan, "folder")
    for axis in ("dp", "tp", "pp", "sp", "ep"):
        p.add_argument(f"--{axis}", type=int, default=1, help=f"{axis}_size of the Target")
    p.add_argument("--zero", type=int, default=1, help="ZeRO stage of the Target (0, 1 or 2)")
    p.add_argument("--bandwidth", type=_bandwidth, metavar="5GB/s", help=_BANDWIDTH)
    p.add_argument("--nodes", type=_num_ranks, default=1, help="with --bandwidth: machines that share the work")
    p = command("convert", _convert, "folder", "output")
    p.add_argument("--num_workers", type=int, default=2)
    p.add_argument("--to", choices=NAMES, help="DeepSpeed's own files of this ZeRO stage, which stock DeepSpeed loads")
    p.add_argument("--dp", type=_num_ranks, help="data-parallel ranks that they are for")
    p.add_argument(
        "--like",
        metavar="MODEL",
        help="a folder with a config.json: parameters that have Hugging Face's names (of Trainer, Accelerate, FSDP2) "
        "get ours, moments included",
    )
    p.add_argument(
        "--adapter",
        metavar="DIR",
        help="with --like, of a PEFT model's checkpoint: where adapter_config.json is; default: in it, or around it",
    )
    p.add_argument(
        "--from",
        dest="program",
        choices=PROGRAMS,
        help="whose names the parameters have, which become ours, moments included; Megatron-Core's is known "
        "by its files",
    )
    p.add_argument(
        "--vocab-size",
        type=_num_ranks,
        metavar="N",
        help="true size of the vocabulary, where Megatron-Core's checkpoint knows only the padded one",
    )
    p.add_argument("--share", type=Share.parse, metavar="I/N", help="of a conversion by N processes that see one disk")
    for name, add in (("import", add_import), ("export", add_export)):
        p = commands.add_parser(name)
        p.add_argument("--json", action="store_true", help="print one JSON object")
        add(p)
    return parser


def _inspect(arguments: argparse.Namespace) -> tuple[int, Any, str]:
    source = open_source(arguments.folder, column_parallel=tuple(arguments.column_parallel))
    manifest = source.manifest
    rows = [
        (
            name,
            "x".join(map(str, info.layout.shape)) or "scalar",
            info.layout.pattern,
            info.group or "-",
            ",".join(map(str, info.pp_stages)),
            "-" if info.step is None else f"{info.step:g}",
            " ".join(info.states),
        )
        for name, info in manifest.parameters.items()
    ]
    numel = sum(info.layout.numel for info in manifest.parameters.values())
    head = [
        f"{source.folder}",
        f"kind        {_kind(manifest)}",
        f"topology    {manifest.topology}" + (f" (from {_origin(manifest)})" if manifest.source else ""),
        f"iteration   {manifest.iteration}",
        f"optimizer   {manifest.optimizer.kind or 'unknown'}, groups {', '.join(manifest.optimizer.groups) or '-'}",
        f"parameters  {len(rows)}, {numel:,} elements, states {tensor_bytes(manifest) / 2**20:.1f} MiB as float32",
        f"digest      {total(manifest.digests) if manifest.digests else 'none saved'}",
        f"verified    {f'no: {manifest.doubt}' if manifest.doubt else 'by the digests of the save'}",
    ]
    if told := left_out(manifest):
        head.append(f"left out    weights that were not trained, with digest {told['digest']}")
    head.append("")
    data = {"folder": str(source.folder), **manifest.to_json()}
    return OK, data, "\n".join(head) + _table(("name", "shape", "pattern", "group", "pp", "step", "states"), rows)


def _latest(arguments: argparse.Namespace) -> tuple[int, Any, str]:
    given, passed_over = Path(arguments.folder), list[str]()
    try:
        found = find_checkpoints(given)
        chosen = found.native or found.universal
        folder, passed_over = chosen.folder if chosen else find_checkpoint(given), list(found.lost)
    except NotACheckpointError:  # of another program, or a root of run folders
        folder = find_checkpoint(given)
    for line in passed_over:
        print(_plain(line), file=sys.stderr)
    return OK, {"folder": str(folder), "passed_over": passed_over}, str(folder)


def _doctor(arguments: argparse.Namespace) -> tuple[int, Any, str]:
    options = {"full": arguments.full, "num_workers": arguments.num_workers}
    examined = examine(arguments.folder, **options)
    mended = mend(examined) if arguments.fix else []
    if mended:
        examined = examine(arguments.folder, **options)
    to_mend = sum(bool(entry.fix) for entry in examined.entries)
    lines = [
        _table(("name", "is", "why"), [(_plain(e.name), e.what, _plain(e.why)) for e in examined.entries]),
        *(f"mended: {_plain(line)}" for line in mended),
        f"a resume would take {examined.would_resume}" if examined.would_resume else "there is nothing to resume from",
        *(f"  {_plain(note)}" for note in examined.notes),
        *([f"--fix would mend {to_mend}"] if to_mend and not arguments.fix else []),
    ]
    data = {**asdict(examined), "folder": str(examined.folder), "is_well": examined.is_well, "mended": mended}
    return (OK if examined.is_well else NOT), data, "\n".join(lines)


def _verify(arguments: argparse.Namespace) -> tuple[int, Any, str]:
    report = verify(
        arguments.folder,
        num_workers=arguments.num_workers,
        column_parallel=tuple(arguments.column_parallel),
        quick=arguments.quick,
    )
    data = {**asdict(report), "folder": str(report.folder), "is_sound": report.is_sound, "is_proven": report.is_proven}
    lines = [f"  {finding}" for finding in report.findings]
    verdict = "sound" if report.is_sound else f"NOT sound, {len(lines)} finding(s)"
    # Of a folder that is not sound the tensors may not have been read at all.
    if report.is_sound and not report.is_proven:
        verdict = f"sound, but unverified: {report.doubt}"
    text = f"{report.folder}: {verdict}; {report.num_files} files, {report.num_states} states"
    digest = [f"state digest {report.digest}"] if report.digest or not arguments.quick else []
    return (OK if report.is_sound else NOT), data, "\n".join([text, *lines, *digest])


def _diff(arguments: argparse.Namespace) -> tuple[int, Any, str]:
    found = diff(
        arguments.left,
        arguments.right,
        trust_digests=not arguments.full,
        column_parallel=tuple(arguments.column_parallel),
    )
    data = {**asdict(found), "left": str(found.left), "right": str(found.right), "is_equal": found.is_equal}
    if found.is_equal:
        return OK, data, f"equal: {found.num_states} states"
    rows = [(d.name, d.state, str(d.num_different), f"{d.max_delta:.3e}") for d in found.deltas]
    table = _table(("name", "state", "different", "max |delta|"), rows) if rows else ""
    head = f"different: {len(rows)} of {found.num_states} states"
    return NOT, data, "\n".join(part for part in (head, *found.lines, table) if part)


def _plan(arguments: argparse.Namespace) -> tuple[int, Any, str]:
    source = open_source(arguments.folder, column_parallel=tuple(arguments.column_parallel))
    target = Topology(arguments.dp, arguments.tp, arguments.pp, arguments.sp, arguments.ep)
    reads = plan(source, target, arguments.zero)
    rows = [(str(r.rank), f"{r.num_bytes / 2**20:.2f}", str(len(r.files)), str(r.num_runs)) for r in reads]
    head = f"{source.folder} ({source.manifest.topology}) -> {target}, ZeRO-{arguments.zero}\n"
    data = {"folder": str(source.folder), "target": target.to_json(), "ranks": [asdict(r) for r in reads]}
    text = head + _table(("rank", "MiB", "files", "copies"), rows)
    if arguments.bandwidth is not None:
        asked = arguments.bandwidth
        rates = _measured(source, target, arguments.nodes) if asked == "measured" else asked
        seconds = predicted_seconds(source, reads, arguments.nodes, rates)
        data["rates"], data["predicted_seconds"] = asdict(rates), asdict(seconds)
        where = f"{arguments.nodes} node(s) of {_told(rates)}"
        text += f"\npredicted for {where}: save {seconds.save:.1f} s, "
        text += f"convert {seconds.convert:.1f} s, load {seconds.load:.1f} s"
    return OK, data, text


def _num_ranks(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MAX_RANKS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of ranks from 1 to {_MAX_RANKS}")
    return int(text)


_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def _bandwidth(text: str) -> Rates | Literal["measured"]:
    """ "5GB/s" -> 5e9 for all."""
    if text == "measured":
        return "measured"
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B/s", text)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no bandwidth, as 5GB/s or 800MB/s")
    return Rates.alike(float(match[1]) * _UNITS[match[2]])


def _measured(source: Source, target: Topology, num_nodes: int) -> Rates:
    """Of as many processes as a node has, or processors, with as many bytes as a node has of the checkpoint, within
    bounds."""
    processes = max(source.manifest.topology.world_size, target.world_size)
    workers = min(-(-processes // num_nodes), len(os.sched_getaffinity(0)))
    num_bytes = min(max(tensor_bytes(source.manifest) // num_nodes, _LEAST_MEASURED), _MOST_MEASURED)
    return measured_rates(source.folder.parent, workers, num_bytes)


def _told(rates: Rates) -> str:
    if rates == Rates.alike(rates.save):
        return f"{rates.save / 1e9:g} GB/s"
    return ", ".join(f"{rate / 1e9:.2f} GB/s of {step}" for step, rate in asdict(rates).items())


def _convert(arguments: argparse.Namespace) -> tuple[int, Any, str]:
    progress = None if arguments.json else ProgressLine()
    result: Conversion | None
    if arguments.share:
        result = convert_share(
            arguments.folder,
            arguments.output,
            arguments.share,
            num_workers=arguments.num_workers,
            column_parallel=tuple(arguments.column_parallel),
            progress=progress,
        )
        if result is None:
            return OK, {"share": str(arguments.share)}, f"share {arguments.share} is done"
    elif arguments.to is None:
        result = convert(
            arguments.folder,
            arguments.output,
            num_workers=arguments.num_workers,
            column_parallel=tuple(arguments.column_parallel),
            like=arguments.like,
            vocab_size=arguments.vocab_size,
            program=arguments.program,
            adapter=arguments.adapter,
            progress=progress,
        )
    else:
        target = NativeTarget.parse(arguments.to, arguments.dp)
        result = reshape(
            arguments.folder, arguments.output, target, num_workers=arguments.num_workers, progress=progress
        )
    data = {
        "source": str(result.source),
        "output": str(result.output),
        "digest": result.digest,
        "bytes": result.num_bytes,
        "seconds": result.seconds,
        "kept": result.num_kept,
    }
    text = f"{result.source} -> {result.output}; state digest {result.digest}{result.told_kept()}"
    if isinstance(result, Reshaped) and result.global_batch:
        data["global_batch"] = result.global_batch
        text += (
            f"\nIt was trained with {result.global_batch} samples a step: go on with as many, on {arguments.dp} ranks"
        )
    return OK, data, text


def _kind(manifest: Manifest) -> str:
    if manifest.kind == "universal":
        # What a folder of another format is, which was not converted.
        return manifest.saved_by.get("format", "universal") if manifest.source is None else "universal"
    return f"native, ZeRO-{manifest.zero_stage}" + (", pipeline" if manifest.is_pipelined else "")


def _origin(manifest: Manifest) -> str:
    return str(Topology.from_json((manifest.source or {})["topology"]))


def _plain(text: str) -> str:
    """On one line, and without what a terminal would obey: names and marks in a folder are anybody's."""
    return "".join(c if c.isprintable() else " " for c in text)


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in [heads, *rows])
