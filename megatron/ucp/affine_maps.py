"""DeepSpeed's affine maps -> layouts: how AutoTP and AutoEP say where a parameter's elements lie.

A map lists for each rank the pieces that make up its shard: blocks of the whole parameter, each with
offsets and strides on both sides. Every map that DeepSpeed makes cuts one dimension, so a rank's pieces are intervals
of it, which is what a Cut's spans are. A map that is more than that is refused.

    maps = AffineMaps.of(model_states["universal_checkpoint_info"])
    layout = maps.layout("model.layers.0.mlp.up_proj.weight", [(24, 32), (24, 32)])   # None where there is no map of it

Source of the format: deepspeed/checkpoint/affine.py (ParamAffineMap, AffinePiece), and for names
module_inject/layers.py (collect_autotp_universal_checkpoint_info).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.ucp.errors import LayoutError, UnsupportedCheckpointError
from megatron.ucp.json_checks import shown
from megatron.ucp.layout import Cut, Layout, Part, ShardRank
from megatron.ucp.manifest_schema import MAX_DIMS, MAX_ELEMENTS

KEY = "affine_map"
_VERSION = 1
_MAX_PIECES = 100_000
"""Of one parameter on all ranks."""
_PATTERN_NAMES = {dim: f"shard_{letter}" for dim, letter in enumerate("vh")}


@dataclass(frozen=True)
class AffineMaps:
    by_name: Mapping[str, Any]
    by_pattern: Sequence[tuple[re.Pattern[str], Any]]
    """Where a pattern is more than one name in full."""

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> AffineMaps:
        """`info`: universal_checkpoint_info. Raises UnsupportedCheckpointError for another version of the format."""
        held = info.get(KEY) or {}
        if held and held.get("version", _VERSION) != _VERSION:
            raise UnsupportedCheckpointError(
                "affine maps of an unknown version", found=shown(held.get("version")), expected=_VERSION
            )
        by_name, by_pattern = {}, []
        for pattern, entry in (held.get("params") or {}).items():
            name = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^").removesuffix("$"))
            if pattern == f"^{re.escape(name)}$":
                by_name[name] = entry
            else:
                by_pattern.append((re.compile(pattern), entry))
        return cls(by_name, by_pattern)

    def empty_shards(self, tp_rank: int) -> dict[str, tuple[int, ...]]:
        """Parameters of which the rank holds no element (of more ranks than key/value heads), and the shape of that.
        DeepSpeed does not optimize these there, and does not list them among that rank's parameters."""
        found = {}
        for name, entry in self.by_name.items():
            held = entry["ranks"].get(tp_rank)
            if held is not None and 0 in _shape(held["shard_shape"]):
                found[name] = _shape(held["shard_shape"])
        return found

    def of_name(self, name: str) -> Any:
        entry = self.by_name.get(name)
        if entry is None:
            entry = next((entry for pattern, entry in self.by_pattern if pattern.match(name)), None)
        return entry

    def layout(self, name: str, shards: Sequence[tuple[int, ...]]) -> Layout | None:
        """`shards`: the shapes that the ranks hold, by tp rank. Raises UnsupportedCheckpointError or LayoutError, with
        the parameter's name."""
        entry = self.of_name(name)
        if entry is None:
            return None
        try:
            return layout_from_map(entry, "tp", len(shards), num_dims=len(shards[0]))
        except (LayoutError, UnsupportedCheckpointError) as error:
            raise type(error)(
                f"{name}: {error.what}", found=error.found, expected=error.expected, do=error.do
            ) from error


def layout_from_map(entry: Mapping[str, Any], axis: str, num_ranks: int, num_dims: int | None = None) -> Layout:
    """`entry`: what ParamAffineMap.to_dict gives. `num_dims`: of the parameter itself, where the map may be of a view
    of it with its first dimension divided. Raises LayoutError for what contradicts itself, UnsupportedCheckpointError
    for what is no cut of one dimension, or scales what it holds."""
    shape = _shape(entry["logical_shape"])
    ranks = {int(rank): held for rank, held in entry["ranks"].items()}
    if set(ranks) != set(range(num_ranks)):
        raise LayoutError("the affine map is of other ranks", found=sorted(ranks), expected=f"{num_ranks} ranks")
    if sum(len(held["pieces"]) for held in ranks.values()) > _MAX_PIECES:
        raise UnsupportedCheckpointError(f"the affine map has more than {_MAX_PIECES} pieces")
    shard_shapes = [_shape(ranks[rank]["shard_shape"]) for rank in range(num_ranks)]
    dim = _cut_dim(shape, shard_shapes, [piece for held in ranks.values() for piece in held["pieces"]])
    if dim is None and axis == "ep":
        dim = 0  # one rank has all experts, and they can still be dealt out
    if dim is None:
        merged = len(shape) + 1 - (num_dims or len(shape))
        shape = (math.prod(shape[:merged]), *shape[merged:])
        return Layout.replicate(shape) if num_ranks > 1 else Layout.unique(shape)
    spans = tuple(_spans(shape, shard_shapes[rank], dim, ranks[rank]["pieces"]) for rank in range(num_ranks))
    if num_dims is not None and 0 < num_dims < len(shape):
        shape, dim, spans = _undivided(shape, dim, spans, num_dims)
    layout = Layout(_PATTERN_NAMES.get(dim, "shard_nc"), shape, (Cut(dim, (Part(shape[dim]),), axis, spans=spans),))
    plain = _without_spans(layout, axis, num_ranks)
    return layout if plain is None else plain


def _cut_dim(shape: tuple[int, ...], shards: Sequence[tuple[int, ...]], pieces: Sequence[Any]) -> int | None:
    """None where every rank holds all of it."""
    shapes = [*shards, *(_shape(piece["shape"]) for piece in pieces)]
    if any(len(found) != len(shape) for found in shapes):
        raise LayoutError("shards and pieces have not the dimensions of the whole", found=shapes[:20], expected=shape)
    dims = sorted({dim for found in shapes for dim, n in enumerate(found) if n != shape[dim]})
    if len(dims) > 1:
        raise UnsupportedCheckpointError("an affine map that cuts several dimensions", found=dims)
    return dims[0] if dims else None


def _spans(shape: tuple[int, ...], shard: tuple[int, ...], dim: int, pieces: Any) -> tuple[tuple[int, int], ...]:
    """Of one rank, in the order of its shard."""
    there, here = _strides(shape), _strides(shard)
    placed: list[tuple[int, int, int]] = []
    for piece in pieces:
        if piece.get("scale", 1.0) != 1.0:
            raise UnsupportedCheckpointError(
                "the shard holds it times a number, which the optimizer's states cannot be moved through",
                found=shown(piece["scale"]),
                expected="scale 1",
            )
        extents = _shape(piece["shape"])
        if not all(extents):
            continue
        starts = []
        for side, strides, whole in (("source", there, shape), ("dest", here, shard)):
            offset, given = piece[side]
            is_box = all(a == b or n == 1 for a, b, n in zip(given, strides, extents, strict=True))
            if not is_box or not isinstance(offset, int) or offset % strides[dim] or offset < 0:
                raise UnsupportedCheckpointError("an affine map with a piece that is no box", found=str(piece)[:200])
            start = offset // strides[dim]
            if start + extents[dim] > whole[dim]:
                raise LayoutError("a piece of an affine map lies outside", found=str(piece)[:200], expected=whole)
            starts.append(start)
        placed.append((starts[1], starts[0], extents[dim]))
    placed.sort()
    reached = 0
    for here_start, _, extent in placed:
        if here_start != reached:
            raise LayoutError("the pieces of an affine map do not tile the shard", found=placed[:20], expected=shard)
        reached += extent
    if reached != shard[dim]:
        raise LayoutError("the pieces of an affine map do not fill the shard", found=reached, expected=shard[dim])
    return tuple((start, start + extent) for _, start, extent in placed)


def _undivided(
    shape: tuple[int, ...], dim: int, spans: tuple[tuple[tuple[int, int], ...], ...], num_dims: int
) -> tuple[tuple[int, ...], int, tuple[tuple[tuple[int, int], ...], ...]]:
    """The same cut of the parameter whose first dimension is the first of `shape` taken together."""
    merged = len(shape) + 1 - num_dims
    whole = (math.prod(shape[:merged]), *shape[merged:])
    if dim >= merged:
        return whole, dim - merged + 1, spans
    times, extent, unit = math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 : merged])
    if times * sum(map(len, spans)) > _MAX_PIECES:
        raise UnsupportedCheckpointError(f"the affine map has more than {_MAX_PIECES} pieces")
    repeated = tuple(
        tuple(((i * extent + a) * unit, (i * extent + b) * unit) for i in range(times) for a, b in of_rank)
        for of_rank in spans
    )
    return whole, 0, repeated


def _without_spans(layout: Layout, axis: str, num_ranks: int) -> Layout | None:
    """The same cut said plainly, which is of any number of ranks; None where that is another cut."""
    plain = layout.without_padding()
    try:
        for rank in range(num_ranks):
            at = ShardRank(rank, num_ranks) if axis == "tp" else ShardRank(ep_rank=rank, ep_size=num_ranks)
            if [(b.atomic, b.shard) for b in plain.boxes(at)] != [(b.atomic, b.shard) for b in layout.boxes(at)]:
                return None
    except LayoutError:  # fewer elements than ranks
        return None
    return plain


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or len(value) > MAX_DIMS:
        raise LayoutError("no shape in an affine map", found=shown(value))
    if any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= MAX_ELEMENTS for n in value):
        raise LayoutError("no shape in an affine map", found=shown(value))
    return tuple(value)


def _strides(shape: Sequence[int]) -> list[int]:
    """Of a tensor whose elements lie one after the other."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return strides
