"""How DeepSpeed's ZeRO lays the parameters of an optimizer into flat tensors, one set for each data-parallel rank.

ZeRO-1 and 2 put the parameters of a group one after the other, pad the end to a multiple of twice the
ranks, and cut that into equal partitions. ZeRO-3 cuts every parameter into equal slices, the last ones padded, and puts
a rank's slices one after the other, in a new flat tensor after every `sub_group_size` elements.

    flats = stage12_flats([{"a": 7, "b": 2}], dp_size=2)     # by rank, by flat tensor
    flats[1][0].segments            # a[6:7], b[0:2], 3 of padding: two partitions of 6
    stage3_flats([{"a": 7, "b": 2}], dp_size=2)[1][0].segments       # a[4:7], 1 of padding, b[1:2]

Sources of these conventions: deepspeed/runtime/zero/stage_1_and_2.py (__init__,
get_data_parallel_partitions), stage3.py (_create_fp16_sub_groups), partition_parameters.py (partition_numel).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Numel = Mapping[str, int]
"""Parameter -> elements, in the order of a group of the optimizer."""
_ALIGNMENT = 2
"""Elements a rank: nccl_start_alignment_factor."""


@dataclass(frozen=True)
class Segment:
    """`name`'s flattened elements [start, stop); padding where there is no name."""

    name: str | None
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Flat:
    """One flat tensor of one rank."""

    group: int
    segments: tuple[Segment, ...]
    padding: int = 0
    """Elements after the last segment (ZeRO-1 and 2), which the file has in the optimizer's states but not in the
    masters. What ZeRO-3 pads is among the segments, and in both."""

    @property
    def numel(self) -> int:
        """Without `padding`."""
        return sum(segment.numel for segment in self.segments)

    def table(self) -> dict[str, tuple[int, int]]:
        """Parameter -> (offset, elements)."""
        found, offset = {}, 0
        for segment in self.segments:
            if segment.name is not None and segment.numel:
                found[segment.name] = offset, segment.numel
            offset += segment.numel
        return found


def stage12_flats(groups: Sequence[Numel], dp_size: int, param_alignment: int = 1) -> list[list[Flat]]:
    """By rank, one for each group. `param_alignment`: elements to a multiple of which each parameter is padded."""
    by_rank: list[list[Flat]] = [[] for _ in range(dp_size)]
    for group, numels in enumerate(groups):
        whole: list[Segment] = []
        for (name, numel), padding in zip(numels.items(), param_paddings(numels, param_alignment), strict=True):
            whole += [Segment(name, 0, numel), Segment(None, 0, padding)]
        total = sum(segment.numel for segment in whole)
        partition = -(-total // (_ALIGNMENT * dp_size)) * _ALIGNMENT
        for rank, flats in enumerate(by_rank):
            segments = _clipped(whole, rank * partition, (rank + 1) * partition)
            held = sum(segment.numel for segment in segments)
            flats.append(Flat(group, segments, partition - held))
    return by_rank


def param_paddings(numels: Numel, alignment: int) -> list[int]:
    """Elements of padding after each parameter; none after the last."""
    paddings, position = [], 0
    for numel in numels.values():
        paddings.append(-(position + numel) % alignment)
        position += numel + paddings[-1]
    return [*paddings[:-1], 0] if paddings else []


def stage3_flats(groups: Sequence[Numel], dp_size: int, sub_group_size: int | None = None) -> list[list[Flat]]:
    """By rank, one for each sub-group; None: one for each group."""
    sub_groups: list[tuple[int, list[tuple[str, int]]]] = []
    for group, numels in enumerate(groups):
        sub_groups += [(group, names) for names in _sub_groups(numels, dp_size, sub_group_size)]
    return [
        [
            Flat(group, tuple(s for name, numel in names for s in stage3_slice(name, numel, rank, dp_size)))
            for group, names in sub_groups
        ]
        for rank in range(dp_size)
    ]


def stage3_slice(name: str, numel: int, rank: int, dp_size: int) -> tuple[Segment, Segment]:
    """What a rank has of a parameter, and its padding."""
    size = -(-numel // dp_size)
    start, stop = min(rank * size, numel), min((rank + 1) * size, numel)
    return Segment(name, start, stop), Segment(None, 0, size - (stop - start))


def _sub_groups(numels: Numel, dp_size: int, size: int | None) -> list[list[tuple[str, int]]]:
    closed: list[list[tuple[str, int]]] = []
    names: list[tuple[str, int]] = []
    held = 0
    for name, numel in numels.items():
        names.append((name, numel))
        held += -(-numel // dp_size)
        if size is not None and held >= size:
            closed.append(names)
            names, held = [], 0
    return closed + ([names] if names else [])


def _clipped(segments: Sequence[Segment], start: int, stop: int) -> tuple[Segment, ...]:
    """What lies in [start, stop) of them, laid one after the other."""
    kept, position = [], 0
    for s in segments:
        first, last = max(start - position, 0), min(stop - position, s.numel)
        if last > first:
            kept.append(Segment(s.name, s.start + first, s.start + last))
        position += s.numel
    return tuple(kept)
