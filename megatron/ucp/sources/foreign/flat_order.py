"""Where parameters lie in ZeRO's flat tensors, worked out from the order in which the model states list them.

ZeRO lays parameters one after the other, so an ordered list of lengths and the sizes of the flat tensors
say where each begins. Needed where the files have no table (ZeRO-3), or a wrong one (ZeRO-1 and 2 under
`round_robin_gradients`: DeepSpeed reorders the parameters and writes the table as if it had not).

    sub_groups({"a": 8, "b": 5, "c": 3}, [13, 3])          # [["a", "b"], ["c"]]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.ucp.sources.flat_states import Fragment


def sub_groups(lengths: Mapping[str, int], sizes: Sequence[int]) -> list[list[str]] | None:
    """The parameters of each of ZeRO-3's flat tensors, of these sizes; None if they cannot be divided so. `lengths`, in
    order, are what one rank holds of each parameter, none of them 0, so that there is at most one way."""
    groups: list[list[str]] = []
    remaining = iter(lengths.items())
    for size in sizes:
        groups.append([])
        while size > 0:
            name, length = next(remaining, ("", size + 1))
            groups[-1].append(name)
            size -= length
        if size < 0:
            return None
    return groups if next(remaining, None) is None else None


def flat_fragments(
    lengths: Mapping[str, int], paddings: Sequence[int], partition: int, files: Sequence[Path], group: int
) -> dict[str, list[Fragment]]:
    """Of one group of ZeRO-1 or 2: its parameters one after the other, each followed by its padding, in partitions of
    `partition` elements, one to a file."""
    fragments: dict[str, list[Fragment]] = {}
    begin = 0
    for (name, length), padding in zip(lengths.items(), paddings, strict=True):
        for rank in range(begin // partition, -(-(begin + length) // partition)):
            start, stop = max(rank * partition, begin), min((rank + 1) * partition, begin + length)
            fragment = Fragment(files[rank], group, start - rank * partition, start - begin, stop - begin)
            fragments.setdefault(name, []).append(fragment)
        begin += length + padding
    return fragments
