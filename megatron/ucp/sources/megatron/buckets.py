"""Which parameter is where in the flat buckets of a `dp_reshardable` checkpoint.

states = find_in_buckets(tensors, model, args)        # (name there, state) -> where it lies

The file has neither names nor order: of each rank of tensor and pipeline parallelism a few one-dimensional tensors, and
where there are experts those of a second optimizer, of each rank that has some.
Known is how megatron-core 0.16.1 fills them (distributed/param_and_grad_buffer.py): the parameters in reverse order of
their registration, each from a multiple of 64 elements on, a new bucket where one is full. So an order is proposed, it
must end where every bucket ends and start where its chunks do, and then core.py compares the masters found with the
weights. One that does not fit is refused. A tensor-parallel rank's shard of a parameter lies there as it is in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from megatron.ucp.errors import UnsupportedCheckpointError
from megatron.ucp.layout import Layout, Part, ShardRank
from megatron.ucp.naming.gpt_model import GptModel
from megatron.ucp.runs import Runs, clip_local, shard_runs
from megatron.ucp.sources.dcp.metadata import Metadata, SavedTensor
from megatron.ucp.sources.megatron.tensors import MASTER, CoreTensors, Held

_BUCKET = re.compile(
    r"(?:chained_(\d{1,3})\.)?optimizer\.distributed\.dp_group_idx_(\d{1,6})\.gbuf_idx_(\d{1,3})\.dtype_\((.+)\)\.bucket_idx_(\d{1,6})\."
    r"(param|exp_avg|exp_avg_sq)"
)
_ALIGNED = 64
_STATES = {"param": MASTER, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_NORM_FIRST = (
    "input_layernorm",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "mlp.router",
    "mlp.shared_experts.linear_fc1",
    "mlp.shared_experts.linear_fc2",
)
"""Of a block of megatron-core's own modules (the local spec)."""
_NORM_INSIDE = (_NORM_FIRST[1], _NORM_FIRST[0], *_NORM_FIRST[2:])
"""Of Transformer Engine's, where a norm is a part of the linear layer after it."""
_EXPERTS = "mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2"


@dataclass(frozen=True)
class FlatState:
    """One state of a parameter: runs in chunks of buckets."""

    found: tuple[tuple[str, int, Runs], ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple({key: None for key, _, _ in self.found})

    def parts(self, metadata: Metadata) -> Iterator[tuple[str, int, Runs]]:
        return iter(self.found)


@dataclass(frozen=True)
class _Rank:
    """Of tensor and pipeline parallelism."""

    number: int
    buckets: tuple[tuple[str, SavedTensor], ...]
    """The first state's, in order: (name without the state, the tensor)."""


def find_in_buckets(tensors: CoreTensors, model: GptModel, args: Mapping[str, Any]) -> dict[tuple[str, str], Held]:
    """Raises UnsupportedCheckpointError where the buckets cannot be understood."""
    degrees = _Degrees.of(args)
    optimizers = _ranks(tensors)
    faults = []
    if len(optimizers) != 1 + model.has_experts:
        faults.append(f"buckets of {len(optimizers)} optimizer(s): one, and one of experts where there are any")
    for ranks, of_experts in zip(optimizers, (False, True)):
        count = degrees.pp * (degrees.etp * degrees.ep if of_experts else degrees.tp)
        if len(ranks) != count:
            faults.append(f"buckets of {len(ranks)} rank(s){' of experts' * of_experts}, of {degrees}")
    pp = degrees.pp
    if model.num_layers % pp or args.get("virtual_pipeline_model_parallel_size") not in (None, 1):
        faults.append("blocks that are not dealt evenly, in order, to the pipeline's stages")
    if not faults:
        layouts = _layouts(tensors, model)
        dense = [partial(_dense_entries, model, layouts, degrees, order) for order in (_NORM_FIRST, _NORM_INSIDE)]
        experts = [partial(_expert_entries, model, layouts, degrees, together) for together in (False, True)]
        placed = [
            next((found for of in orders if (found := _placed(ranks, of)) is not None), None)
            for ranks, orders in zip(optimizers, (dense, experts))
        ]
        if all(found is not None for found in placed):
            return {key: held for found in placed for key, held in (found or {}).items()}
        faults.append("no order of parameters that is known ends where the buckets end")
    raise UnsupportedCheckpointError(
        "the optimizer's flat buckets (dp_reshardable) are not understood",
        found=faults,
        where=tensors.folder,
        do="load the checkpoint in Megatron-LM once and save it with --dist-ckpt-optim-fully-reshardable",
    )


@dataclass(frozen=True)
class _Degrees:
    """Of parallelism; `etp`: tensor parallelism of experts."""

    tp: int
    pp: int
    ep: int
    etp: int

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> _Degrees:
        def size(key: str, default: int = 1) -> int:
            value = args.get(key)
            return value if type(value) is int and 0 < value < 1 << 16 else default

        tp, pp, ep = (size(f"{axis}_model_parallel_size") for axis in ("tensor", "pipeline", "expert"))
        return cls(tp, pp, ep, size("expert_tensor_parallel_size", tp))

    def __str__(self) -> str:
        told = f"tensor parallelism {self.tp} and pipeline parallelism {self.pp}"
        return told + (f", experts over {self.ep} x {self.etp}" if self.ep * self.etp > 1 else "")


@dataclass(frozen=True)
class _Entry:
    """What a rank has of a parameter: runs of elements of the whole one and of what lies there."""

    name: str
    numel: int
    runs: Runs
    is_counted: bool
    """Copies are left out."""


def _ranks(tensors: CoreTensors) -> list[list[_Rank]]:
    """Of each optimizer, those of one buffer: several are of several models, or of several types of elements."""
    by_rank: dict[int, dict[int, dict[tuple[int, str, int], tuple[str, SavedTensor]]]] = {}
    for key, saved in tensors.metadata.tensors.items():
        match = _BUCKET.fullmatch(key)
        if match and match[6] == "param" and len(saved.shape) == 1:
            place = int(match[3]), match[4], int(match[5])
            found = by_rank.setdefault(int(match[1] or 0), {}).setdefault(int(match[2]), {})
            found[place] = key.removesuffix("param"), saved
    return [
        [_Rank(number, tuple(b for _, b in sorted(buckets.items()))) for number, buckets in sorted(ranks.items())]
        for _, ranks in sorted(by_rank.items())
    ]


def _placed(ranks: list[_Rank], entries_of: Callable[[int], Iterable[_Entry]]) -> dict[tuple[str, str], Held] | None:
    """`entries_of`: a rank's parameters in the order of their registration."""
    found: dict[str, list[tuple[str, int, Runs]]] = {}
    for rank in ranks:
        entries = list(entries_of(rank.number))[::-1]
        starts = _starts(rank, [entry.numel for entry in entries])
        if starts is None:
            return None
        for entry, (bucket, start) in zip(entries, starts, strict=True):
            if entry.is_counted:
                found.setdefault(entry.name, []).extend(
                    _in_chunks(*rank.buckets[bucket], entry.runs, start, entry.numel)
                )
    return {
        (name, state): FlatState(tuple((f"{bucket}{theirs}", number, runs) for bucket, number, runs in parts))
        for name, parts in found.items()
        for theirs, state in _STATES.items()
    }


def _dense_entries(
    model: GptModel, layouts: Mapping[str, Layout], degrees: _Degrees, order: tuple[str, ...], number: int
) -> Iterator[_Entry]:
    """Of a tied output layer on another stage the word embedding's."""
    stage, tp_rank = divmod(number, degrees.tp)
    rank = ShardRank(tp_rank, degrees.tp)
    for name in _registered(model, layouts, degrees.pp, order, stage):
        layout = layouts[name]
        is_counted = _is_counted(name, stage, tp_rank, layout)
        yield _Entry(name, _numel(layout, rank), shard_runs(layout, rank), is_counted)


def _registered(
    model: GptModel, layouts: Mapping[str, Layout], pp: int, order: tuple[str, ...], stage: int
) -> Iterator[str]:
    def of(module: str) -> Iterator[str]:
        yield from (name for kind in ("weight", "bias") if (name := f"{module}.{kind}") in layouts)

    if stage == 0:
        yield from of("embedding.word_embeddings")
        yield from of("embedding.position_embeddings")
    for layer in _layers(model, pp, stage):
        for module in order:
            yield from of(f"decoder.layers.{layer}.{module}")
    if stage == pp - 1:
        yield from of("decoder.final_layernorm")
        if model.untie_embeddings_and_output_weights:
            yield from of("output_layer")
        elif pp > 1:
            yield "embedding.word_embeddings.weight"


def _expert_entries(
    model: GptModel, layouts: Mapping[str, Layout], degrees: _Degrees, together: bool, number: int
) -> Iterator[_Entry]:
    """Ranks are counted over tensor parallelism first, then over experts, then over stages (parallel_state.py's
    expert_tensor_model_pipeline group). `together`: all experts' first matrices, then all second ones, as Transformer
    Engine's grouped ones; else expert by expert."""
    rest, etp_rank = divmod(number, degrees.etp)
    stage, ep_rank = divmod(rest, degrees.ep)
    rank = ShardRank(etp_rank, degrees.etp)
    for layer in _layers(model, degrees.pp, stage):
        count = model.num_experts_of(layer)
        if count == 1:
            continue
        if count % degrees.ep:
            return
        here = range(ep_rank * count // degrees.ep, (ep_rank + 1) * count // degrees.ep)
        names = [f"decoder.layers.{layer}.{module}.{kind}" for module in _EXPERTS for kind in ("weight", "bias")]
        pairs = product(names, here) if together else ((name, expert) for expert, name in product(here, names))
        for name, expert in pairs:
            if name not in layouts:
                continue
            layout = layouts[name]  # of one expert
            shift = np.array([expert * layout.numel, 0, 0], dtype=np.int64)
            is_counted = layout.is_cut_over("tp") or etp_rank == 0
            yield _Entry(name, _numel(layout, rank), shard_runs(layout, rank) + shift, is_counted)


def _layers(model: GptModel, pp: int, stage: int) -> range:
    per_stage = model.num_layers // pp
    return range(stage * per_stage, (stage + 1) * per_stage)


def _is_counted(name: str, stage: int, tp_rank: int, layout: Layout) -> bool:
    """Copies are left out: what is not cut lies with every tensor-parallel rank, a tied output layer on the last
    stage too."""
    if name == "embedding.word_embeddings.weight" and stage > 0:
        return False
    return layout.is_cut_over("tp") or tp_rank == 0


def _starts(rank: _Rank, sizes: list[int]) -> list[tuple[int, int]] | None:
    """(bucket, first element) of each; None where they do not end where the buckets end, or do not start where chunks
    do."""
    found, bucket, position = list[tuple[int, int]](), 0, 0
    first_elements = [{chunk.offsets[0] for chunk in saved.chunks} for _, saved in rank.buckets]
    for numel in sizes:
        position = _aligned(position)
        if bucket < len(rank.buckets) and position >= rank.buckets[bucket][1].shape[0]:
            bucket, position = bucket + 1, 0
        if bucket >= len(rank.buckets) or position not in first_elements[bucket]:
            return None
        if position + numel > rank.buckets[bucket][1].shape[0]:
            return None
        found.append((bucket, position))
        position += numel
    is_end = bucket == len(rank.buckets) - 1 and rank.buckets[bucket][1].shape[0] in (position, _aligned(position))
    return found if is_end else None


def _aligned(position: int) -> int:
    return -(-position // _ALIGNED) * _ALIGNED


def _in_chunks(bucket: str, saved: SavedTensor, runs: Runs, start: int, numel: int) -> Iterator[tuple[str, int, Runs]]:
    for number, chunk in enumerate(saved.chunks):
        low, high = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
        if low < start + numel and high > start:
            # In elements of the parameter's shard, then of the chunk.
            inside = clip_local(runs, max(low - start, 0), high - start)
            inside = inside + np.array([0, max(start - low, 0), 0])
            if len(inside):
                yield bucket, number, inside


def _numel(layout: Layout, rank: ShardRank) -> int:
    numel = 1
    for extent in layout.shard_shape(rank):
        numel *= extent
    return numel


def _layouts(tensors: CoreTensors, model: GptModel) -> dict[str, Layout]:
    """By their names there; of experts' those of one."""
    found = {}
    for name, info in tensors.manifest.parameters.items():
        shape = info.layout.shape[1:] if ".mlp.experts." in name else info.layout.shape
        found[name] = _layout(name, shape, tensors.rows_there(name), model)
    return found


def _layout(name: str, shape: tuple[int, ...], rows: int, model: GptModel) -> Layout:
    """How Megatron-Core cuts it over tensor-parallel ranks. `rows`: with the vocabulary's padding."""
    if ".linear_fc1." in name:
        half = shape[0] // 2
        return Layout.shard_nc(shape, 0, (Part(half), Part(half))) if model.swiglu else Layout.shard_v(shape)
    if ".linear_qkv." in name:
        return Layout.shard_v(shape)
    if name.startswith(("embedding.word_embeddings.", "output_layer.")):
        return Layout.shard_v(shape, padded=rows)
    if name.endswith((".linear_proj.weight", ".linear_fc2.weight")):
        return Layout.shard_h(shape)
    return Layout.replicate(shape)
