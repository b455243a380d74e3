"""Does a Source fit this run? Judged whole, before anything is made, moved or written. Local.

problems = misfits(live, source, options)      # one line each; empty where it fits
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron.checkpoint.live_run import LiveRun
from megatron.checkpoint.resume import LoadOptions
from megatron.config.optimizer import base_group
from megatron.engine.engine_state import MASTER, EngineState
from megatron.engine.schedule import ScheduleError
from megatron.ucp.errors import listed
from megatron.ucp.json_checks import shown
from megatron.ucp.layout import Layout
from megatron.ucp.naming.adapters import is_adapter
from megatron.ucp.naming.gpt_model import OF_ADAPTERS, UNSAID
from megatron.ucp.sources import Source
from megatron.ucp.sources.with_base import left_out_of


def misfits(live: LiveRun, source: Source, options: LoadOptions) -> list[str]:
    """Everything that does not fit, at once. The optimizer's states are there already, where they are loaded."""
    begun = adapters_begun(live.atlas.layouts, source) if not options.with_optimizer else frozenset()
    model = {key: value for key, value in live.model.items() if not (begun and key in OF_ADAPTERS)}
    wanted = {name: layout for name, layout in live.atlas.layouts.items() if name not in begun}
    problems = compare_models(source.manifest.model, model) + parameter_problems(wanted, source)
    if options.with_optimizer:
        problems += state_problems(live.state, source)
        problems += live.state.hyper_parameter_faults(saved_groups(live, source.manifest.optimizer.groups))
        lacking = {group["name"] for group, is_new in _groups(live, source) if not is_new}
        lacking -= set(source.manifest.optimizer.groups)
        if lacking and not live.schedule.takes_flags:
            problems.append(
                f"parameter groups the Source lacks: {sorted(lacking)} (it has "
                f"{sorted(source.manifest.optimizer.groups)}). With --override-opt_param-scheduler their "
                "hyper-parameters are those of the flags"
            )
    there = {name for name, info in source.manifest.parameters.items() if not info.is_trainable}
    if left_out_of(source) and there != live.atlas.frozen:
        only = sorted(there - live.atlas.frozen), sorted(live.atlas.frozen - there)
        problems.append(
            "its frozen weights are left out, and this run freezes others: "
            f"only there {listed(only[0], 4) or 'none'}, only here {listed(only[1], 4) or 'none'}; freeze the same ones"
        )
    if options.with_schedule and (saved_schedule := source.manifest.common.get("schedule")):
        try:
            live.schedule.curve_of(saved_schedule)
        except ScheduleError as error:
            problems.append(str(error))
    return problems


def adapters_begun(wanted: Iterable[str], source: Source) -> frozenset[str]:
    """The adapters of a run that begins from a model without any: they keep their first values."""
    if any(map(is_adapter, source.manifest.parameters)):
        return frozenset()
    return frozenset(filter(is_adapter, wanted))


def parameter_problems(wanted: Mapping[str, Layout], source: Source) -> list[str]:
    """Parameters that only one side has, or of another shape."""
    there, problems = source.manifest.parameters, []
    if missing := sorted(set(wanted) - set(there)):
        problems.append(f"parameters the Source lacks: {listed(missing, 20)}")
    if unexpected := sorted(set(there) - set(wanted)):
        problems.append(f"parameters only the Source has: {listed(unexpected, 20)}")
    for name in sorted(set(there) & set(wanted)):
        if there[name].layout.shape != wanted[name].shape:
            problems.append(f"{name}: shape {there[name].layout.shape} in the Source, {wanted[name].shape} here")
    return problems


def compare_models(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One line for every value of the model that differs; values only one side knows are not compared, but for those
    that are written only where they are not as ever."""
    if saved and wanted:
        saved, wanted = {**UNSAID, **saved}, {**UNSAID, **wanted}
    return [
        f"model.{key}: {shown(saved[key])} in the Source, {wanted[key]!r} here"
        for key in sorted(set(saved) & set(wanted))
        if saved[key] != wanted[key]
    ]


def state_problems(state: EngineState, source: Source) -> list[str]:
    """Of the optimizer, whose states are there already. One line for all parameters that differ in the same way."""
    needed = {held.state for interval in state.intervals for held in state.states_of(interval)} - {MASTER}
    if needed and all(info.states == (MASTER,) for info in source.manifest.parameters.values()):
        return ["it holds weights and no optimizer states: give --finetune (or --no-load-optim, to keep its counters)"]
    alike: dict[str, list[str]] = {}
    for interval in state.intervals:
        info = source.manifest.parameters.get(interval.name)
        if info is None or not info.is_trainable:
            continue
        ours: dict[str, Any] = {held.state: held.layout.shape for held in state.states_of(interval)}
        theirs: dict[str, Any] = {key: info.layout_of(key).shape for key in info.states}
        ours |= dict.fromkeys(state.scalars_of(interval.flat), "a number")
        theirs |= dict.fromkeys(info.scalars, "a number")
        for names in (ours, theirs):
            names.pop(MASTER)
        if set(ours) != set(theirs):
            line = (
                f"optimizer states {sorted(ours)} are needed, the Source has {sorted(theirs)} "
                f"({source.manifest.optimizer.kind}); use the same optimizer, or --no-load-optim"
            )
            alike.setdefault(line, []).append(interval.name)
        elif ours != theirs and info.layout.shape == state.layouts[interval.name].shape:
            alike.setdefault(f"optimizer states of {theirs} in the Source, of {ours} here", []).append(interval.name)
    return [f"{listed(names, 3)}: {line}" for line, names in alike.items()]


def _groups(live: LiveRun, source: Source) -> list[tuple[dict[str, Any], bool]]:
    """This rank's parameter groups, and whether the Source had all of a group's parameters frozen."""
    trained: dict[int, bool] = {}
    for (index, _), names in zip(live.state.flats, live.state.members, strict=True):
        trained[index] = trained.get(index, False) or any(is_trained_in(source, name) for name in names)
    return [(group, not trained.get(index, True)) for index, group in enumerate(live.state.base.param_groups)]


def is_trained_in(source: Source, name: str) -> bool:
    info = source.manifest.parameters.get(name)
    return info is None or info.is_trainable


def saved_groups(live: LiveRun, saved: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """By this run's groups. One that the Source had frozen takes those of the group that it would have joined."""
    return {group: saved.get(group) or saved.get(base_group(group)) or {} for group in live.state.hyper_parameters()}
