"""The command line of tools/ds_to_universal.py, which takes the flags of DeepSpeed's.

`main(arguments)` takes what DeepSpeed's own ds_to_universal.main takes and returns an exit code; `convert_as_told`
takes the same and raises.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.ucp.convert import Conversion, convert
from megatron.ucp.errors import UcpError
from megatron.ucp.progress_line import ProgressLine
from megatron.ucp.shares import Share, convert_share
from megatron.ucp.sources import find_checkpoint
from megatron.ucp.topology import Topology

AUTO = "auto"


def parser() -> argparse.ArgumentParser:
    """The flags of DeepSpeed's ds_to_universal and ours."""
    p = argparse.ArgumentParser(
        prog="ds_to_universal.py", description="Convert a DeepSpeed checkpoint of any topology to a universal one."
    )
    p.add_argument("--input_folder", required=True, help="a checkpoint (global_stepN), or the run folder: `latest`")
    p.add_argument("--output_folder", required=True, help="must not exist")
    p.add_argument("--num_workers", type=int, help="threads; default: what the two flags below ask for, at most 4")
    p.add_argument("--num_extract_workers", type=int, default=4, help="as DeepSpeed's: one pass here, so a hint only")
    p.add_argument("--num_merge_workers", type=int, default=2, help="as DeepSpeed's: one pass here, so a hint only")
    p.add_argument("--keep_temp_folder", action="store_true", help="accepted; no temporary folder is made")
    p.add_argument("--no_strict", dest="strict", action="store_false", help="accepted; nothing is matched by pattern")
    p.add_argument("--inject_missing_state", action="store_true", help="accepted; nothing has to be injected")
    p.add_argument(
        "--column_parallel",
        action="append",
        default=[],
        metavar="REGEX",
        help="for checkpoints without ucp.json under tensor parallelism: parameters cut along dimension 0",
    )
    p.add_argument(
        "--share",
        type=share_argument,
        metavar="I/N",
        help="one process's share of a conversion by N, which see one disk; share 0 ends it. auto: as torchrun, srun "
        "or mpirun started this process",
    )
    return p


def share_argument(text: str) -> Share | str:
    """Of a flag: "0/4", or "auto"."""
    try:
        return text if text == AUTO else Share.parse(text)
    except UcpError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def convert_as_told(arguments: Any, launched: Share | None = None) -> Conversion | None:
    """`convert` for a program that has DeepSpeed's arguments: `input_folder` and `output_folder` of any object or
    mapping, and whatever else of `parser` is there. `launched`: what "auto" is. Gives None for a share other than the
    first. Raises what `convert` raises."""

    def given(name: str) -> Any:
        return arguments.get(name) if isinstance(arguments, Mapping) else getattr(arguments, name, None)

    if missing := [name for name in ("input_folder", "output_folder") if given(name) is None]:
        raise TypeError(f"the arguments of a conversion ({type(arguments).__name__}) lack {', '.join(missing)}")
    folder = given("input_folder")
    found = find_checkpoint(folder)
    if found != Path(folder):
        print(f"{folder} is no checkpoint itself; converting its latest one, {os.path.relpath(found, folder)}")
    hints = given("num_extract_workers") or 4, given("num_merge_workers") or 2
    num_workers = given("num_workers") or max(1, min(4, *hints))
    column_parallel = tuple(given("column_parallel") or ())
    folders = found, given("output_folder")
    share = given("share")
    if share == AUTO:
        share = launched
    if share is not None:
        progress = ProgressLine() if share.index == 0 else None
        return convert_share(
            *folders, share, num_workers=num_workers, column_parallel=column_parallel, progress=progress
        )
    return convert(*folders, num_workers=num_workers, column_parallel=column_parallel, progress=ProgressLine())


def main(arguments: Any = None, launched: Share | None = None) -> int:
    """Command line (a list of words, or None for the process's own), or arguments as DeepSpeed's `main` takes them: a
    namespace of any kind. `launched`: what --share auto is. Prints what was done; 0, or 1 after an error.
    `convert_as_told` raises instead."""
    if arguments is None or isinstance(arguments, (list, tuple)):
        arguments = parser().parse_args(arguments)
    try:
        result = convert_as_told(arguments, launched)
    except (UcpError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if result is None:
        return 0
    source = result.manifest.source or {}
    size = result.num_bytes / 2**20
    print(
        f"{result.source} (ZeRO-{source['zero_stage']}, {Topology.from_json(source['topology'])}) -> {result.output}\n"
        f"{len(result.manifest.parameters)} parameters, {size:.1f} MiB in {result.seconds:.2f} s "
        f"({size / max(result.seconds, 1e-9):.0f} MiB/s); state digest {result.digest}{result.told_kept()}"
    )
    return 0
