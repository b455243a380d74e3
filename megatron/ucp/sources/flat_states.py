"""Where a parameter lies in the optimizer's own tensors, beside the flat tensor of masters that ZeRO cut.

The size of a state tensor says how it is laid out, and nothing else is believed. One as long as the flat
tensor is cut at the same places. One as long as all parameters that touch the partition is DeepSpeed's Muon: each rank
keeps the momentum of those parameters whole, one after the other. Any other size is refused by name.

    states = FlatStates(fragments, num_held, flat_sizes, is_muon)
    states.offset(fragment, "exp_avg", ("final_norm.weight", 0))

Source: deepspeed/runtime/zero/stage_1_and_2.py (_muon_momentum_buffer, _get_flat_partition_unpadded).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron.ucp.errors import UnsupportedCheckpointError


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of a (pp, tp) shard, in group `group` of a file, from element `offset` of its flat."""

    file: Path
    group: int
    offset: int
    start: int
    stop: int


Shard = tuple[str, int]
"""(name, shard number). The number is the mp_rank; shards of later ep ranks are numbered on after all mp_ranks."""
Fragments = dict[Shard, list[Fragment]]
"""Who holds which fragment, in rank order."""


def append_fragment(held: list[Fragment], file: Path, group: int, offset: int, numel: int) -> None:
    """What the next rank holds of a shard: its part begins where that of the rank before ends."""
    start = held[-1].stop if held else 0
    held.append(Fragment(file, group, offset, start, start + numel))


@dataclass(frozen=True)
class FlatStates:
    fragments: Mapping[Shard, list[Fragment]]
    num_held: Callable[[Fragment, str], int]
    """Elements of a state's tensor, of a fragment's file and group."""
    flat_sizes: Callable[[Fragment], tuple[int, ...]]
    """Of the flat tensor of masters there, without and with the padding at its end, which DeepSpeed saves or not."""
    is_muon: Callable[[Fragment], bool]
    """Whether the file says that Muon steps the group."""

    def offset(self, fragment: Fragment, state: str, shard: Shard) -> int:
        """Of the fragment's first element in the state's tensor. Raises UnsupportedCheckpointError where the tensor's
        size does not say how it is laid out."""
        held, flats = self.num_held(fragment, state), self.flat_sizes(fragment)
        begins, total = self._begins[fragment.file, fragment.group], self._totals[fragment.file, fragment.group]
        whole = begins[shard] + fragment.start
        fits_flat, fits_whole = held in flats, held == total
        if fits_flat and (not fits_whole or whole == fragment.offset or not self.is_muon(fragment)):
            return fragment.offset
        if fits_whole and not fits_flat:
            return whole
        reason = "could be laid out in two ways" if fits_flat else "is not laid out as its parameters are"
        raise UnsupportedCheckpointError(
            f"the optimizer's {state} {reason}",
            found=f"{held} elements in group {fragment.group}, where the masters have {flats[0]}",
            expected=f"{flats[0]}, or {total}: all of the {len(begins)} parameters there",
            where=fragment.file,
            do="save it again under ZeRO-3 or on one data-parallel rank, or resume without the optimizer's state",
        )

    def check(self, states_of: Mapping[str, tuple[str, ...]]) -> None:
        """Every state of every parameter, so that what cannot be read is known before anything is written."""
        for (name, number), fragments in self.fragments.items():
            for state in states_of.get(name, ())[1:]:
                for fragment in fragments:
                    self.offset(fragment, state, (name, number))

    @cached_property
    def _order(self) -> dict[tuple[Path, int], list[tuple[int, Shard, int]]]:
        """By file and group: (offset, shard, elements of the whole shard), as they lie."""
        order: dict[tuple[Path, int], list[tuple[int, Shard, int]]] = {}
        for shard, fragments in self.fragments.items():
            for fragment in fragments:
                entry = fragment.offset, shard, fragments[-1].stop
                order.setdefault((fragment.file, fragment.group), []).append(entry)
        return {key: sorted(entries) for key, entries in order.items()}

    @cached_property
    def _begins(self) -> dict[tuple[Path, int], dict[Shard, int]]:
        """Where each shard would begin if all that touch the partition lay there whole."""
        begins: dict[tuple[Path, int], dict[Shard, int]] = {}
        for key, entries in self._order.items():
            position, begins[key] = 0, {}
            for _, shard, numel in entries:
                begins[key][shard] = position
                position += numel
        return begins

    @cached_property
    def _totals(self) -> dict[tuple[Path, int], int]:
        return {key: sum(numel for *_, numel in entries) for key, entries in self._order.items()}
