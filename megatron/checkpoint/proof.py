"""Is what stands in the engine what was saved? By digest, after every load.

prove(state, source, with_optimizer=True, kind="direct", frozen=frozen)         # collective over the world
"""

from __future__ import annotations

import contextlib
import logging

import torch.distributed as dist

from megatron.checkpoint.errors import DamagedCheckpointError, all_ranks_or_none, on_rank_0
from megatron.checkpoint.frozen_weights import FrozenParts, frozen_faults
from megatron.checkpoint.judging import adapters_begun, is_trained_in
from megatron.checkpoint.state_digest import state_digests
from megatron.engine.engine_state import MASTER, EngineState
from megatron.parallel.agreement import gathered
from megatron.ucp.digest import Digest, digest_runs, total
from megatron.ucp.errors import UcpError, listed
from megatron.ucp.execute import chunks
from megatron.ucp.expert_digests import changed_experts
from megatron.ucp.expert_labels import experts_clause, label_of
from megatron.ucp.file_table import changed_files
from megatron.ucp.sources import Source

log = logging.getLogger(__name__)


def prove(state: EngineState, source: Source, *, with_optimizer: bool, kind: str, frozen: FrozenParts) -> None:
    """`kind` of resume, for the log; `frozen`: of the weights that are not trained, what was read. Raises
    DamagedCheckpointError, on every rank, naming what differs and the files that changed."""
    placed, begun = state_digests(state), adapters_begun(state.layouts, source)
    saved = source.manifest.digests or read_digests(source, with_optimizer)
    wrong = frozen_faults(state, frozen, saved, placed)
    wrong += [
        f"{name} ({key})"
        for name, digests in placed.items()
        if name not in state.frozen and name not in begun
        for key in (digests if with_optimizer and is_trained_in(source, name) else (MASTER,))
        if saved.get(name, {}).get(key) != digests.get(key)
    ]
    if wrong:
        changed = on_rank_0(lambda: changed_files(source.folder, source.manifest))
        lines = on_rank_0(lambda: _naming_experts(source, wrong))
        raise DamagedCheckpointError(
            f"what was placed in the engine is not what was saved in {source.folder}; "
            f"{len(wrong)} digests differ: {listed(lines, 20, is_sorted=True)}. "
            + (
                f"Files changed since they were written: {listed(changed, 20)}: copy them again from where they were "
                f"saved{experts_clause(source.manifest, changed)}."
                if changed
                else "No file is known to have changed, so this is a defect: run `python -m megatron.ucp verify` on it."
            )
        )
    if not source.manifest.digests:
        log.info("state digests equal those of the files, which were read once more (%s resume)", kind)
    elif not with_optimizer:
        log.info("weight digests equal those at save; optimizer states were not loaded")
    elif placed == saved:
        log.info("state digest %s equals the one at save (%s resume)", total(placed), kind)
    else:
        log.info("state digests equal those at save, of all that both runs train (%s resume)", kind)
    if source.manifest.doubt:
        log.warning(
            "warning: %s is unverified (%s): that digest proves this load, not what was once saved",
            source.folder,
            source.manifest.doubt,
        )
    if begun:
        log.info("%d adapter parameters begin here: the checkpoint has none", len(begun))
    _tell_what_changed(state, source, with_optimizer)


def read_digests(source: Source, with_optimizer: bool) -> dict[str, dict[str, str]]:
    """Of a Source that carries none: of its files, whole parameters in their order, each read by one rank, where a load
    read slices. Collective over the world. Raises, on every rank, what reading raises."""
    parameters = source.manifest.parameters
    names = sorted(parameters, key=lambda name: -parameters[name].layout.numel)
    own: dict[str, dict[str, str]] = {}
    with all_ranks_or_none("reading", source.folder):
        for name in names[dist.get_rank() :: dist.get_world_size()]:
            states = parameters[name].states if with_optimizer else (MASTER,)
            own[name] = {state: _read_digest(source, name, state).hex() for state in states}
    return {name: digests for of_rank in gathered(own) for name, digests in of_rank.items()}


def _read_digest(source: Source, name: str, state: str) -> Digest:
    shape = source.manifest.parameters[name].layout_of(state).shape
    read = chunks(source, name, state)
    return sum((digest_runs(values, runs, name=name, state=state, shape=shape) for runs, values in read), Digest())


def _naming_experts(source: Source, wrong: list[str]) -> list[str]:
    """The same lines, "name (state)", those of experts first and with their numbers. Reads these once more."""
    known: list[str] = []
    other: list[str] = []
    for line in wrong:
        name, _, state = line.rstrip(")").partition(" (")
        experts: list[int] = []
        with contextlib.suppress(UcpError):  # the fault that is being told is not hidden by a second one
            experts = changed_experts(source, name, state)
        (known if experts else other).append(line + label_of(experts))
    return known + other


def _tell_what_changed(state: EngineState, source: Source, with_optimizer: bool) -> None:
    """Frozen there and trained here, or the reverse: one line each."""
    before = {name for name, info in source.manifest.parameters.items() if not info.is_trainable}
    if (begun := sorted(before - state.frozen)) and with_optimizer:
        log.info("trained from here on, with fresh optimizer states (frozen in the Source): %s", listed(begun, 20))
    if ended := sorted(state.frozen - before):
        log.info("frozen from here on, without the Source's optimizer states: %s", listed(ended, 20))
