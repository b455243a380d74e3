"""Layouts <-> the pattern lists of DeepSpeed's `universal_checkpoint_info`.

The one idea: DeepSpeed says how a parameter is cut by matching its name against lists of regular expressions; layouts
say it exactly. Ours to theirs lets DeepSpeed's own converter read our saves. Theirs to ours reads checkpoints of other
frameworks; there a tensor-parallel parameter that no list names is refused, because DeepSpeed would concatenate it
along dimension 0 whatever it is (replicated norms included).

    engine.module.universal_checkpoint_info = universal_checkpoint_info(layouts, tp_size=2)
    manifest = foreign_manifest("megatron_deepspeed/global_step100", column_parallel=(r".*h_to_4h.*",))

Names of keys: deepspeed/checkpoint/constants.py; meaning: deepspeed/checkpoint/ds_to_universal.py, merge_tp_slices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron.ucp.errors import CorruptFileError, MissingFileError, UnsupportedCheckpointError
from megatron.ucp.layout import Layout, Part, ShardRank
from megatron.ucp.manifest import Manifest, OptimizerInfo, ParameterInfo
from megatron.ucp.safe_load import load
from megatron.ucp.sources.deepspeed import MODEL_FILE, ZERO_FILE
from megatron.ucp.sources.universal import common_from_model_states, group_values
from megatron.ucp.topology import Topology

REPLICATED = "tp_replicated_parameter_patterns"
AVERAGED = "parameter_to_average_patterns"
ROW = "parameter_with_row_parallelism_patterns"
VOCABULARY = "vocabulary_parameter_patterns"
TIED = "pipeline_replicated_parameter_patterns"
TWO_PARTS = "parameter_with_2_sub_params_cat_dim_0"
PARTS = "parameter_with_sub_params"
WIDTHS = "sub_param_shard_widths"
COLUMN = "parameter_with_column_parallelism_patterns"
"""Ours: DeepSpeed has no list for what it concatenates along dimension 0, and ignores this one."""


def universal_checkpoint_info(
    layouts: Mapping[str, Layout],
    *,
    tp_size: int | None = None,
    padded_vocab_size: int | None = None,
    tied: Iterable[str] = (),
) -> dict[str, Any]:
    """What DeepSpeed's ds_to_universal needs to merge a save with these layouts.

    `tied` names the parameters that several pipeline stages hold. Without `tp_size` the widths of fused parts are left
    out and DeepSpeed assumes equal ones, which it checks. Uneven cuts of plain parameters need nothing; parts with
    `replicate_when_fewer` in force have no form in these lists, and DeepSpeed then refuses loudly.
    """
    lists: dict[str, list[str]] = {REPLICATED: [], AVERAGED: [], ROW: [], COLUMN: [], VOCABULARY: []}
    sub_params: list[dict[str, Any]] = []
    widths: dict[str, list[list[int]]] = {}
    vocabulary = None
    for pattern, layout in _patterns(layouts).items():
        if layout.is_averaged:
            lists[AVERAGED].append(pattern)
        elif not layout.is_cut_over("tp"):
            lists[REPLICATED].append(pattern)
        else:
            cut = next(cut for cut in layout.cuts if cut.axis == "tp")
            if len(cut.parts) > 1:
                shape = [n if d != cut.dim else tuple(p.size for p in cut.parts) for d, n in enumerate(layout.shape)]
                sub_params.append({"patterns": [pattern], "shape": tuple(shape), "partition_dim": cut.dim})
                if tp_size is not None:
                    widths[pattern] = [_widths(part, tp_size) for part in cut.parts]
            elif cut.dim == 1:
                lists[ROW].append(pattern)
            else:
                lists[COLUMN].append(pattern)
            if cut.padded is not None:
                lists[VOCABULARY].append(pattern)
                vocabulary = layout.shape[0], cut.padded
    info: dict[str, Any] = {
        # From 0.4 on the widths are required; before, an even split is assumed and checked.
        "universal_checkpoint_version": 0.4 if tp_size is not None else 0.3,
        **lists,
        PARTS: sub_params,
        TIED: [f"{re.escape(name)}$" for name in sorted(tied)],
    }
    if tp_size is not None:
        info[WIDTHS] = widths
    if vocabulary is not None:
        info["original_vocab_size"], info["padded_vocab_size"] = vocabulary[0], padded_vocab_size or vocabulary[1]
    return info


def foreign_manifest(folder: str | Path, column_parallel: tuple[str, ...] = ()) -> Manifest:
    """A manifest for DeepSpeed files without ucp.json, from what they say about themselves. ZeRO-1 and 2."""
    folder = Path(folder)
    models = {int(m[1]): path for path in folder.iterdir() if (m := MODEL_FILE.match(path.name))}
    zeros = sorted((int(m[1]), int(m[2]), path) for path in folder.iterdir() if (m := ZERO_FILE.match(path.name)))
    if not models or 0 not in models:
        raise MissingFileError("no mp_rank_00_model_states.pt", where=folder)
    if not zeros:
        raise UnsupportedCheckpointError(
            "ZeRO-0 keeps the optimizer's state by index, and without ucp.json nothing names the indices",
            where=folder,
            do="resume it with the program that saved it, under ZeRO-1, and save again",
        )
    optimizer = load(zeros[0][2]).get("optimizer_state_dict", {})
    stage = int(optimizer.get("zero_stage", 1))
    if stage > 2 or "param_slice_mappings" not in optimizer:
        raise UnsupportedCheckpointError(
            "only ZeRO-1 and 2 are read without ucp.json", found=f"ZeRO-{stage}", where=folder
        )
    contents = {mp: load(path) for mp, path in sorted(models.items())}
    topology = _topology(contents, zeros, folder)
    info = contents[0].get("universal_checkpoint_info") or {}
    shapes = _shapes(contents, topology, folder)
    layouts, unnamed = {}, []
    for name, stages in shapes.items():
        layout = _layout(name, stages[min(stages)], info, column_parallel)
        if layout is None:
            unnamed.append(name)
        else:
            layouts[name] = layout
    if unnamed:
        raise UnsupportedCheckpointError(
            f"{len(unnamed)} tensor-parallel parameter(s) match no pattern in universal_checkpoint_info",
            found=unnamed,
            where=folder,
            do="say which are cut along dimension 0: --column_parallel REGEX (repeatable; '.*' is DeepSpeed's default)",
        )
    base = optimizer["base_optimizer_state"]
    groups = base.get("param_groups", []) if isinstance(base, dict) else []
    names = [str(group.get("name", index)) for index, group in enumerate(groups)] or None
    parameters = _parameters(layouts, shapes, zeros, topology, names)
    return Manifest(
        kind="native",
        topology=topology,
        parameters=parameters,
        zero_stage=stage,
        is_pipelined=any(path.name.startswith("layer_") for path in folder.iterdir()),
        optimizer=OptimizerInfo(kind="", groups={n: group_values(g) for n, g in zip(names or [], groups)}),
        common=common_from_model_states([models[0]]),
        saved_by={"deepspeed": str(contents[0].get("ds_version", ""))},
    )


def _patterns(layouts: Mapping[str, Layout]) -> dict[str, Layout]:
    """Regular expressions, one for all layers where they agree, else one per name."""
    general: dict[str, list[str]] = {}
    for name in layouts:
        general.setdefault(re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) + "$", []).append(name)
    patterns: dict[str, Layout] = {}
    for pattern, names in general.items():
        if len({layouts[name] for name in names}) == 1:
            patterns[pattern] = layouts[names[0]]
        else:
            patterns.update({f"{re.escape(name)}$": layouts[name] for name in names})
    return patterns


def _widths(part: Part, tp_size: int) -> list[int]:
    whole = Layout.shard_nc((part.size,), 0, (part,))
    return [whole.shard_shape(ShardRank(tp, tp_size))[0] for tp in range(tp_size)]


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)


def _topology(contents: dict[int, Any], zeros: list[tuple[int, int, Path]], folder: Path) -> Topology:
    sizes = contents[0].get("checkpoint_parallel_dimensions") or {}
    num_mp = max(contents) + 1
    tp_size = int(sizes.get("tp_degree") or contents[0].get("mp_world_size") or num_mp)
    pp_size = int(sizes.get("pp_degree") or num_mp // tp_size)
    if tp_size * pp_size != num_mp:
        raise MissingFileError(
            "model state files do not match the topology they state",
            found=f"{num_mp} of mp_rank_*_model_states.pt",
            expected=f"tp {tp_size} x pp {pp_size}",
            where=folder,
        )
    return Topology(tp_size=tp_size, pp_size=pp_size, dp_size=max(z for z, _, _ in zeros) + 1)


def _shapes(contents: dict[int, Any], topology: Topology, folder: Path) -> dict[str, dict[int, list[tuple[int, ...]]]]:
    """name -> pp stage -> shard shape by tp rank."""
    shapes: dict[str, dict[int, list[tuple[int, ...]]]] = {}
    for mp, content in contents.items():
        groups = content.get("param_shapes")
        if not groups:
            raise CorruptFileError("no param_shapes in the model states", where=folder / f"mp_rank_{mp:02d}*")
        for group in groups:
            for name, shape in group.items():
                shapes.setdefault(name, {}).setdefault(mp // topology.tp_size, []).append(tuple(shape))
    return shapes


def _layout(
    name: str, shards: list[tuple[int, ...]], info: Mapping[str, Any], column_parallel: tuple[str, ...]
) -> Layout | None:
    """The layout of a parameter from its shards' shapes; None where no pattern says how it is cut."""
    shape = shards[0]
    tp_size = len(shards)
    is_vocabulary = _matches(info.get(VOCABULARY, []), name)
    if _matches(info.get(REPLICATED, []), name):
        return Layout.replicate(shape)
    if _matches(info.get(AVERAGED, []), name):
        return Layout.partial(shape)

    def joined(dim: int) -> tuple[int, ...]:
        return (*shape[:dim], sum(shard[dim] for shard in shards), *shape[dim + 1 :])

    if is_vocabulary:
        padded = joined(0)
        return Layout.shard_v((int(info["original_vocab_size"]), *padded[1:]), padded=padded[0])
    if _matches(info.get(TWO_PARTS, []), name):
        whole = joined(0)
        return Layout.shard_nc(whole, 0, (Part(whole[0] // 2), Part(whole[0] // 2)))
    for entry in info.get(PARTS, []):
        if _matches(entry["patterns"], name):
            dim = int(entry["partition_dim"])
            whole, sizes = joined(dim), entry["shape"][dim]
            if not isinstance(sizes, (tuple, list)):
                sizes = (whole[dim] // sizes,) * sizes
            return Layout.shard_nc(whole, dim, tuple(Part(int(size)) for size in sizes))
    if _matches(info.get(ROW, []), name) and len(shape) > 1:
        return Layout.shard_h(joined(1))
    if _matches((*info.get(COLUMN, []), *column_parallel), name):
        return Layout.shard_v(joined(0))
    return Layout.unique(shape) if tp_size == 1 else None


def _parameters(
    layouts: Mapping[str, Layout],
    shapes: Mapping[str, Mapping[int, list]],
    zeros: list[tuple[int, int, Path]],
    topology: Topology,
    group_names: list[str] | None,
) -> dict[str, ParameterInfo]:
    wrong = [
        f"{name}: tp rank {tp} holds {found}, the patterns say {layouts[name].shard_shape(ShardRank(tp, len(shards)))}"
        for name, stages in shapes.items()
        for shards in stages.values()
        for tp, found in enumerate(shards)
        if found != layouts[name].shard_shape(ShardRank(tp, len(shards)))
    ]
    if wrong:
        raise UnsupportedCheckpointError("shards do not have the shapes that their patterns call for", found=wrong)
    parameters: dict[str, ParameterInfo] = {}
    for *_, path in zeros:
        optimizer = load(path)["optimizer_state_dict"]
        base = optimizer["base_optimizer_state"]
        for index, mapping in enumerate(optimizer["param_slice_mappings"]):
            state = base[index] if isinstance(base, list) else base["state"].get(index, {})
            tensors = tuple(k for k, v in state.items() if hasattr(v, "dim") and v.dim() > 0)
            for name in mapping:
                if name in parameters or name not in layouts:
                    continue
                step = state.get("step")
                parameters[name] = ParameterInfo(
                    layout=layouts[name],
                    group=group_names[index] if group_names else str(index),
                    states=("fp32", *tensors),
                    step=None if step is None else float(step),
                    pp_stages=tuple(sorted(shapes[name])),
                )
    return {name: parameters[name] for name in layouts if name in parameters}
