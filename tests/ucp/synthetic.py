"""Checkpoint folders in DeepSpeed's format without DeepSpeed: from a known atomic state, by slow plain code.

Independent truth. Nothing here uses Layout, runs or fragments to cut: each kind of parameter has a few
lines of torch.chunk / torch.cat / array_split, and ZeRO partitions are made by concatenating and padding.

    state = make_state(MODEL, seed=0)
    write_native(folder, state, Topology(tp_size=2, pp_size=2, dp_size=2), zero_stage=1)

ZeRO-3 (no pipelines): every parameter is padded and dealt out by itself, in sub-groups of `SUB_GROUP` elements a rank.
Parameters of the group FROZEN belong to no optimizer; their files hold bfloat16.
"""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron.ucp.commit import checksum_file, data_files
from megatron.ucp.digest import digest_tensor
from megatron.ucp.layout import Layout, Part
from megatron.ucp.manifest import Manifest, OptimizerInfo, ParameterInfo, write_manifest
from megatron.ucp.topology import Topology

HEAD = 2
NUM_HEADS, NUM_KV_HEADS = 8, 2
HIDDEN = NUM_HEADS * HEAD
VOCABULARY = 37
STATES = ("fp32", "exp_avg", "exp_avg_sq")
FROZEN = ""
SUB_GROUP = 60


@dataclass(frozen=True)
class Parameter:
    name: str
    shape: tuple[int, ...]
    kind: str
    group: str
    layer: int
    """Position in the pipeline: 0 embedding, 1.. blocks, last: norm."""


def model(num_layers: int = 2, hidden: int = HIDDEN, vocabulary: int = VOCABULARY) -> list[Parameter]:
    kv = NUM_KV_HEADS * HEAD
    qkv = NUM_HEADS * HEAD + 2 * kv
    parameters = [
        Parameter("embedding.word_embeddings.weight", (vocabulary, hidden), "vocabulary", "decay", 0),
        Parameter("embedding.position_embeddings.weight", (7, hidden), "whole", "decay", 0),
    ]
    for i in range(num_layers):
        for name, shape, kind in (
            ("input_norm.weight", (hidden,), "whole"),
            ("attention.query_key_value.weight", (qkv, hidden), "qkv"),
            ("attention.query_key_value.bias", (qkv,), "qkv"),
            ("attention.dense.weight", (hidden, NUM_HEADS * HEAD), "row"),
            ("attention.dense.bias", (hidden,), "whole"),
            ("mlp.dense_h_to_4h.weight", (4 * hidden + 3, hidden), "column"),
            ("mlp.dense_4h_to_h.weight", (hidden, 4 * hidden + 3), "row"),
        ):
            group = "decay" if len(shape) > 1 else "no_decay"
            parameters.append(Parameter(f"layers.{i}.{name}", shape, kind, group, i + 1))
    return [*parameters, Parameter("final_norm.weight", (hidden,), "whole", "no_decay", num_layers + 1)]


def make_state(parameters: list[Parameter], seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {p.name: {s: _random(p, generator) for s in states_of(p)} for p in parameters}


def states_of(parameter: Parameter) -> tuple[str, ...]:
    return STATES[:1] if parameter.group == FROZEN else STATES


def _random(parameter: Parameter, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(parameter.shape, generator=generator)
    return values.bfloat16().float() if parameter.group == FROZEN else values


def padded_vocabulary(vocabulary: int, tp_size: int, multiple: int = 4) -> int:
    step = multiple * tp_size
    return -(-vocabulary // step) * step


def layout_of(parameter: Parameter, tp_size: int) -> Layout:
    """What a model would declare; only for the manifest, never used to cut here."""
    shape = parameter.shape
    if parameter.kind == "vocabulary":
        return Layout.shard_v(shape, padded=padded_vocabulary(shape[0], tp_size))
    if parameter.kind == "qkv":
        kv = Part(NUM_KV_HEADS * HEAD, HEAD, True)
        return Layout.shard_nc(shape, 0, (Part(NUM_HEADS * HEAD, HEAD), kv, kv))
    if parameter.kind == "row":
        return Layout.shard_h(shape)
    return Layout.shard_v(shape) if parameter.kind == "column" else Layout.replicate(shape)


def cut(parameter: Parameter, atomic: torch.Tensor, tp: int, tp_size: int) -> torch.Tensor:
    """The tensor-parallel shard, by plain code."""
    if parameter.kind == "whole" or tp_size == 1 and parameter.kind != "vocabulary":
        return atomic
    if parameter.kind == "vocabulary":
        rows = padded_vocabulary(len(atomic), tp_size)
        padded = torch.cat([atomic, torch.zeros(rows - len(atomic), atomic.shape[1])])
        return padded.chunk(tp_size)[tp]
    if parameter.kind == "qkv":
        q, k, v = atomic.split([NUM_HEADS * HEAD, NUM_KV_HEADS * HEAD, NUM_KV_HEADS * HEAD])
        heads = [q.chunk(tp_size)[tp]]
        for part in (k, v):
            by_head = part.split(HEAD)
            # tp_size > NUM_KV_HEADS: neighbouring ranks share a head.
            mine = [tp * NUM_KV_HEADS // tp_size] if tp_size > NUM_KV_HEADS else None
            mine = np.array_split(range(NUM_KV_HEADS), tp_size)[tp] if mine is None else mine
            heads += [by_head[i] for i in mine]
        return torch.cat(heads)
    dim = 1 if parameter.kind == "row" else 0
    rows = np.array_split(np.arange(atomic.shape[dim]), tp_size)[tp]
    return atomic.index_select(dim, torch.from_numpy(rows)).contiguous()


def stage_parameters(parameters: list[Parameter], pp: int, pp_size: int, is_tied: bool) -> list[Parameter]:
    """Layers are dealt out in equal stretches; a tied embedding is on the last stage too."""
    last = max(p.layer for p in parameters)
    mine = set(np.array_split(np.arange(last + 1), pp_size)[pp].tolist())
    chosen = [p for p in parameters if p.layer in mine]
    if is_tied and pp_size > 1 and pp == pp_size - 1:
        chosen = [*chosen, parameters[0]]
    return chosen


def fragment_address(start: int, numel: int):
    return sys.modules["deepspeed.utils.tensor_fragment"].fragment_address(numel=numel, start=start)


def write_native(
    folder: Path,
    state: dict[str, dict[str, torch.Tensor]],
    topology: Topology,
    zero_stage: int,
    *,
    parameters: list[Parameter] | None = None,
    is_tied: bool = True,
    prefix: str = "",
    is_elastic: bool = False,
    with_manifest: bool = True,
    info: dict | None = None,
    edit=None,
) -> Manifest:
    """Files as an engine of this topology saves them. `edit(pp, tp, name, state, shard) -> shard` plants faults."""
    parameters = parameters or model()
    folder.mkdir(parents=True)
    is_pipelined = topology.pp_size > 1
    order: list[list[str]] = []
    stage3_order: list[list[list[str]]] = []
    with _deepspeed_classes():
        for pp in range(topology.pp_size):
            for tp in range(topology.tp_size):
                mine = stage_parameters(parameters, pp, topology.pp_size, is_tied)
                groups = [[p for p in mine if p.group == g] for g in ("decay", "no_decay")]
                shards = {
                    (p.name, s): _edited(edit, pp, tp, p.name, s, cut(p, state[p.name][s], tp, topology.tp_size))
                    for p in mine
                    for s in states_of(p)
                }
                order.append([p.name for group in groups for p in group])
                mp_rank = pp * topology.tp_size + tp
                if zero_stage == 3:
                    sub_groups = _sub_groups(groups, shards, topology.zero_size)
                    stage3_order.append([[p.name for p in members] for _, members in sub_groups])
                    _write_stage3(folder, mp_rank, mine, sub_groups, shards, topology, prefix, info)
                    continue
                _write_model_states(folder, mp_rank, mine, groups, shards, topology, zero_stage, is_pipelined, info)
                if zero_stage:
                    _write_zero(folder, mp_rank, groups, shards, topology.zero_size, prefix, zero_stage, is_elastic)
                if is_pipelined:
                    _write_layers(folder, mine, shards, pp, tp)
    manifest = Manifest(
        kind="native",
        topology=topology,
        parameters={
            p.name: ParameterInfo(
                layout=layout_of(p, topology.tp_size),
                group=p.group,
                states=states_of(p),
                step=None if p.group == FROZEN else 5.0,
                is_trainable=p.group != FROZEN,
                dtype="bfloat16" if p.group == FROZEN else "float32",
                pp_stages=tuple(
                    pp
                    for pp in range(topology.pp_size)
                    if p in stage_parameters(parameters, pp, topology.pp_size, is_tied)
                ),
            )
            for p in parameters
        },
        zero_stage=zero_stage,
        is_pipelined=is_pipelined,
        optimizer=OptimizerInfo("AdamW", "", {"decay": {"lr": 0.1}, "no_decay": {"lr": 0.1}}),
        common={"iteration": 5},
        digests={
            name: {s: digest_tensor(t, name=name, state=s).hex() for s, t in states.items()}
            for name, states in state.items()
        },
        files={path: checksum_file(folder / path) for path in data_files(folder)},
        zero0_order=[] if zero_stage else order,
        zero3_order=stage3_order,
        pipeline_layers=_layer_prefixes(parameters) if is_pipelined else [],
    )
    if with_manifest:
        write_manifest(folder, manifest)
    return manifest


def _edited(edit, pp, tp, name, state, shard):
    return shard if edit is None else edit(pp, tp, name, state, shard)


def _layer_prefixes(parameters: list[Parameter]) -> list[str]:
    last = max(p.layer for p in parameters)
    return ["embedding", *(f"layers.{i}" for i in range(last - 1)), "final_norm"]


def _param_groups(groups) -> list[dict]:
    index, out = 0, []
    for name, group in zip(("decay", "no_decay"), groups):
        out.append({"name": name, "lr": 0.1, "params": list(range(index, index + len(group)))})
        index += len(group)
    return out


def _model_states(mine, groups, topology, zero_stage, info, shards) -> dict:
    trainable = [p for group in groups for p in group]
    frozen = [p for p in mine if p.group == FROZEN]
    content = {
        "optimizer": None,
        "buffer_names": [],
        "shared_params": {},
        "param_shapes": [OrderedDict((p.name, shards[p.name, "fp32"].shape) for p in group) for group in groups],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "dp_world_size": topology.zero_size,
        "mp_world_size": topology.tp_size,
        "checkpoint_parallel_dimensions": {"pp_degree": topology.pp_size, "tp_degree": topology.tp_size},
        "global_steps": 5,
        "ds_version": "0.19.8",
        "iteration": 5,
    }
    if zero_stage > 1:
        content["frozen_param_shapes"] = OrderedDict((p.name, shards[p.name, "fp32"].shape) for p in frozen)
    if info is not None:
        content["universal_checkpoint_info"] = info
    if not zero_stage:
        states = {
            i: {"step": torch.tensor(5.0), **{s: shards[p.name, s] for s in STATES[1:]}}
            for i, p in enumerate(trainable)
        }
        content["optimizer"] = {"state": states, "param_groups": _param_groups(groups)}
    return content


def _low(p: Parameter, shard: torch.Tensor) -> torch.Tensor:
    return shard.bfloat16() if p.group == FROZEN else shard


def _write_model_states(folder, mp_rank, mine, groups, shards, topology, zero_stage, is_pipelined, info) -> None:
    content = _model_states(mine, groups, topology, zero_stage, info, shards)
    content["module"] = None if is_pipelined else {p.name: _low(p, shards[p.name, "fp32"]) for p in mine}
    if zero_stage > 1:
        content["frozen_param_fragments"] = {p.name: _low(p, shards[p.name, "fp32"]) for p in mine if p.group == FROZEN}
    torch.save(content, folder / f"mp_rank_{mp_rank:02d}_model_states.pt")


def _sub_groups(groups, shards, count) -> list[tuple[int, list[Parameter]]]:
    """(parameter group, members), closed as soon as a rank has SUB_GROUP elements of it."""
    result = []
    for index, group in enumerate(groups):
        members, size = [], 0
        for p in group:
            members.append(p)
            size += -(-shards[p.name, "fp32"].numel() // count)
            if size >= SUB_GROUP or p is group[-1]:
                result.append((index, members))
                members, size = [], 0
    return result


def _dealt(tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
    """`count` equal pieces; what fills the last ones up is not zero, so that whoever reads it is found out."""
    size = -(-tensor.numel() // count)
    padding = torch.full((size * count - tensor.numel(),), 9e9, dtype=tensor.dtype)
    return list(torch.cat([tensor.flatten(), padding]).split(size))


def _write_stage3(folder, mp_rank, mine, sub_groups, shards, topology, prefix, info) -> None:
    count = topology.zero_size
    pieces = {key: _dealt(shard, count) for key, shard in shards.items()}
    for rank in range(count):
        content = _model_states(mine, [members for _, members in sub_groups], topology, 3, info, shards)
        content["module"] = {p.name: torch.zeros(0) for p in mine}
        content["frozen_param_fragments"] = {
            p.name: pieces[p.name, "fp32"][rank].bfloat16() for p in mine if p.group == FROZEN
        }
        torch.save(content, folder / f"zero_pp_rank_{rank}_mp_rank_{mp_rank:02d}_model_states.pt")
        flats = [
            {s: torch.cat([pieces[p.name, s][rank] for p in members]) for s in STATES} for _, members in sub_groups
        ]
        state = {i: {"step": torch.tensor(5.0), **{s: flat[s] for s in STATES[1:]}} for i, flat in enumerate(flats)}
        groups = [
            {"name": name, "lr": 0.1, "params": [i for i, (g, _) in enumerate(sub_groups) if g == group]}
            for group, name in enumerate(("decay", "no_decay"))
        ]
        content = {
            "optimizer_state_dict": {
                "zero_stage": 3,
                "loss_scaler": sys.modules["deepspeed.runtime.fp16.loss_scaler"].LossScaler(),
                "partition_count": count,
                "optimizer_state_dict": {"state": state, "param_groups": groups},
                "fp32_flat_groups": [flat["fp32"] for flat in flats],
            },
            "ds_version": "0.19.8",
        }
        torch.save(content, folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_{mp_rank:02d}_optim_states.pt")


def _write_zero(folder, mp_rank, groups, shards, count, prefix, zero_stage, is_elastic) -> None:
    """Every group: shards one after the other, padded to `count` equal partitions of an even number of elements."""
    files = [{"fp32": [], "state": [], "mappings": [], "paddings": []} for _ in range(count)]
    for group in groups:
        flats = {s: torch.cat([shards[p.name, s].flatten() for p in group] or [torch.zeros(0)]) for s in STATES}
        numel = flats["fp32"].numel()
        size = -(-max(numel, 1) // (2 * count)) * 2
        for rank, file in enumerate(files):
            first, last = rank * size, (rank + 1) * size
            mapping, offset = OrderedDict(), 0
            for p in group:
                n = shards[p.name, "fp32"].numel()
                start, stop = max(first, offset), min(last, offset + n)
                if stop > start:
                    mapping[p.name] = fragment_address(start - first, stop - start)
                offset += n
            parts = {s: torch.cat([f, torch.full((size * count - numel,), 9e9)])[first:last] for s, f in flats.items()}
            padding = max(0, last - max(numel, first))
            file["fp32"].append(parts["fp32"][: size - padding].clone())
            file["state"].append({"step": torch.tensor(5.0), **{s: parts[s].clone() for s in STATES[1:]}})
            file["mappings"].append(mapping)
            file["paddings"].append(padding)
    for rank, file in enumerate(files):
        state = (
            file["state"]
            if is_elastic
            else {
                "state": dict(enumerate(file["state"])),
                "param_groups": [{**g, "params": [i]} for i, g in enumerate(_param_groups(groups))],
            }
        )
        content = {
            "optimizer_state_dict": {
                "loss_scaler": sys.modules["deepspeed.runtime.fp16.loss_scaler"].LossScaler(),
                "zero_stage": zero_stage,
                "base_optimizer_state": state,
                "single_partition_of_fp32_groups": file["fp32"],
                "group_paddings": file["paddings"],
                "partition_count": [count] * len(groups),
                "param_slice_mappings": file["mappings"],
                "ds_version": "0.19.8",
            },
            "ds_version": "0.19.8",
        }
        torch.save(content, folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_{mp_rank:02d}_optim_states.pt")


def _write_layers(folder, mine, shards, pp, tp) -> None:
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for p in mine:
        if pp and p.layer == 0:
            continue  # the tied copy is a partial in DeepSpeed's list of layers and has no file
        parts = 2 if p.name.startswith("layers.") else 1
        layers.setdefault(p.layer, {})[p.name.split(".", parts)[-1]] = _low(p, shards[p.name, "fp32"])
    for layer, content in layers.items():
        torch.save(content, folder / f"layer_{layer:02d}-model_{tp:02d}-model_states.pt")


class _deepspeed_classes:
    """Stand-ins under DeepSpeed's module names while files are pickled, unless DeepSpeed itself is loaded."""

    NAMES = {"deepspeed.utils.tensor_fragment": "fragment_address", "deepspeed.runtime.fp16.loss_scaler": "LossScaler"}

    def __enter__(self):
        self._added = []
        for module_name, class_name in self.NAMES.items():
            parts = module_name.split(".")
            for i in range(1, len(parts) + 1):
                name = ".".join(parts[:i])
                if name not in sys.modules:
                    sys.modules[name] = types.ModuleType(name)
                    self._added.append(name)
            module = sys.modules[module_name]
            if module_name in self._added:
                kind = type(class_name, (), {"__module__": module_name, "__init__": _take_attributes})
                setattr(module, class_name, kind)

    def __exit__(self, *exception):
        for name in self._added:
            del sys.modules[name]


def _take_attributes(self, **attributes):
    self.__dict__.update(attributes)
