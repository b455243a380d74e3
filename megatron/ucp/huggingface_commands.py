"""`ucp import` and `ucp export`, which tools/hf_import.py and tools/hf_export.py are too: models of Hugging Face's.

add_import(parser), add_export(parser)
code, data, text = arguments.run(arguments)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.ucp.convert import convert
from megatron.ucp.errors import NotACheckpointError, UcpError, UnsupportedCheckpointError
from megatron.ucp.export import DTYPE_NAMES, MAX_SHARD_BYTES, Exported, export, export_adapter, export_dcp
from megatron.ucp.huggingface.families import FAMILIES
from megatron.ucp.huggingface.folder import is_model_folder
from megatron.ucp.huggingface.gguf import SUFFIX, unpacked
from megatron.ucp.progress_line import ProgressLine

Outcome = tuple[int, Any, str]
"""Exit code, what --json prints, text."""


def add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", help="a folder with config.json and model.safetensors or pytorch_model.bin; or a .gguf"
    )
    parser.add_argument("output", help="the universal folder to make")
    parser.add_argument(
        "--adapter", metavar="DIR", help="PEFT's LoRA adapters of that model: adapter_config.json, adapter_model.*"
    )
    parser.add_argument("--num_workers", type=int, default=2)
    parser.set_defaults(run=_import)


def add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a checkpoint of any kind and topology, or a run folder")
    parser.add_argument("output", help="the model folder to make")
    parser.add_argument(
        "--format",
        choices=("hf", "dcp", "peft"),
        default="hf",
        help="hf: a model folder. dcp: PyTorch's distributed checkpoint, with the optimizer, for FSDP2 programs. peft: "
        "the LoRA adapters alone",
    )
    parser.add_argument("--base", help="with --format peft: name or folder of the model that the adapters are of")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="of the weights; default: as in training")
    parser.add_argument("--family", choices=sorted(FAMILIES), help="where the model can be several: its model_type")
    parser.add_argument(
        "--like",
        metavar="DIR",
        help="the model that training started from: its config.json, generation_config.json and tokenizer are taken "
        "over; default: those of an imported checkpoint",
    )
    parser.add_argument("--max-positions", type=int, help="max_position_embeddings of a model without a position table")
    parser.add_argument(
        "--max-shard-gb", type=float, default=MAX_SHARD_BYTES / 2**30, help="GiB of one file of weights"
    )
    parser.add_argument("--num_workers", type=int, default=2, help="files that are written at once")
    parser.set_defaults(run=_export)


def _import(arguments: argparse.Namespace) -> Outcome:
    folder = Path(arguments.folder)
    if folder.suffix == SUFFIX and folder.is_file():
        with unpacked(folder, near=Path(arguments.output)) as unpacked_folder:
            arguments.folder = unpacked_folder
            code, data, text = _import(arguments)
        return code, {**data, "source": str(folder)}, text.replace(str(unpacked_folder), str(folder))
    if not is_model_folder(folder):
        raise NotACheckpointError(
            "no model of Hugging Face's",
            found=sorted(path.name for path in folder.iterdir())[:20] if folder.is_dir() else "no such folder",
            expected="config.json with model.safetensors or pytorch_model.bin, or the index of their parts",
            where=folder,
            do="give the folder that save_pretrained wrote, or of a checkpoint use convert",
        )
    progress = None if arguments.json else ProgressLine()
    adapter, workers = arguments.adapter, arguments.num_workers
    result = convert(folder, arguments.output, adapter=adapter, num_workers=workers, progress=progress)
    data = {
        "source": str(result.source),
        "output": str(result.output),
        "digest": result.digest,
        "bytes": result.num_bytes,
        "seconds": result.seconds,
    }
    text = (
        f"{result.source} -> {result.output}; state digest {result.digest}{result.told_kept()}\n"
        f"{len(result.manifest.parameters)} parameters, weights only: train from them with --load {result.output} "
        "--finetune --use-checkpoint-args"
    )
    return 0, data, text


def _export(arguments: argparse.Namespace) -> Outcome:
    progress = None if arguments.json else ProgressLine()
    only_of = {"--like": "hf", "--max-positions": "hf", "--base": "peft"}
    given = {"--like": arguments.like, "--max-positions": arguments.max_positions, "--base": arguments.base}
    if unused := [flag for flag, value in given.items() if value and only_of[flag] != arguments.format]:
        raise UnsupportedCheckpointError(
            f"flags that --format {arguments.format} does not look at", found=unused, do="leave them out"
        )
    places = arguments.folder, arguments.output
    shared = {"dtype": arguments.dtype, "family": arguments.family, "progress": progress}
    if arguments.format == "peft":
        return _told(export_adapter(*places, base=arguments.base, **shared))
    if arguments.format == "dcp":
        return _told(export_dcp(*places, num_workers=arguments.num_workers, **shared))
    max_shard_bytes = max(1, int(arguments.max_shard_gb * 2**30))
    return _told(
        export(
            *places,
            like=arguments.like,
            max_positions=arguments.max_positions,
            max_shard_bytes=max_shard_bytes,
            num_workers=arguments.num_workers,
            **shared,
        )
    )


def _told(result: Exported) -> Outcome:
    data = {
        "source": str(result.source),
        "output": str(result.output),
        "family": result.family,
        "dtype": result.dtype,
        "digest": result.digest,
        "tensors": result.num_tensors,
        "bytes": result.num_bytes,
        "seconds": result.seconds,
        "notes": list(result.notes),
    }
    lines = [
        f"{result.source} -> {result.output}; {result.family}, {result.num_tensors} tensors in {result.dtype}, "
        f"{result.num_bytes / 2**20:.1f} MiB in {result.seconds:.1f} s; digest {result.digest}",
        *(f"note: {note}" for note in result.notes),
    ]
    return 0, data, "\n".join(lines)


def main(add: Callable[[argparse.ArgumentParser], None], description: str, argv: list[str] | None = None) -> int:
    """One of the two as a program of its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add(parser)
    arguments = parser.parse_args(argv)
    arguments.json = False
    try:
        code, _, text = arguments.run(arguments)
    except (UcpError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text)
    return code
