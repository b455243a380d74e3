"""The digest of a live engine's state: one number per parameter and state, the same under every topology.

Each rank digests only the intervals it holds; digests add up, so one all-reduce of two int64 per parameter and
state finishes it. Copies (norms under TP, a tied embedding under PP) are counted once and the others are held
against it: copies that drifted apart are found here, before they are saved.

    digests = state_digests(engine_state)      # collective over the world
    digests["layers.0.mlp.dense_h_to_4h.weight"]["exp_avg"]      # 32 hex digits
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from megatron.training.engine_state import EngineState
from megatron.training.reporting import told_by_rank_0
from megatron.ucp.digest import Digest, digest_runs
from megatron.ucp.layout import Layout, ShardRank

MASTER = "fp32"
"""Name of the master weight among the states, as on disk."""


class DivergedCopiesError(RuntimeError):
    """Ranks that must hold the same values of a parameter do not."""


def state_digests(state: EngineState) -> dict[str, dict[str, str]]:
    """{canonical name: {state: hex}}. Collective over the world. Raises DivergedCopiesError on every rank."""
    names = sorted(state.layouts)
    kinds = (MASTER, *state.state_names)
    row = {name: index for index, name in enumerate(names)}
    counted = torch.zeros(len(names), len(kinds), 2, dtype=torch.int64)
    held = torch.zeros_like(counted)
    for interval in state.intervals:
        for column, kind in enumerate(kinds):
            values = interval.master if kind == MASTER else interval.state(state.base, kind)
            layout = state.layouts[interval.name]
            place = row[interval.name], column
            everything = own = digest_runs(values, interval.runs, name=interval.name, state=kind, shape=layout.shape)
            if not np.array_equal(interval.counted_runs, interval.runs):
                own = digest_runs(values, interval.counted_runs, name=interval.name, state=kind, shape=layout.shape)
            held[place] += torch.tensor(everything.to_int64_pair())
            counted[place] += torch.tensor(own.to_int64_pair())
    device = state.engine.device
    counted = _summed(counted.to(device), None)
    _check_copies(state, names, kinds, held.to(device), counted)
    counted = counted.cpu()
    return {
        name: {kind: Digest.from_int64_pair(counted[i, j].tolist()).hex() for j, kind in enumerate(kinds)}
        for i, name in enumerate(names)
    }


def _summed(table: torch.Tensor, group: dist.ProcessGroup | None, size: int | None = None) -> torch.Tensor:
    """int64 sums wrap around, which is the digest's own arithmetic."""
    if size != 1:
        dist.all_reduce(table, group=group)
    return table


def _check_copies(
    state: EngineState, names: list[str], kinds: tuple[str, ...], held: torch.Tensor, counted: torch.Tensor
) -> None:
    """Every copy of a parameter, summed over the ranks that share it, must have the digest that is saved."""
    context = state.context
    if not state.is_replicated:
        held = _summed(held, context.zero_group, context.zero_size)
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
            f"{name} ({kinds[j]}) on pp rank {context.pp_rank}, tp rank {context.tp_rank}"
            for j in range(len(kinds))
            if not torch.equal(copy[i, j], counted[i, j])
        ]
    everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, diverged)
    found = sorted({line for lines in everywhere for line in lines})
    if found:
        with told_by_rank_0(dist.get_rank()):
            raise DivergedCopiesError(
                "copies of parameters that must be equal have drifted apart (a gradient was not reduced, or a copy "
                "was written to); nothing was saved:\n  " + "\n  ".join(found[:40])
            )


def _is_partly_replicated(layout: Layout, tp_size: int) -> bool:
    """Cut over tp, but with parts that several ranks hold: its shards do not add up to one copy."""
    ranks = [ShardRank(tp_rank, tp_size) for tp_rank in range(tp_size)]
    return layout.is_cut_over("tp") and any(layout.boxes(r) != layout.boxes(r, owned=True) for r in ranks)
