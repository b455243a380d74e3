"""Which parameter is where in the flat buckets of a `dp_reshardable` checkpoint.

states = find_in_buckets(tensors, model, args)        # (name there, state) -> where it lies

The file has neither names nor order: of each rank of tensor and pipeline parallelism a few one-dimensional tensors.
Known is how megatron-core 0.16.1 fills them (distributed/param_and_grad_buffer.py): the parameters in reverse order of
their registration, each from a multiple of 64 elements on, a new bucket where one is full. So an order is proposed, it
must end where every bucket ends and start where its chunks do, and then core.py compares the masters found with the
weights. One that does not fit is refused. A tensor-parallel rank's shard of a parameter lies there as it is in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.ucp.errors import UnsupportedCheckpointError
from megatron.ucp.layout import Layout, Part, ShardRank
from megatron.ucp.naming.gpt_model import GptModel
from megatron.ucp.runs import Runs, clip_local, shard_runs
from megatron.ucp.sources.dcp.metadata import Metadata, SavedTensor
from megatron.ucp.sources.megatron.tensors import MASTER, CoreTensors, Held

_BUCKET = re.compile(
    r"optimizer\.distributed\.dp_group_idx_(\d{1,6})\.gbuf_idx_(\d{1,3})\.dtype_\((.+)\)\.bucket_idx_(\d{1,6})\."
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
)
"""Of a block of megatron-core's own modules (the local spec)."""
_NORM_INSIDE = (_NORM_FIRST[1], _NORM_FIRST[0], *_NORM_FIRST[2:])
"""Of Transformer Engine's, where a norm is a part of the linear layer after it."""


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
    tp, pp = (_size(args.get(f"{axis}_model_parallel_size")) for axis in ("tensor", "pipeline"))
    ranks = _ranks(tensors)
    faults = []
    if len(ranks) != tp * pp:
        faults.append(f"buckets of {len(ranks)} rank(s), of tensor parallelism {tp} and pipeline parallelism {pp}")
    if model.has_experts:
        faults.append("experts, whose buckets are of their own")
    if model.num_layers % pp or args.get("virtual_pipeline_model_parallel_size") not in (None, 1):
        faults.append("blocks that are not dealt evenly, in order, to the pipeline's stages")
    if not faults:
        for order in (_NORM_FIRST, _NORM_INSIDE):
            found = _placed(tensors, model, ranks, order, tp, pp)
            if found is not None:
                return found
        faults.append("no order of parameters that is known ends where the buckets end")
    raise UnsupportedCheckpointError(
        "the optimizer's flat buckets (dp_reshardable) are not understood",
        found=faults,
        where=tensors.folder,
        do="load the checkpoint in Megatron-LM once and save it with --dist-ckpt-optim-fully-reshardable",
    )


def _size(value: Any) -> int:
    return value if type(value) is int and 0 < value < 1 << 16 else 1


def _ranks(tensors: CoreTensors) -> list[_Rank]:
    """Those of one buffer: several are of several models, or of several types of elements."""
    by_rank: dict[int, dict[tuple[int, str, int], tuple[str, SavedTensor]]] = {}
    for key, saved in tensors.metadata.tensors.items():
        match = _BUCKET.fullmatch(key)
        if match and match[5] == "param" and len(saved.shape) == 1:
            place = int(match[2]), match[3], int(match[4])
            by_rank.setdefault(int(match[1]), {})[place] = key.removesuffix("param"), saved
    return [_Rank(number, tuple(b for _, b in sorted(found.items()))) for number, found in sorted(by_rank.items())]


def _placed(
    tensors: CoreTensors, model: GptModel, ranks: list[_Rank], order: tuple[str, ...], tp: int, pp: int
) -> dict[tuple[str, str], Held] | None:
    found: dict[str, list[tuple[str, int, Runs]]] = {}
    layouts = {
        name: _layout(name, info.layout.shape, tensors.rows_there(name), model)
        for name, info in tensors.manifest.parameters.items()
    }
    per_stage = model.num_layers // pp
    for rank in ranks:
        stage, tp_rank = divmod(rank.number, tp)
        names = list(_registered(model, order, range(stage * per_stage, (stage + 1) * per_stage), stage, pp, layouts))
        starts = _starts(rank, [(name, _numel(layouts[name], ShardRank(tp_rank, tp))) for name in reversed(names)])
        if starts is None:
            return None
        for name, bucket, start, numel in starts:
            if _is_counted(name, stage, tp_rank, layouts[name]):
                runs = shard_runs(layouts[name], ShardRank(tp_rank, tp))
                found.setdefault(name, []).extend(_in_chunks(*rank.buckets[bucket], runs, start, numel))
    return {
        (name, state): FlatState(tuple((f"{bucket}{theirs}", number, runs) for bucket, number, runs in parts))
        for name, parts in found.items()
        for theirs, state in _STATES.items()
    }


def _registered(
    model: GptModel, order: tuple[str, ...], layers: range, stage: int, pp: int, layouts: Mapping[str, Layout]
) -> Iterator[str]:
    """Names of one rank's parameters in order. Of a tied output layer on another stage the word embedding's."""

    def of(module: str) -> Iterator[str]:
        yield from (name for kind in ("weight", "bias") if (name := f"{module}.{kind}") in layouts)

    if stage == 0:
        yield from of("embedding.word_embeddings")
        yield from of("embedding.position_embeddings")
    for layer in layers:
        for module in order:
            yield from of(f"decoder.layers.{layer}.{module}")
    if stage == pp - 1:
        yield from of("decoder.final_layernorm")
        if model.untie_embeddings_and_output_weights:
            yield from of("output_layer")
        elif pp > 1:
            yield "embedding.word_embeddings.weight"


def _is_counted(name: str, stage: int, tp_rank: int, layout: Layout) -> bool:
    """Copies are left out: what is not cut lies with every tensor-parallel rank, a tied output layer on the last
    stage too."""
    if name == "embedding.word_embeddings.weight" and stage > 0:
        return False
    return layout.is_cut_over("tp") or tp_rank == 0


def _starts(rank: _Rank, sizes: list[tuple[str, int]]) -> list[tuple[str, int, int, int]] | None:
    """(name, bucket, first element, elements) of each; None where they do not end where the buckets end, or do not
    start where chunks do."""
    found, bucket, position = list[tuple[str, int, int, int]](), 0, 0
    first_elements = [{chunk.offsets[0] for chunk in saved.chunks} for _, saved in rank.buckets]
    for name, numel in sizes:
        position = _aligned(position)
        if bucket < len(rank.buckets) and position >= rank.buckets[bucket][1].shape[0]:
            bucket, position = bucket + 1, 0
        if bucket >= len(rank.buckets) or position not in first_elements[bucket]:
            return None
        if position + numel > rank.buckets[bucket][1].shape[0]:
            return None
        found.append((name, bucket, position, numel))
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


def _layout(name: str, shape: tuple[int, ...], rows: int, model: GptModel) -> Layout:
    """How Megatron-Core cuts it over tensor-parallel ranks. `rows`: with the vocabulary's padding."""
    if ".mlp.linear_fc1." in name:
        half = shape[0] // 2
        return Layout.shard_nc(shape, 0, (Part(half), Part(half))) if model.swiglu else Layout.shard_v(shape)
    if ".linear_qkv." in name:
        return Layout.shard_v(shape)
    if name.startswith(("embedding.word_embeddings.", "output_layer.")):
        return Layout.shard_v(shape, padded=rows)
    if name.endswith((".linear_proj.weight", ".linear_fc2.weight")):
        return Layout.shard_h(shape)
    return Layout.replicate(shape)
