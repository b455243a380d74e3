"""Place a Source of any topology into a live engine: native, direct or universal, one path for all.

    progress = load(live, plan)

DeepSpeed's load_checkpoint is not used: each rank reads the intervals it keeps and writes them into the optimizer's own
tensors; the digest of what then stands in the engine is held against the one in the Source.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron.checkpoint.frozen_weights import FrozenParts, frozen_faults, place_frozen
from megatron.checkpoint.live_run import LiveRun
from megatron.checkpoint.progress import Progress
from megatron.checkpoint.resume import ResumePlan
from megatron.checkpoint.saved_streams import restore_streams
from megatron.checkpoint.state_digest import state_digests
from megatron.config.batch_sizes import BatchSizes
from megatron.config.optimizer import base_group
from megatron.engine.engine_state import MASTER
from megatron.engine.schedule import ScheduleError
from megatron.parallel.agreement import (
    CheckpointError,
    SourceMismatchError,
    all_ranks_or_none,
    gathered,
    on_rank_0,
)
from megatron.parallel.rank_errors import told_by_rank_0
from megatron.ucp.digest import total
from megatron.ucp.errors import UcpError
from megatron.ucp.execute import gather
from megatron.ucp.expert_digests import changed_experts
from megatron.ucp.experts import holding, numbered
from megatron.ucp.file_table import changed_files
from megatron.ucp.fragment import numel
from megatron.ucp.identity import Identity
from megatron.ucp.json_checks import shown
from megatron.ucp.manifest import MANIFEST_NAME
from megatron.ucp.sources import Source, open_source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadOptions:
    """Megatron's --finetune and --no-load-*."""

    with_optimizer: bool = True
    with_schedule: bool = True
    with_rng: bool = True
    with_progress: bool = True


def load(live: LiveRun, plan: ResumePlan, options: LoadOptions | None = None) -> Progress:
    """Place the planned Source into the engine; returns how far it had come. The engine is freshly built.

    Collective over the world. Raises SourceMismatchError before anything is placed, CheckpointError where a digest
    does not match.
    """
    options = options or LoadOptions()
    started = time.perf_counter()
    folder = plan.folder
    with all_ranks_or_none("opening", folder):
        identity = Identity.of(folder)
    _check_all_see_the_same(identity)
    with all_ranks_or_none("opening", folder):
        source = open_source(folder)
        _check_source(live, source, options)
    with all_ranks_or_none("loading", folder):
        num_elements = _place(live, source, options)
        num_frozen, frozen = place_frozen(live.state, source)
        identity.require_unchanged()
    live.state.refresh_weights()
    with all_ranks_or_none("refreshing the weights from", folder):
        if stale := live.state.stale_weights():
            raise CheckpointError(f"live weights are not the masters that were placed: {_some(stale)}")
    with told_by_rank_0(dist.get_rank()):
        _check_digests(live, source, options, plan, frozen)
    progress = _restore_common(live, source, options, is_same_topology=plan.kind == "native")
    with all_ranks_or_none("loading", folder):
        identity.require_unchanged()
    seconds = time.perf_counter() - started
    log.info(
        "loaded %s in %.2f s: rank 0 read %.1f MiB; iteration %d, consumed samples %d",
        folder, seconds, (num_elements + num_frozen) * 4 / 2**20, progress.iteration, progress.consumed_train_samples,
    )  # fmt: skip
    return progress


def _check_all_see_the_same(identity: Identity) -> None:
    """One ucp.json for all: a node with other files, or with none, would place another state than the rest."""
    seen = gathered(f"SHA-256 {identity.manifest[:16]}" if identity.manifest else "none")
    if len(set(seen)) > 1:
        ranks = "; ".join(f"ranks {[r for r, s in enumerate(seen) if s == what][:8]}: {what}" for what in set(seen))
        with told_by_rank_0(dist.get_rank()):
            raise CheckpointError(
                f"ranks do not see the same checkpoint in {identity.folder}: {MANIFEST_NAME} is, on {ranks}. "
                "Put the whole folder where every node reads it."
            )


def _check_source(live: LiveRun, source: Source, options: LoadOptions) -> None:
    """Everything that does not fit, at once, before anything is written. Local."""
    problems = compare_models(source.manifest.model, live.model)
    there, wanted = source.manifest.parameters, live.atlas.layouts
    if missing := sorted(set(wanted) - set(there)):
        problems.append(f"parameters the Source lacks: {_some(missing)}")
    if unexpected := sorted(set(there) - set(wanted)):
        problems.append(f"parameters only the Source has: {_some(unexpected)}")
    for name in sorted(set(there) & set(wanted)):
        if there[name].layout.shape != wanted[name].shape:
            problems.append(f"{name}: shape {there[name].layout.shape} in the Source, {wanted[name].shape} here")
    if options.with_optimizer:
        live.state.make_states()
        problems += _state_problems(live, source)
        problems += live.state.hyper_parameter_faults(_saved_groups(live, source.manifest.optimizer.groups))
        lacking = {group["name"] for group, is_new in _groups(live, source) if not is_new}
        lacking -= set(source.manifest.optimizer.groups)
        if lacking and not live.schedule.takes_flags:
            problems.append(
                f"parameter groups the Source lacks: {sorted(lacking)} (it has "
                f"{sorted(source.manifest.optimizer.groups)}). With --override-opt_param-scheduler their "
                "hyper-parameters are those of the flags"
            )
    if options.with_schedule and (saved_schedule := source.manifest.common.get("schedule")):
        try:
            live.schedule.load_state_dict(saved_schedule)
        except ScheduleError as error:
            problems.append(str(error))
    if problems:
        raise SourceMismatchError(
            f"{source.folder} does not fit this run; nothing was loaded:\n  " + "\n  ".join(problems)
        )


def _groups(live: LiveRun, source: Source) -> list[tuple[dict[str, Any], bool]]:
    """This rank's parameter groups, and whether the Source had all of a group's parameters frozen."""
    trained: dict[int, bool] = {}
    for (index, _), names in zip(live.state.flats, live.state.members, strict=True):
        trained[index] = trained.get(index, False) or any(_is_trained_in(source, name) for name in names)
    return [(group, not trained.get(index, True)) for index, group in enumerate(live.state.base.param_groups)]


def _is_trained_in(source: Source, name: str) -> bool:
    info = source.manifest.parameters.get(name)
    return info is None or info.is_trainable


def _state_problems(live: LiveRun, source: Source) -> list[str]:
    """One line for all parameters that differ in the same way."""
    alike: dict[str, list[str]] = {}
    for interval in live.state.intervals:
        info = source.manifest.parameters.get(interval.name)
        if info is None or not info.is_trainable:
            continue
        ours = {part.state: part.layout.shape for part in live.state.parts(interval)}
        theirs = {state: info.layout_of(state).shape for state in info.states}
        ours |= dict.fromkeys(live.state.scalars_of(interval.flat), "a number")
        theirs |= dict.fromkeys(info.scalars, "a number")
        for names in (ours, theirs):
            names.pop(MASTER)
        if set(ours) != set(theirs):
            line = (
                f"optimizer states {sorted(ours)} are needed, the Source has {sorted(theirs)} "
                f"({source.manifest.optimizer.kind}); use the same optimizer, or --no-load-optim"
            )
            alike.setdefault(line, []).append(interval.name)
        elif ours != theirs and info.layout.shape == live.atlas.layouts[interval.name].shape:
            alike.setdefault(f"optimizer states of {theirs} in the Source, of {ours} here", []).append(interval.name)
    return [f"{_some(names, 3)}: {line}" for line, names in alike.items()]


def _place(live: LiveRun, source: Source, options: LoadOptions) -> int:
    """Read this rank's intervals into the optimizer's tensors; returns the number of elements. Local."""
    num_elements = 0
    for interval in live.state.intervals:
        has_states = options.with_optimizer and _is_trained_in(source, interval.name)
        for part in live.state.parts(interval):
            if part.state == MASTER or has_states:
                pieces = source.pieces(interval.name, part.state)
                if numel(part.runs) < part.values.numel():
                    part.values.zero_()  # the vocabulary's padding, which no Source has
                gather(source, interval.name, part.state, pieces, part.runs, part.values)
                num_elements += part.values.numel()
            elif options.with_optimizer:
                part.values.zero_()
    if options.with_optimizer:
        # All that a flat tensor has of any rank: this one may own only padding.
        for (_, flat), names in zip(live.state.flats, live.state.members, strict=True):
            if any(_is_trained_in(source, name) for name in names):
                _set_numbers(live, source, flat, names)
            else:
                live.state.forget(flat)
        _set_hyper_parameters(live, source.manifest.optimizer.groups)
    return num_elements


def _set_numbers(live: LiveRun, source: Source, flat: torch.Tensor, names: list[str]) -> None:
    """The step and other numbers, of which a flat tensor has one for all its parameters."""
    infos = {name: source.manifest.parameters[name] for name in names}
    kept = {name: {"step": info.step, **info.scalars} for name, info in infos.items()}
    first = kept[names[0]]
    if differing := sorted(name for name, numbers in kept.items() if numbers != first):
        raise CheckpointError(
            f"{names[0]} is at {first}, {differing[0]} at {kept[differing[0]]}, but here the optimizer steps them "
            "together. Resume under --zero-stage 0."
        )
    step = first.pop("step")
    live.state.set_step(flat, step if step is not None else source.manifest.iteration or 0)
    for key in live.state.scalars_of(flat):
        live.state.set_scalar(flat, key, first[key])


def _saved_groups(live: LiveRun, saved: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """By this run's groups. One that the Source had frozen takes those of the group that it would have joined."""
    return {group: saved.get(group) or saved.get(base_group(group)) or {} for group in live.state.hyper_parameters()}


def _set_hyper_parameters(live: LiveRun, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """The Source's, by group name, but for those that the schedule sets. Where the flags ask for others that is told,
    since they have no effect."""
    saved = _saved_groups(live, saved)
    ours = {"lr", "initial_lr"} | ({"weight_decay"} if live.schedule.takes_flags else set())
    for group, values in live.state.hyper_parameters().items():
        if unsaid := sorted(values.keys() - saved[group].keys() - ours):
            log.warning("warning: the Source does not say %s of group %s: as the flags say", ", ".join(unsaid), group)
        if unknown := sorted(saved[group].keys() - values.keys() - ours):
            log.warning("warning: no optimizer here has %s of group %s of the Source", _some(unknown), group)
        for key, value in values.items():
            if key not in ours and saved[group].get(key, value) != value:
                log.warning("warning: %s of group %s goes on as %s, not %s", key, group, saved[group][key], value)
    known = {group: values.keys() for group, values in live.state.hyper_parameters().items()}
    live.state.set_hyper_parameters(
        {group: {k: v for k, v in values.items() if k in known[group] - ours} for group, values in saved.items()}
    )


def _check_digests(live: LiveRun, source: Source, options: LoadOptions, plan: ResumePlan, frozen: FrozenParts) -> None:
    placed = state_digests(live.state)
    saved = source.manifest.digests
    if not saved:
        log.warning("%s carries no state digest: the load could not be proven", source.folder)
        return
    wrong = frozen_faults(live.state, frozen, saved, placed)
    wrong += [
        f"{name} ({state})"
        for name, digests in placed.items()
        if name not in live.atlas.frozen
        for state in (digests if options.with_optimizer and _is_trained_in(source, name) else (MASTER,))
        if saved.get(name, {}).get(state) != digests.get(state)
    ]
    if wrong:
        changed = on_rank_0(lambda: changed_files(source.folder, source.manifest))
        lines = on_rank_0(lambda: _naming_experts(source, wrong))
        raise CheckpointError(
            f"what was placed in the engine is not what was saved in {source.folder}; "
            f"{len(wrong)} digests differ: {_some(lines)}. "
            + (
                f"Files changed since they were written: {_some(changed)}: copy them again from where they were saved"
                f"{holding(source.manifest, changed)}."
                if changed
                else "No file is known to have changed, so this is a defect: run `python -m megatron.ucp verify` on it."
            )
        )
    if not options.with_optimizer:
        log.info("weight digests equal those at save; optimizer states were not loaded")
    elif placed == saved:
        log.info("state digest %s equals the one at save (%s resume)", total(placed), plan.kind)
    else:
        log.info("state digests equal those at save, of all that both runs train (%s resume)", plan.kind)
    if source.manifest.doubt:
        log.warning(
            "warning: %s is unverified (%s): that digest proves this load, not what was once saved",
            source.folder, source.manifest.doubt,
        )  # fmt: skip
    _tell_what_changed(live, source, options)


def _naming_experts(source: Source, wrong: list[str]) -> list[str]:
    """The same lines, "name (state)", those of experts first and with their numbers. Reads these once more."""
    known, other = [], []
    for line in wrong:
        name, _, state = line.rstrip(")").partition(" (")
        experts: list[int] = []
        with contextlib.suppress(UcpError):  # the fault that is being told is not hidden by a second one
            experts = changed_experts(source, name, state)
        (known if experts else other).append(line + numbered(experts))
    return known + other


def _tell_what_changed(live: LiveRun, source: Source, options: LoadOptions) -> None:
    """Frozen there and trained here, or the reverse: one line each."""
    before = {name for name, info in source.manifest.parameters.items() if not info.is_trainable}
    if (begun := sorted(before - live.atlas.frozen)) and options.with_optimizer:
        log.info("trained from here on, with fresh optimizer states (frozen in the Source): %s", _some(begun))
    if ended := sorted(live.atlas.frozen - before):
        log.info("frozen from here on, without the Source's optimizer states: %s", _some(ended))


def _restore_common(live: LiveRun, source: Source, options: LoadOptions, is_same_topology: bool) -> Progress:
    common = source.manifest.common
    progress = progress_of(common, live.batch_sizes)
    engine = live.engine
    if not options.with_progress:
        return Progress()
    _tell_unsaid(common, progress)
    for line in changed_order(common.get("train_order"), live.train_order):
        log.warning("warning: %s", line)
    engine.global_steps = progress.iteration
    samples = common.get("engine", {}).get("global_samples", progress.consumed_train_samples)
    engine.global_samples = samples * live.context.sp_size
    engine.skipped_steps = common.get("engine", {}).get("skipped_steps", 0)
    # Not the saved number: the accumulation boundary is counted in this run's micro batches.
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    if options.with_schedule and not common.get("schedule"):
        log.warning(
            "warning: the Source has no schedule: this run's goes on at sample %d", progress.consumed_train_samples
        )
        live.schedule.num_samples = progress.consumed_train_samples
    live.schedule.apply()  # what was placed may hold another learning rate than the one that is logged
    scaler = live.state.loss_scaler
    saved_scaler = common.get("loss_scaler") or {}
    # A dynamic scale goes on only from a dynamic one: bf16's constant 1 is no start for fp16, nor the reverse.
    if options.with_optimizer and getattr(scaler, "dynamic", False) and "last_overflow_iter" in saved_scaler:
        for key, value in saved_scaler.items():
            setattr(scaler, key, value)
    if options.with_rng:
        with all_ranks_or_none("restoring the random streams of", source.folder):
            restore_streams(live.streams, source, progress.iteration, is_same_topology)
    return progress


def progress_of(common: Mapping[str, Any], batch_sizes: BatchSizes) -> Progress:
    """How far the Source had come. Of a foreign one that does not count samples, what this run's batch sizes make of
    its iterations. Pure: `_tell_unsaid` warns."""
    known = {field.name for field in dataclasses.fields(Progress)}
    progress = Progress(**{key: common[key] for key in known if common.get(key) is not None})
    if progress.iteration and common.get("consumed_train_samples") is None:
        progress.consumed_train_samples = batch_sizes.samples_after(0, progress.iteration)
    return progress


def _tell_unsaid(common: Mapping[str, Any], progress: Progress) -> None:
    unsaid = sorted(field.name for field in dataclasses.fields(Progress) if common.get(field.name) is None)
    if "consumed_train_samples" in unsaid and progress.iteration:
        unsaid.remove("consumed_train_samples")
        log.warning(
            "warning: the Source does not say how many samples it consumed; of %d iterations %d are assumed",
            progress.iteration, progress.consumed_train_samples,
        )  # fmt: skip
    if unsaid:
        log.warning("warning: the Source does not say its %s: counted from 0 here", ", ".join(unsaid))


def compare_models(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One line for every value of the model that differs; values only one side knows are not compared."""
    return [
        f"model.{key}: {shown(saved[key])} in the Source, {wanted[key]!r} here"
        for key in sorted(set(saved) & set(wanted))
        if saved[key] != wanted[key]
    ]


def changed_order(saved: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> list[str]:
    """Empty if the samples go on in the Source's order; otherwise why they do not, or why nobody knows, one line each.
    Not an error: people do change their data on purpose."""
    if not saved:
        return ["the Source does not say in which order its training samples came: it cannot be compared"]
    if saved.get("order_crc32") == wanted["order_crc32"]:
        return []
    reasons = [
        f"{key} was {shown(saved.get(key))}, is {wanted[key]}"
        for key in wanted
        if key != "order_crc32" and saved.get(key) != wanted[key]
    ]
    return [
        "the training samples come in another order than the Source's: some may be seen twice, some never",
        *(reasons or ["the dataset's documents have changed"]),
    ]


def _some(names: list[str], limit: int = 20) -> str:
    rest = f", ... and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
