"""Export: the weights of any checkpoint as a model folder of Hugging Face's, or all of it as PyTorch's DCP.

On a CPU, without a process group, in one pass over the files. Everything that can be checked is checked
before anything is written; the folder appears at once, or not at all.

    result = export("runs/a", "hub/my-model", dtype="bfloat16", like="SmolLM2-135M")
    result.output, result.digest
    AutoModelForCausalLM.from_pretrained("hub/my-model")
    export_dcp("runs/a", "for_fsdp2")                        # dcp.load, moments included
    export_adapter("runs/a", "adapter", base="SmolLM2-135M") # PeftModel.from_pretrained(model, "adapter")
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.ucp.commit import stage
from megatron.ucp.convert import byte_counter, require_apart, whole_or_not_at_all
from megatron.ucp.digest import total
from megatron.ucp.disk import require_space
from megatron.ucp.errors import UnsupportedCheckpointError
from megatron.ucp.huggingface.adapter import BASE, WEIGHTS, adapter_config, base_told
from megatron.ucp.huggingface.adapter import CONFIG as ADAPTER_CONFIG
from megatron.ucp.huggingface.config_json import config_of, describe, family_of
from megatron.ucp.huggingface.families import Family
from megatron.ucp.huggingface.folder import CONFIG, companions, file_of, read_json
from megatron.ucp.identity import Identity
from megatron.ucp.manifest import left_out
from megatron.ucp.naming.adapters import is_adapter
from megatron.ucp.naming.gpt_model import GptModel, layouts, sound_settings
from megatron.ucp.naming.tensors import pairs
from megatron.ucp.sources import Source, find_checkpoint, open_source
from megatron.ucp.sources.dcp.metadata import METADATA
from megatron.ucp.stored import DTYPES
from megatron.ucp.targets.huggingface import shards_of, write_weights

DTYPE_NAMES = ("float32", "bfloat16", "float16")
MAX_SHARD_BYTES = 5 << 30
_SPARE_BYTES = 64 << 20
"""For headers, the configuration and a tokenizer."""
_MAX_POSITIONS = 2048
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Exported:
    source: Path
    output: Path
    family: str
    dtype: str
    digest: str
    """Of what was written, in fp32: the weights, or all states."""
    num_tensors: int
    num_bytes: int
    seconds: float
    notes: tuple[str, ...]


def export(
    checkpoint: str | Path,
    output_folder: str | Path,
    *,
    dtype: str | None = None,
    family: str | None = None,
    like: str | Path | None = None,
    max_positions: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    num_workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Writes `output_folder`. `dtype`: one of DTYPE_NAMES, by default that of the weights in training. `family`: a
    model_type, where the model can be several. `like`: a folder with the model's config.json, whose other values and
    whose tokenizer are taken over; by default what an imported checkpoint has of it. `max_positions`: for config.json,
    of a model without a position table.

    Raises before anything is written where the model has no name there, the output exists or the disk is too small; a
    failure later leaves no output. `progress(done, total)` in bytes, from several threads."""
    started = time.perf_counter()
    output = Path(str(output_folder).rstrip("/") or "/")
    source, model, identity = _opened(checkpoint, output)
    _require_no_adapters(source, model)
    folder = source.folder
    like_folder = _like(like, folder)
    settings = sound_settings(source.manifest.common.get("model_settings"))
    max_positions = max_positions or settings.get("max_position_embeddings")
    chosen, config, notes = config_json_of(model, family, like_folder, max_positions)
    dtype = dtype or _trained_in(source)
    if dtype not in DTYPE_NAMES:
        raise UnsupportedCheckpointError("no precision of weights", found=dtype, expected=DTYPE_NAMES)
    config["torch_dtype"] = dtype
    config.pop("dtype", None)
    shards = shards_of(pairs(chosen, model), DTYPES[dtype], max_shard_bytes)
    num_bytes = sum(shard.num_bytes for shard in shards)
    require_space(output, num_bytes + _SPARE_BYTES)
    staging = stage(output)
    with whole_or_not_at_all(staging, output, identity, marker=CONFIG):
        count = byte_counter(progress, num_bytes) or (lambda n: None)
        digests = write_weights(source, staging, shards, DTYPES[dtype], num_workers=num_workers, progress=count)
        _write_companions(staging, like_folder, config)
        (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return Exported(
        folder,
        output,
        chosen.model_type,
        dtype,
        total(digests),
        sum(len(shard.pairs) for shard in shards),
        num_bytes,
        time.perf_counter() - started,
        notes,
    )


def export_dcp(
    checkpoint: str | Path,
    output_folder: str | Path,
    *,
    dtype: str | None = None,
    family: str | None = None,
    num_workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Writes a PyTorch DCP folder of the model and its optimizer by the names of its architecture of Hugging Face's.
    `dtype`: of the weights, by default fp32, which their masters are; moments are in fp32. Otherwise as `export`."""
    started = time.perf_counter()
    output = Path(str(output_folder).rstrip("/") or "/")
    source, model, identity = _opened(checkpoint, output)
    _require_no_adapters(source, model)
    folder = source.folder
    chosen, _, notes = config_json_of(model, family, _like(None, folder), None)
    dtype = dtype or "float32"
    if dtype not in DTYPE_NAMES:
        raise UnsupportedCheckpointError("no precision of weights", found=dtype, expected=DTYPE_NAMES)
    from megatron.ucp.targets.dcp import bytes_of, pairs_in_memory, write_dcp  # imports torch

    of_model = pairs_in_memory(chosen, model)
    num_bytes = bytes_of(source, of_model, DTYPES[dtype])
    require_space(output, num_bytes + _SPARE_BYTES)
    staging = stage(output)
    with whole_or_not_at_all(staging, output, identity, marker=METADATA):
        count = byte_counter(progress, num_bytes) or (lambda n: None)
        digests = write_dcp(source, staging, of_model, DTYPES[dtype], num_workers=num_workers, progress=count)
    seconds = time.perf_counter() - started
    return Exported(
        folder, output, chosen.model_type, dtype, total(digests), len(of_model), num_bytes, seconds, tuple(notes)
    )


def export_adapter(
    checkpoint: str | Path,
    output_folder: str | Path,
    *,
    dtype: str | None = None,
    family: str | None = None,
    base: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Writes a folder of PEFT's with the adapters of a run that trained some. `dtype`: by default fp32, which their
    masters are. `base`: the name or folder of the model they are of, for PEFT; in ucp_base.json its weights' digest is
    told. Otherwise as `export`."""
    started = time.perf_counter()
    output = Path(str(output_folder).rstrip("/") or "/")
    source, model, identity = _opened(checkpoint, output, only_adapters=True)
    folder = source.folder
    if not model.lora_rank:
        raise UnsupportedCheckpointError(
            "the checkpoint has no adapters", where=folder, do="train some with --lora-rank, or export --format hf"
        )
    dtype = dtype or "float32"
    if dtype not in DTYPE_NAMES:
        raise UnsupportedCheckpointError("no precision of weights", found=dtype, expected=DTYPE_NAMES)
    chosen = family_of(model, family)
    of_adapters = [pair for pair in pairs(chosen, model) if is_adapter(pair.ours)]
    (shard,) = shards_of(of_adapters, DTYPES[dtype], sys.maxsize)
    shard = dataclasses.replace(shard, file=WEIGHTS[0])
    told = base_told(source.manifest)
    require_space(output, shard.num_bytes + _SPARE_BYTES)
    staging = stage(output)
    with whole_or_not_at_all(staging, output, identity, marker=ADAPTER_CONFIG):
        count = byte_counter(progress, shard.num_bytes) or (lambda n: None)
        digests = write_weights(source, staging, [shard], DTYPES[dtype], num_workers=1, progress=count)
        (staging / BASE).write_text(json.dumps(told, indent=2) + "\n")
        (staging / ADAPTER_CONFIG).write_text(json.dumps(adapter_config(chosen, model, base), indent=2) + "\n")
    seconds = time.perf_counter() - started
    return Exported(
        folder, output, chosen.model_type, dtype, total(digests), len(of_adapters), shard.num_bytes, seconds, ()
    )


def _require_no_adapters(source: Source, model: GptModel) -> None:
    if model.lora_rank:
        raise UnsupportedCheckpointError(
            "the model has adapters beside its weights, which this format has no place for",
            where=source.folder,
            do="export --format peft; PEFT's merge_and_unload makes one model of them and their base",
        )


def _opened(checkpoint: str | Path, output: Path, *, only_adapters: bool = False) -> tuple[Source, GptModel, Identity]:
    folder = find_checkpoint(checkpoint)
    require_apart(folder, output)
    identity = Identity.of(folder)
    source = open_source(folder)
    model = GptModel.of(source.manifest.model, where=folder)
    _require_parameters(source, model, only_adapters)
    return source, model, identity


def _require_parameters(source: Source, model: GptModel, only_adapters: bool) -> None:
    """The checkpoint holds just the parameters that its model has, or its adapters beside a base that is left out."""
    is_left_out = left_out(source.manifest) is not None
    if is_left_out and not only_adapters:
        raise UnsupportedCheckpointError(
            "the checkpoint leaves out the weights that were not trained (--exclude-frozen-parameters)",
            where=source.folder,
            do="export its adapters with --format peft; or save once without that flag, from a run that goes on",
        )
    wanted = {n: layout.shape for n, layout in layouts(model).items() if not is_left_out or is_adapter(n)}
    there = {name: info.layout.shape for name, info in source.manifest.parameters.items()}
    faults = [f"{name} is missing" for name in wanted.keys() - there.keys()]
    faults += [f"{name} is not of that model" for name in there.keys() - wanted.keys()]
    faults += [
        f"{name} is {there[name]}, not {wanted[name]}"
        for name in wanted.keys() & there.keys()
        if wanted[name] != there[name]
    ]
    if faults:
        raise UnsupportedCheckpointError(
            "the checkpoint's parameters are not those of the model that it says it is of",
            found=faults,
            where=source.folder,
        )


def _trained_in(source: Source) -> str:
    """fp32 where it is not one for all."""
    kinds = {info.dtype.removeprefix("torch.") for info in source.manifest.parameters.values()}
    return kinds.pop() if len(kinds) == 1 and kinds <= set(DTYPE_NAMES) else "float32"


def _like(given: str | Path | None, checkpoint: Path) -> Path | None:
    if given is not None:
        return Path(given)
    return checkpoint if (checkpoint / CONFIG).is_file() else None


def config_json_of(
    model: GptModel, wanted: str | None, like: Path | None, max_positions: int | None
) -> tuple[Family, dict[str, Any], tuple[str, ...]]:
    """(family, config.json, notes) of a model. Raises UnsupportedCheckpointError where it has none."""
    if like is not None and (like / CONFIG).is_file():
        theirs = read_json(like, CONFIG)
        described = describe(theirs)
        if described.family is None or described.model is None:
            raise UnsupportedCheckpointError(
                "its config.json is of no model that is known here", found=list(described.faults), where=like
            )
        _require_alike(described.model, model, like)
        if wanted not in (None, described.family.model_type):
            raise UnsupportedCheckpointError(
                "two families are asked for", found=[f"{wanted}", f"{described.family.model_type} by {like}"]
            )
        return described.family, theirs, described.notes
    family = family_of(model, wanted)
    notes = [f"{family.model_type}: {family.differs}"] if family.differs else []
    if max_positions is None and "max_position_embeddings" in family.defaults:
        notes.append(
            f"max_position_embeddings is {_MAX_POSITIONS}, since the checkpoint does not say for how long sequences it "
            "is meant: give --max-positions, or --like a folder that has it"
        )
    return family, config_of(family, model, "float32", max_positions or _MAX_POSITIONS), tuple(notes)


def _require_alike(theirs: GptModel, ours: GptModel, like: Path) -> None:
    one, other = theirs.to_json(), ours.to_json()
    differing = [
        f"{key}: {one.get(key)!r} there, {other.get(key)!r} here"
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    ]
    if differing:
        raise UnsupportedCheckpointError(
            "the config.json to be taken over is of another model",
            found=differing,
            where=like,
            do="give the folder of the model that the training started from, or leave --like out",
        )


def _write_companions(staging: Path, like: Path | None, config: Mapping[str, Any]) -> None:
    """The tokenizer and the defaults of generation; those of a model that has none from its configuration."""
    if like is not None:
        for name in companions(like):
            shutil.copyfile(file_of(like, name), staging / name)
    path = staging / "generation_config.json"
    if not path.exists():
        ids = {key: config[key] for key in _IDS if config.get(key) is not None}
        path.write_text(json.dumps(ids, indent=2) + "\n")
