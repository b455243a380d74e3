"""How one parameter is cut over ranks: the paper's patterns as constructors of one thing.

A layout is a list of cuts; a cut says along which dimension, over which axis ("tp" or "ep"), and in
which parts (a fused QKV has three, each cut by itself). Boxes, shard shapes, split and merge all follow from it.

    qkv = Layout.shard_nc((10 * 64, 512), dim=0, parts=(Part(8 * 64, unit=64), Part(64, 64, True), Part(64, 64, True)))
    shard = qkv.split(atomic, ShardRank(tp_rank=1, tp_size=2))
    atomic = qkv.merge({ShardRank(t, 2): shards[t] for t in range(2)})

Uneven cuts follow numpy.array_split: the first n % k ranks get one unit more. Patterns are named as in the paper
(Lian et al., "Universal Checkpointing", USENIX ATC 2025): unique, replicate, partial, shard_v, shard_h, shard_hy,
shard_nc. Shards of shard_v are rows of the stored matrix, i.e. of torch's [out, in] weight.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron.ucp.box import Box
from megatron.ucp.errors import LayoutError, ReplicaMismatchError

if TYPE_CHECKING:
    import torch

PATTERNS = ("unique", "replicate", "partial", "shard_v", "shard_h", "shard_hy", "shard_nc")


@dataclass(frozen=True, order=True)
class ShardRank:
    """The coordinates that decide which shard a rank holds. ep matters only to layouts cut over "ep"."""

    tp_rank: int = 0
    tp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1


@dataclass(frozen=True)
class Part:
    size: int
    """Elements along the cut dimension."""
    unit: int = 1
    """Never split: a head's size, say. `size` is a multiple of it."""
    replicate_when_fewer: bool = False
    """With fewer units than ranks, hold each unit on ranks / units consecutive ranks (key/value heads)."""


@dataclass(frozen=True)
class Cut:
    dim: int
    parts: tuple[Part, ...]
    axis: str = "tp"
    padded: int | None = None
    """Extent of the dimension on the shards' side, summed over ranks. What exceeds the atomic extent is padding:
    zero in shards, never in a file."""
    spans: tuple[tuple[tuple[int, int], ...], ...] = ()
    """For a cut that parts do not describe: by rank, the intervals [start, stop) of the dimension that it holds, in the
    order of its shard. Such a cut is of that many ranks alone."""


@dataclass(frozen=True)
class _Interval:
    atomic: tuple[int, int]
    shard: tuple[int, int]
    is_owned: bool


@dataclass(frozen=True)
class Layout:
    pattern: str
    shape: tuple[int, ...]
    """Of the atomic parameter: the true vocabulary, no padding."""
    cuts: tuple[Cut, ...] = ()

    # -- constructors -------------------------------------------------------------------------------------------

    @classmethod
    def unique(cls, shape) -> Layout:
        """Whole on one pipeline stage (not cut, expected on one tp rank or equal on all)."""
        return cls("unique", tuple(shape))

    @classmethod
    def replicate(cls, shape) -> Layout:
        """Whole and equal on every rank; checked when read."""
        return cls("replicate", tuple(shape))

    @classmethod
    def partial(cls, shape) -> Layout:
        """Whole on every tp rank, updated independently; the atomic parameter is the mean."""
        return cls("partial", tuple(shape))

    @classmethod
    def shard_v(cls, shape, padded: int | None = None, unit: int = 1) -> Layout:
        """Dimension 0 over tp: column-parallel weights and their biases, vocabulary embeddings."""
        shape = tuple(shape)
        return cls("shard_v", shape, (Cut(0, (Part(shape[0], unit),), padded=padded),))

    @classmethod
    def shard_h(cls, shape, unit: int = 1) -> Layout:
        """Dimension 1 over tp: row-parallel weights."""
        shape = tuple(shape)
        return cls("shard_h", shape, (Cut(1, (Part(shape[1], unit),)),))

    @classmethod
    def shard_hy(cls, shape, cuts) -> Layout:
        """Several dimensions at once, each over its own axis (experts over ep, their columns over tp)."""
        return cls("shard_hy", tuple(shape), tuple(cuts))

    @classmethod
    def shard_nc(cls, shape, dim: int, parts, axis: str = "tp") -> Layout:
        """Parts of one dimension, each cut by itself: fused q|k|v, gate|up."""
        return cls("shard_nc", tuple(shape), (Cut(dim, tuple(parts), axis),))

    # -- questions ----------------------------------------------------------------------------------------------

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise LayoutError("unknown pattern", found=self.pattern, expected=PATTERNS)
        dims, axes = [cut.dim for cut in self.cuts], [cut.axis for cut in self.cuts]
        if len(set(dims)) != len(dims) or len(set(axes)) != len(axes) or not set(axes) <= {"tp", "ep"}:
            raise LayoutError("every cut needs its own dimension and its own axis, tp or ep", found=self.cuts)
        for cut in self.cuts:
            if not 0 <= cut.dim < len(self.shape):
                raise LayoutError("cut of a dimension the parameter does not have", found=cut.dim, expected=self.shape)
            if sum(part.size for part in cut.parts) != self.shape[cut.dim]:
                raise LayoutError("parts do not add up to the dimension", found=cut.parts, expected=self.shape)
            if cut.padded is not None and (len(cut.parts) != 1 or cut.padded < self.shape[cut.dim]):
                raise LayoutError(
                    "padding needs one part and an extent not below the atomic one",
                    found=f"padded to {cut.padded}",
                    expected=f"at least {self.shape[cut.dim]}",
                )
            if cut.spans:
                _check_spans(cut, self.shape[cut.dim])
            for part in cut.parts:
                if part.unit < 1 or (cut.padded or part.size) % part.unit:
                    raise LayoutError("a part is not a whole number of units", found=part)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def is_cut_over(self, axis: str) -> bool:
        return any(cut.axis == axis for cut in self.cuts)

    @property
    def is_averaged(self) -> bool:
        return self.pattern == "partial"

    def shard_shape(self, rank: ShardRank) -> tuple[int, ...]:
        shape = list(self.shape)
        for cut in self.cuts:
            shape[cut.dim] = _shard_extent(cut, *_position(cut, rank))
        return tuple(shape)

    def boxes(self, rank: ShardRank, owned: bool | None = None) -> tuple[Box, ...]:
        """What the rank holds. With `owned=True` only what no lower tp rank holds too, so that over all ranks every
        element is counted once (digests, choice of a replica); with False only the copies of what others own."""
        is_first = self.is_cut_over("tp") or rank.tp_rank == 0
        # Over ep a dense parameter is not copied: its ZeRO partitions span the expert groups.
        per_dim = [[_Interval((0, n), (0, n), is_first)] if n else [] for n in self.shape]
        for cut in self.cuts:
            per_dim[cut.dim] = _intervals(cut, *_position(cut, rank))
        return tuple(
            Box(tuple(i.atomic for i in block), tuple(i.shard for i in block))
            for block in itertools.product(*per_dim)
            if owned is None or owned == (is_first and all(i.is_owned for i in block))
        )

    def without_padding(self) -> Layout:
        """The same cut of the true extent, which is what a file of the whole parameter has, and of any number of
        ranks."""
        cuts = tuple(
            replace(cut, padded=None, parts=tuple(replace(p, unit=1) for p in cut.parts)) if cut.padded else cut
            for cut in (replace(cut, spans=()) for cut in self.cuts)
        )
        return replace(self, cuts=cuts)

    # -- arithmetic ---------------------------------------------------------------------------------------------

    def split(self, atomic: torch.Tensor, rank: ShardRank) -> torch.Tensor:
        """The rank's shard, a new tensor; padding is zero."""
        if tuple(atomic.shape) != self.shape:
            raise LayoutError("not this layout's parameter", found=tuple(atomic.shape), expected=self.shape)
        shard = atomic.new_zeros(self.shard_shape(rank))
        for box in self.boxes(rank):
            shard[box.shard_slices] = atomic[box.atomic_slices]
        return shard

    def merge(self, shards: Mapping[ShardRank, torch.Tensor]) -> torch.Tensor:
        """The atomic parameter from every rank's shard. Raises LayoutError on a gap or a wrong shape,
        ReplicaMismatchError where copies differ."""
        import torch

        if not shards:
            raise LayoutError("no shards to merge")
        for rank, shard in shards.items():
            if tuple(shard.shape) != self.shard_shape(rank):
                raise LayoutError(
                    "wrong shard shape", found=tuple(shard.shape), expected=self.shard_shape(rank), where=rank
                )
        if self.is_averaged:
            return (
                torch.stack([shards[r].double() for r in sorted(shards)]).mean(0).to(next(iter(shards.values())).dtype)
            )
        atomic = next(iter(shards.values())).new_zeros(self.shape)
        is_filled = torch.zeros(self.shape, dtype=torch.bool)
        for rank in sorted(shards):
            for box in self.boxes(rank):
                block, seen = shards[rank][box.shard_slices], is_filled[box.atomic_slices]
                if bool((seen & (block != atomic[box.atomic_slices]).cpu()).any()):
                    raise ReplicaMismatchError("copies that must be equal differ", found=rank, where=box.atomic)
                atomic[box.atomic_slices] = block
                is_filled[box.atomic_slices] = True
        if not bool(is_filled.all()):
            raise LayoutError("the shards leave a gap", found=f"{int((~is_filled).sum())} elements missing")
        return atomic

    # -- json ---------------------------------------------------------------------------------------------------

    def to_json(self) -> dict:
        cuts = [
            {
                "dim": cut.dim,
                "axis": cut.axis,
                "padded": cut.padded,
                "parts": [[part.size, part.unit, part.replicate_when_fewer] for part in cut.parts],
                **({"spans": [[list(span) for span in of_rank] for of_rank in cut.spans]} if cut.spans else {}),
            }
            for cut in self.cuts
        ]
        return {"pattern": self.pattern, "shape": list(self.shape), "cuts": cuts}

    @classmethod
    def from_json(cls, data: dict) -> Layout:
        cuts = tuple(
            Cut(
                c["dim"],
                tuple(Part(*part) for part in c["parts"]),
                c["axis"],
                c["padded"],
                tuple(tuple((start, stop) for start, stop in of_rank) for of_rank in c.get("spans", ())),
            )
            for c in data["cuts"]
        )
        return cls(data["pattern"], tuple(data["shape"]), cuts)


def _position(cut: Cut, rank: ShardRank) -> tuple[int, int]:
    index, size = (rank.tp_rank, rank.tp_size) if cut.axis == "tp" else (rank.ep_rank, rank.ep_size)
    if not 0 <= index < size:
        raise LayoutError("no such shard", found=rank)
    return index, size


def _units(part: Part, extent: int, index: int, size: int) -> tuple[int, int, bool]:
    """Elements [start, stop) of the part that rank `index` of `size` holds, and whether it is the first holder."""
    num_units = extent // part.unit
    if num_units >= size:
        base, rest = divmod(num_units, size)
        start = index * base + min(index, rest)
        return start * part.unit, (start + base + (index < rest)) * part.unit, True
    if not part.replicate_when_fewer:
        raise LayoutError(
            f"{num_units} unit(s) of {part.unit} cannot be cut over {size} ranks",
            found=part,
            expected=f"at least {size} units, or replicate_when_fewer",
        )
    if size % num_units:
        raise LayoutError(f"{num_units} unit(s) cannot be copied evenly over {size} ranks", found=part)
    copies = size // num_units
    unit = index // copies
    return unit * part.unit, (unit + 1) * part.unit, index % copies == 0


def _check_spans(cut: Cut, extent: int) -> None:
    """Raises LayoutError unless every element of the dimension is held, and by each rank at most once."""
    if len(cut.parts) != 1 or cut.padded is not None:
        raise LayoutError("a cut by spans has one part and no padding", found=cut.parts)
    for rank, spans in enumerate(cut.spans):
        ordered = sorted(spans)
        bounds = [0, *(edge for span in ordered for edge in span), extent]
        if any(stop <= start for start, stop in spans) or bounds != sorted(bounds):
            raise LayoutError(
                f"rank {rank} holds no intervals of the dimension", found=spans, expected=f"0 to {extent}"
            )
    held = sorted(span for spans in cut.spans for span in spans)
    reached = 0
    for start, stop in held:
        if start > reached:
            break
        reached = max(reached, stop)
    if reached < extent:
        raise LayoutError("no rank holds a part of the dimension", found=f"from element {reached}", expected=extent)


def _intervals_of_spans(cut: Cut, index: int, size: int) -> list[_Interval]:
    """Each cut where a lower rank begins or ends to hold the same."""
    _require_ranks(cut, size)
    lower = [span for spans in cut.spans[:index] for span in spans]
    edges = sorted({edge for span in lower for edge in span})
    intervals, shard_base = [], 0
    for start, stop in cut.spans[index]:
        bounds = [start, *edges[bisect.bisect_right(edges, start) : bisect.bisect_left(edges, stop)], stop]
        for first, last in itertools.pairwise(bounds):
            is_owned = not any(a <= first < b for a, b in lower)
            shard = shard_base + first - start
            intervals.append(_Interval((first, last), (shard, shard + last - first), is_owned))
        shard_base += stop - start
    return intervals


def _require_ranks(cut: Cut, size: int) -> None:
    if len(cut.spans) != size:
        raise LayoutError(f"this cut is of {len(cut.spans)} ranks alone", found=f"{size} ranks")


def _intervals(cut: Cut, index: int, size: int) -> list[_Interval]:
    if cut.spans:
        return _intervals_of_spans(cut, index, size)
    intervals, atomic_base, shard_base = [], 0, 0
    for part in cut.parts:
        extent = cut.padded or part.size
        start, stop, is_owned = _units(part, extent, index, size)
        real_stop = min(stop, part.size)
        if real_stop > start:
            intervals.append(
                _Interval(
                    (atomic_base + start, atomic_base + real_stop),
                    (shard_base, shard_base + real_stop - start),
                    is_owned,
                )
            )
        atomic_base += part.size
        shard_base += stop - start
    return intervals


def _shard_extent(cut: Cut, index: int, size: int) -> int:
    if cut.spans:
        _require_ranks(cut, size)
        return sum(stop - start for start, stop in cut.spans[index])
    ranges = [_units(part, cut.padded or part.size, index, size) for part in cut.parts]
    return sum(stop - start for start, stop, _ in ranges)
