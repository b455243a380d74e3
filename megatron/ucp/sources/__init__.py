"""Where training states are read from. `open_source` finds out what a folder is.

source = open_source("checkpoints")                   # a run folder: follows `latest`
source = open_source("checkpoints/global_step100")    # DeepSpeed's files, with or without ucp.json
source = open_source("checkpoints/global_step100_universal")
source = open_source("outputs/checkpoint/step-1000")  # PyTorch's DCP: FSDP2, TorchTitan
source = open_source("checkpoints/iter_0001000")      # Megatron-Core's torch_dist, under our names
source = open_source("SmolLM2-135M")                  # a model folder of Hugging Face's: weights, no optimizer
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron.ucp.commit import STAGING_SUFFIX
from megatron.ucp.errors import NotACheckpointError, listed
from megatron.ucp.file_names import MODEL_FILE, ZERO_FILE
from megatron.ucp.file_table import require_listed, require_sizes
from megatron.ucp.huggingface.folder import is_model_folder
from megatron.ucp.manifest import MANIFEST_NAME, Manifest, read_manifest
from megatron.ucp.pointers import POINTERS, read_megatron_pointer, read_pointer
from megatron.ucp.sources.dcp.source import DcpSource, is_dcp
from megatron.ucp.sources.deepspeed import DeepSpeedSource
from megatron.ucp.sources.huggingface import HuggingFaceSource
from megatron.ucp.sources.megatron.common_file import is_core
from megatron.ucp.sources.source import Piece, Source
from megatron.ucp.sources.universal import UniversalSource

__all__ = ["PROGRAMS", "Piece", "Source", "find_checkpoint", "is_checkpoint", "open_source"]

PROGRAMS = ("megatron-deepspeed",)
_COUNTED = re.compile(r"(checkpoint[-_]|step[-_])([0-9]{1,18})")
"""Names of the run folders of Trainer ("checkpoint-500"), Accelerate ("checkpoint_3") and its examples ("step_500")."""


def find_checkpoint(folder: str | Path, tag: str | None = None) -> Path:
    """The checkpoint folder that `folder` means: itself, its `tag`, where its pointer file leads, or where that of the
    newest run folder in it does."""
    folder = Path(folder)
    if not folder.is_dir():
        raise NotACheckpointError("no such folder", where=folder)
    if tag is not None:
        return find_checkpoint(folder / tag)
    if is_checkpoint(folder):
        if folder.name.endswith(STAGING_SUFFIX):
            raise NotACheckpointError(
                "this is the left-over of a save or conversion that did not finish",
                where=folder,
                do="use an earlier checkpoint; the next save or conversion removes this folder",
            )
        return folder
    inside = [p.name for p in folder.iterdir() if p.is_dir() and is_checkpoint(p)]
    for pointer in POINTERS:
        named = read_pointer(folder, pointer)
        if named.folder is not None and is_checkpoint(named.folder):
            return named.folder
        if named.folder is not None or named.fault:
            raise NotACheckpointError(
                f"{pointer} points to what is not a checkpoint",
                found=named.fault or named.folder,
                where=folder,
                do=f"give one of the checkpoints inside: {listed(inside)}" if inside else None,
            )
    megatrons = read_megatron_pointer(folder)
    is_ours = any((folder / name / MANIFEST_NAME).is_file() for name in inside)  # and its pointer is lost
    if megatrons is not None and is_checkpoint(megatrons) and not is_ours:
        return megatrons
    runs = _runs_inside(folder)
    if newest := _newest(runs):
        return find_checkpoint(folder / newest)
    if is_model_folder(folder):  # last: Trainer leaves one beside its checkpoints, which hold more
        return folder
    inside += [f"{name}/{run.name}" for name, run in runs.items()]
    raise NotACheckpointError(
        "not a checkpoint folder",
        found=sorted(p.name for p in folder.iterdir())[:20] or "an empty folder",
        expected=f"{MANIFEST_NAME}, DeepSpeed's mp_rank_*_model_states.pt, a zero/ folder, or a model of Hugging "
        "Face's (config.json and model.safetensors)",
        where=folder,
        do=f"give one of the checkpoints inside: {listed(inside)}" if inside else None,
    )


def _runs_inside(folder: Path) -> dict[str, Path]:
    """Run folders in a root of them, and what `latest` names in each. Hugging Face's Trainer makes one for each save
    ("checkpoint-500/global_step500"), Accelerate too, under a tag that is always the same ("pytorch_model")."""
    runs: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        for pointer in POINTERS:
            named = read_pointer(path, pointer).folder
            if named is not None and is_checkpoint(named):
                runs.setdefault(path.name, named)
    return runs


def _newest(runs: Iterable[str]) -> str | None:
    """The one with the highest number, as their programs resume; None where the names do not count saves."""
    matches = [_COUNTED.fullmatch(name) for name in runs]
    if not matches or None in matches or len({match[1] for match in matches if match}) > 1:
        return None
    return max((match for match in matches if match), key=lambda match: int(match[2]))[0]


def open_source(
    folder: str | Path,
    tag: str | None = None,
    column_parallel: tuple[str, ...] = (),
    optimizer_order: Sequence[str] = (),
    vocab_size: int | None = None,
    program: str | None = None,
) -> Source:
    """The Source for a checkpoint folder, or for a run folder with `latest`. `column_parallel` (regular expressions)
    and `optimizer_order` (names) are what folders without a ucp.json may need, see sources/foreign; `vocab_size` is
    what other Megatrons' may, see sources/megatron. `program`: one of PROGRAMS, whose names become ours; by default
    only a format that is known by its files is read so. Raises NotACheckpointError and what the Source raises."""
    folder = find_checkpoint(folder, tag)
    if program is not None:
        return _open_program(folder, program, column_parallel)
    if (folder / MANIFEST_NAME).is_file():
        return _open_listed(folder, read_manifest(folder))
    if not is_checkpoint(folder) and is_model_folder(folder):
        return HuggingFaceSource.open(folder)
    if is_core(folder):
        from megatron.ucp.sources.megatron.core import open_core  # it reads, and what reads imports this module

        return open_core(folder, vocab_size)
    if is_dcp(folder):
        return DcpSource.open(folder)
    from megatron.ucp.sources.foreign import open_foreign  # imports torch

    return open_foreign(folder, column_parallel, optimizer_order)


def _open_program(folder: Path, program: str, column_parallel: tuple[str, ...]) -> Source:
    if program not in PROGRAMS:
        raise NotACheckpointError("no program that is known", found=program[:100], expected=PROGRAMS)
    if (folder / MANIFEST_NAME).is_file():
        raise NotACheckpointError(f"this program saved it, not {program}", where=folder, do="leave --from out")
    from megatron.ucp.sources.megatron.deepspeed import open_megatron_deepspeed  # it reads, as open_core does

    return open_megatron_deepspeed(folder, column_parallel)


def _open_listed(folder: Path, manifest: Manifest) -> Source:
    require_sizes(folder, manifest)
    if manifest.kind == "universal":
        return UniversalSource(folder, manifest)
    source = DeepSpeedSource(folder, manifest)
    if manifest.files:
        require_listed(folder, manifest, source.files.names())
    else:
        source.require_one_save()
    return source


def is_checkpoint(folder: Path) -> bool:
    return (
        (folder / MANIFEST_NAME).is_file()
        or (folder / "zero").is_dir()
        or is_dcp(folder)
        or any(MODEL_FILE.match(path.name) or ZERO_FILE.match(path.name) for path in folder.iterdir())
    )
