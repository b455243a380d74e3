"""Put a Source's values into the optimizer's own tensors: each rank reads the intervals it keeps. Local.

num_elements = place(live, source, options)
place_states(state, source, with_optimizer=True)       # the same without the groups' hyper-parameters
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.judging import adapters_begun, is_trained_in, saved_groups
from megatron.checkpoint.live_run import LiveRun
from megatron.checkpoint.resume import LoadOptions
from megatron.engine.engine_state import MASTER, EngineState
from megatron.ucp.errors import listed
from megatron.ucp.execute import gather
from megatron.ucp.read_ahead import Wanted, read_ahead
from megatron.ucp.runs import numel
from megatron.ucp.sources import Source

log = logging.getLogger(__name__)


def place(live: LiveRun, source: Source, options: LoadOptions) -> int:
    """Read this rank's intervals into the optimizer's tensors; returns the number of elements. Local."""
    num_elements = place_states(live.state, source, options.with_optimizer)
    if options.with_optimizer:
        _set_hyper_parameters(live, source.manifest.optimizer.groups)
    return num_elements


def place_states(state: EngineState, source: Source, with_optimizer: bool) -> int:
    """Masters and, `with_optimizer`, whatever the optimizer keeps of each parameter; returns the number of elements.
    Local. Raises CheckpointError where parameters that are stepped together are at different steps in the Source."""
    num_elements, begun = 0, adapters_begun(state.layouts, source)
    wanted: list[Wanted[torch.Tensor]] = []
    for interval in state.intervals:
        if interval.name in begun:
            continue
        has_states = with_optimizer and is_trained_in(source, interval.name)
        for held in state.states_of(interval):
            if held.state == MASTER or has_states:
                wanted.append((interval.name, held.state, held.runs, held.values))
            elif with_optimizer:
                held.values.zero_()
    for name, kind, runs, values in read_ahead(source, wanted):
        if numel(runs) < len(values):
            values.zero_()  # the vocabulary's padding, which no Source has
        gather(source, name, kind, source.pieces(name, kind), runs, values)
        num_elements += len(values)
    if with_optimizer:
        # All that a flat tensor has of any rank: this one may own only padding.
        for (_, flat), names in zip(state.flats, state.members, strict=True):
            if any(is_trained_in(source, name) for name in names):
                _set_numbers(state, source, flat, names)
            else:
                state.forget(flat)
    return num_elements


def _set_numbers(state: EngineState, source: Source, flat: torch.Tensor, names: list[str]) -> None:
    """The step and other numbers, of which a flat tensor has one for all its parameters."""
    infos = {name: source.manifest.parameters[name] for name in names}
    kept: dict[str, dict[str, Any]] = {name: {"step": info.step, **info.scalars} for name, info in infos.items()}
    first = kept[names[0]]
    if differing := sorted(name for name, numbers in kept.items() if numbers != first):
        raise CheckpointError(
            f"{names[0]} is at {first}, {differing[0]} at {kept[differing[0]]}, but here the optimizer steps them "
            "together. Resume under --zero-stage 0."
        )
    step = first.pop("step")
    state.set_step(flat, step if step is not None else source.manifest.iteration or 0)
    for key in state.scalars_of(flat):
        state.set_scalar(flat, key, first[key])


def _set_hyper_parameters(live: LiveRun, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """The Source's, by group name, but for those that the schedule sets. Where the flags ask for others that is told,
    since they have no effect."""
    saved = saved_groups(live, saved)
    ours = {"lr", "initial_lr"} | ({"weight_decay"} if live.schedule.takes_flags else set())
    for group, values in live.state.hyper_parameters().items():
        if unsaid := sorted(values.keys() - saved[group].keys() - ours):
            log.warning("warning: the Source does not say %s of group %s: as the flags say", ", ".join(unsaid), group)
        if unknown := sorted(saved[group].keys() - values.keys() - ours):
            log.warning("warning: no optimizer here has %s of group %s of the Source", listed(unknown, 20), group)
        for key, value in values.items():
            if key not in ours and saved[group].get(key, value) != value:
                log.warning("warning: %s of group %s goes on as %s, not %s", key, group, saved[group][key], value)
    known = {group: values.keys() for group, values in live.state.hyper_parameters().items()}
    live.state.set_hyper_parameters(
        {group: {k: v for k, v in values.items() if k in known[group] - ours} for group, values in saved.items()}
    )
