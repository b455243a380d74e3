"""Source: a checkpoint of Megatron-DeepSpeed (BLOOM, YuLan-Mini and their kin) under our names, with a pipeline or
without, moments, steps, counters and schedule included.

source = open_megatron_deepspeed("checkpoints/global_step1000")
source.pieces("layers.0.attention.query_key_value.weight", "exp_avg")

What DeepSpeed wrote is read as any other program's (sources/foreign); `args`, which Megatron-DeepSpeed keeps in the
model states, say which model it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.ucp.errors import UnsupportedCheckpointError
from megatron.ucp.file_names import MODEL_FILE, STAGE3_MODEL_FILE
from megatron.ucp.json_checks import passes, shown, whole
from megatron.ucp.manifest import Manifest, OptimizerInfo
from megatron.ucp.ordinary_file import read_content
from megatron.ucp.sources.foreign import open_foreign
from megatron.ucp.sources.megatron.arguments import describe, schedule_of
from megatron.ucp.sources.megatron.groups import kept_values, kind_of
from megatron.ucp.sources.megatron.names import DEEPSPEED_COLUMN_PARALLEL, deepspeed_names, deepspeed_table
from megatron.ucp.sources.renamed import RenamedSource

_BY_RANK, _VOCABULARY = "ds_sequence_parallel_fpdt", "word_embeddings.weight"
_TIED = "tied_modules."
_PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
_SCHEDULES = ("opt_param_scheduler", "lr_scheduler")


def open_megatron_deepspeed(folder: str | Path, column_parallel: tuple[str, ...] = ()) -> RenamedSource:
    """See open_source. Raises UnsupportedCheckpointError with all that is not read here, and what opening the folder
    of a stock DeepSpeed program raises."""
    folder = Path(folder)
    content = _model_states(folder)
    args = vars(content["args"])
    is_by_rank = _BY_RANK in args
    described = describe(args, 1)  # how long the vocabulary is, DeepSpeed's patterns know better
    faults = list(described.faults)
    if described.model is not None and described.model.has_experts:
        faults.append("experts: convert with --from left out, under their own names")
    heads = described.model and (described.model.num_attention_heads, described.model.num_key_value_heads)
    if heads and is_by_rank and heads[0] != heads[1]:
        faults.append("fewer key/value heads than query heads, which the version that saved it computed wrong")
    tp_size = args.get("tensor_model_parallel_size")  # a converted folder knows it no longer
    if is_by_rank and heads and not (passes(whole(1), tp_size) and heads[0] % tp_size == 0):
        faults.append(f"tensor parallelism of {shown(tp_size)}, of {heads[0]} heads")
    if described.model is None or faults:
        raise UnsupportedCheckpointError(
            f"a model that is not known here: {len(faults)} reason(s)", found=faults, where=folder
        )
    inner = open_foreign(folder, (*column_parallel, *DEEPSPEED_COLUMN_PARALLEL))
    inner.manifest = _with_groups(inner.manifest)
    called = deepspeed_names(inner.manifest.parameters)
    table = deepspeed_table(tp_size, is_by_rank)
    vocabulary = [inner.manifest.parameters[name].layout.shape for name in called if called[name] == _VOCABULARY]
    model = replace(described.model, vocab_size=vocabulary[0][0] if vocabulary and vocabulary[0] else 1)
    source = RenamedSource.of(inner, table, model, described.settings, called=called)
    # The last stage of a pipeline has the whole embedding module for its tied matrix. What else is in it is not used
    # there, and stays as it was initialised.
    source.without_copies = frozenset(name for name in called if name.startswith(_TIED) and called[name] != _VOCABULARY)
    trained_in = next((dtype for flag, dtype in _PRECISIONS.items() if args.get(flag) is True), "float32")
    parameters = {name: replace(info, dtype=trained_in) for name, info in source.manifest.parameters.items()}
    told = source.manifest.optimizer.groups
    optimizer = OptimizerInfo(kind_of(told.values()), groups={name: kept_values(group) for name, group in told.items()})
    source.manifest = replace(source.manifest, parameters=parameters, optimizer=optimizer)
    source.manifest.common.update(described.progress)
    schedules = (schedule_of(content.get(key), args) for key in _SCHEDULES)
    if (schedule := next((found for found in schedules if found is not None), None)) is not None:
        source.manifest.common["schedule"] = schedule
    source.manifest.require_sound(folder)
    return source


def _with_groups(manifest: Manifest) -> Manifest:
    """What DeepSpeed's converter writes has groups, and not whose: Megatron-DeepSpeed decays matrices alone."""
    groups = {bool(group.get("wd_mult", 1.0)): name for name, group in manifest.optimizer.groups.items()}
    if any(info.group for info in manifest.parameters.values()) or len(groups) != len(manifest.optimizer.groups):
        return manifest
    parameters = {
        name: replace(info, group=groups.get(len(info.layout.shape) > 1, ""))
        for name, info in manifest.parameters.items()
    }
    return replace(manifest, parameters=parameters)


def _model_states(folder: Path) -> Mapping[str, Any]:
    for path in _files(folder):
        content = read_content(path)
        if isinstance(content, Mapping) and isinstance(content.get("args"), argparse.Namespace):
            return content
    raise UnsupportedCheckpointError(
        "no args in its model states, which say of which model the checkpoint is",
        where=folder,
        do="give a checkpoint that Megatron-DeepSpeed's pretrain_gpt.py saved; of another program leave --from out",
    )


def _files(folder: Path) -> Iterator[Path]:
    """The model states, of which the first is enough."""
    yield from sorted(
        path
        for path in folder.iterdir()
        if (MODEL_FILE.match(path.name) or STAGE3_MODEL_FILE.match(path.name)) and path.is_file()
    )[:1]
