"""The digest of a live engine's state: one number per parameter and state, the same under every topology.

Each rank digests only the intervals it holds; digests add up, so one all-reduce of two int64 per parameter and
state finishes it. Copies (norms under TP, a tied embedding under PP) are counted once and the others are held
against it: copies that drifted apart are found here, before they are saved.

    digests = state_digests(engine_state)      # collective over the world
    digests["layers.0.mlp.dense_h_to_4h.weight"]["exp_avg"]      # 32 hex digits
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron.checkpoint.live_memory import LiveMemory
from megatron.engine.engine_state import MASTER, EngineState, IntervalState
from megatron.parallel.agreement import gathered
from megatron.parallel.rank_errors import reported_by_rank_0
from megatron.ucp.digest import Digest
from megatron.ucp.expert_digests import expert_elements, num_experts
from megatron.ucp.layout import Layout, ShardRank
from megatron.ucp.runs import Runs, clip_atomic
from megatron.ucp.save_job import DigestRow, RowDigests, digest_row


class DivergedCopiesError(RuntimeError):
    """Ranks that must hold the same values of a parameter do not."""


@dataclass(frozen=True)
class StateDigests:
    whole: dict[str, dict[str, str]]
    """{canonical name: {state: hex}}; of a frozen parameter only its weight's, widened to fp32."""
    of_experts: dict[str, dict[str, list[str]]]
    """{canonical name: {state: [hex of each expert]}} of all experts whose own add up to the whole."""

    def of(self, names: Container[str]) -> StateDigests:
        """Of these parameters only."""
        whole = {name: values for name, values in self.whole.items() if name in names}
        return StateDigests(whole, {name: values for name, values in self.of_experts.items() if name in names})


def state_digests(state: EngineState) -> dict[str, dict[str, str]]:
    """`StateDigests.whole` of what the engine holds now. Collective over the world. Raises DivergedCopiesError on every
    rank."""
    memory = LiveMemory()
    rows = digest_rows(state, memory.hold, with_experts=False)
    return summed_digests(state, rows, [digest_row(row, memory) for row in rows]).whole


def digest_rows(
    state: EngineState, hold: Callable[[torch.Tensor], int], *, with_experts: bool = True
) -> list[DigestRow]:
    """Of everything this rank holds; `hold` numbers its tensors. Local."""
    rows = []
    for name, held, is_whole in _held(state):
        is_all_counted = held.counted_runs is held.runs or np.array_equal(held.counted_runs, held.runs)
        experts: list[tuple[int, Runs]] = []
        if with_experts and held.layout == state.layouts[name]:
            clipped = [
                (expert, clip_atomic(held.counted_runs, *expert_elements(held.layout, expert)))
                for expert in range(num_experts(held.layout))
            ]
            experts = [(expert, runs) for expert, runs in clipped if len(runs)]
        counted = None if is_all_counted else held.counted_runs
        number, shape = hold(held.values), held.layout.shape
        rows.append(DigestRow(name, held.state, shape, number, held.runs, counted, is_whole, tuple(experts)))
    return rows


def _held(state: EngineState) -> Iterator[tuple[str, IntervalState, bool]]:
    """(name, held, whether every data-parallel rank has all of it)."""
    for interval in state.intervals:
        yield from ((interval.name, held, state.is_replicated) for held in state.states_of(interval))
    for frozen in state.frozen_intervals:
        layout = state.layouts[frozen.name]
        held = IntervalState(MASTER, frozen.weights, layout, frozen.runs, frozen.counted_runs)
        yield frozen.name, held, state.has_whole_frozen


def summed_digests(state: EngineState, rows: Sequence[DigestRow], digests: Sequence[RowDigests]) -> StateDigests:
    """Of the whole state, from every rank's rows and their digests. Collective over the world. Raises
    DivergedCopiesError on every rank."""
    names = sorted(state.layouts)
    every_rank = gathered(sorted({row.state for row in rows}))
    state_names = (MASTER, *sorted({name for of_rank in every_rank for name in of_rank} - {MASTER}))
    index = {name: number for number, name in enumerate(names)}
    counted = torch.zeros(len(names), len(state_names), 2, dtype=torch.int64)
    # What a data-parallel rank has all of, and what it has a piece of.
    wholes, pieces = torch.zeros_like(counted), torch.zeros_like(counted)
    num_holders = torch.zeros(len(names), len(state_names), dtype=torch.int64)
    for row, found in zip(rows, digests, strict=True):
        cell = index[row.name], state_names.index(row.state)
        (wholes if row.is_whole else pieces)[cell] += torch.tensor(found.held.to_int64_pair())
        counted[cell] += torch.tensor(found.counted.to_int64_pair())
        num_holders[cell] += 1
    device = state.engine.device
    counted = _summed(counted.to(device), None)
    num_holders = _summed(num_holders.to(device), None).cpu()
    wholes, context = wholes.to(device), state.context
    # A rank's shard of experts is the experts of its ep rank only: the others' are added.
    over_ep = _summed(wholes.clone(), context.ep_group, context.ep_size)
    is_dealt = torch.tensor([state.layouts[name].is_cut_over("ep") for name in names], device=device)
    sums = torch.where(is_dealt[:, None, None], over_ep, wholes)
    sums += _summed(pieces.to(device), context.zero_group, context.zero_size)
    _check_copies(state, names, state_names, sums, counted)
    counted = counted.cpu()
    whole = {
        name: {
            state_name: Digest.from_int64_pair(counted[i, j].tolist()).hex()
            for j, state_name in enumerate(state_names)
            if num_holders[i, j]
        }
        for i, name in enumerate(names)
    }
    return StateDigests(whole, _expert_digests(state, rows, digests, whole))


def _expert_digests(
    state: EngineState, rows: Sequence[DigestRow], digests: Sequence[RowDigests], whole: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, list[str]]]:
    state_names = sorted({state_name for of_states in whole.values() for state_name in of_states})
    first_row, num_rows = {}, 0
    for name, layout in sorted(state.layouts.items()):
        if count := num_experts(layout):
            first_row[name], num_rows = num_rows, num_rows + count
    if not num_rows:
        return {}
    table = torch.zeros(num_rows, len(state_names), 2, dtype=torch.int64)
    for row, digested in zip(rows, digests, strict=True):
        for (expert, _), own in zip(row.experts, digested.experts, strict=True):
            table[first_row[row.name] + expert, state_names.index(row.state)] += torch.tensor(own.to_int64_pair())
    table = _summed(table.to(state.engine.device), None).cpu()
    found: dict[str, dict[str, list[str]]] = {}
    for name, first in first_row.items():
        for state_name, of_whole in whole[name].items():
            column = table[first : first + num_experts(state.layouts[name]), state_names.index(state_name)]
            of_experts = [Digest.from_int64_pair(pair) for pair in column.tolist()]
            if sum(of_experts, Digest()).hex() == of_whole:
                found.setdefault(name, {})[state_name] = [digest.hex() for digest in of_experts]
    return found


def frozen_digests(state: EngineState, own: Mapping[str, Digest]) -> dict[str, str]:
    """Of every frozen parameter, summed from what each rank counts. Collective over the world."""
    names = sorted(state.frozen)
    table = torch.zeros(len(names), 2, dtype=torch.int64)
    for i, name in enumerate(names):
        table[i] = torch.tensor(own.get(name, Digest()).to_int64_pair())
    table = _summed(table.to(state.engine.device), None).cpu()
    return {name: Digest.from_int64_pair(table[i].tolist()).hex() for i, name in enumerate(names)}


def _summed(table: torch.Tensor, group: dist.ProcessGroup | None, size: int | None = None) -> torch.Tensor:
    """int64 sums wrap around, which is the digest's own arithmetic."""
    if size != 1:
        dist.all_reduce(table, group=group)
    return table


def _check_copies(
    state: EngineState, names: list[str], state_names: tuple[str, ...], held: torch.Tensor, counted: torch.Tensor
) -> None:
    """Every copy of a parameter, summed over the ranks that share it, must have the digest that is saved. `held` is
    summed over the data-parallel ranks where they hold pieces, and over those that share experts."""
    context = state.context
    over_tp = _summed(held.clone(), context.tp_group, context.tp_size)
    diverged = []
    for i, name in enumerate(names):
        layout = state.layouts[name]
        if context.pp_rank not in state.pp_stages[name]:
            continue
        if layout.is_averaged or _is_partly_replicated(layout, context.tp_size):
            continue
        copy = over_tp if layout.is_cut_over("tp") else held
        diverged += [
            f"{name} ({state_names[j]}) on pp rank {context.pp_rank}, tp rank {context.tp_rank}"
            for j in range(len(state_names))
            if not torch.equal(copy[i, j], counted[i, j])
        ]
    everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, diverged)
    found = sorted({line for lines in everywhere for line in lines})
    if found:
        with reported_by_rank_0(dist.get_rank()):
            raise DivergedCopiesError(
                "copies of parameters that must be equal have drifted apart (a gradient was not reduced, or a copy "
                "was written to); nothing was saved:\n  " + "\n  ".join(found[:40])
            )


def _is_partly_replicated(layout: Layout, tp_size: int) -> bool:
    """Cut over tp, but with parts that several ranks hold: its shards do not add up to one copy."""
    ranks = [ShardRank(tp_rank, tp_size) for tp_rank in range(tp_size)]
    return layout.is_cut_over("tp") and any(layout.boxes(r) != layout.boxes(r, owned=True) for r in ranks)
