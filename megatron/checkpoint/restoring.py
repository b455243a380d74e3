"""How far a Source had come, and this run's counters, schedule and random streams set to go on from there.

progress = progress_of(source.manifest.common, batch_sizes)               # pure
progress = restore_counters(live, source, options, is_same_topology=True)     # collective over the world
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.errors import all_ranks_or_none
from megatron.checkpoint.live_run import LiveRun
from megatron.checkpoint.progress import Progress
from megatron.checkpoint.resume import LoadOptions
from megatron.checkpoint.saved_streams import restore_streams
from megatron.config.batch_sizes import BatchSizes
from megatron.engine.counters import set_counters, set_loss_scaler_state
from megatron.ucp.json_checks import shown
from megatron.ucp.sources import Source

log = logging.getLogger(__name__)


def restore_counters(live: LiveRun, source: Source, options: LoadOptions, *, is_same_topology: bool) -> Progress:
    """Set what `options` asks for; returns how far the Source had come, or the beginning without `with_progress`.
    Collective over the world. Raises CheckpointError, on every rank, where the random streams cannot be restored."""
    common = source.manifest.common
    progress = progress_of(common, live.batch_sizes)
    if options.with_schedule and (saved_schedule := common.get("schedule")):
        live.schedule.load_state_dict(saved_schedule)
    if not options.with_progress:
        return Progress()
    _tell_unsaid(common, progress)
    for line in changed_order(common.get("train_order"), live.train_order):
        log.warning("warning: %s", line)
    for line in changed_settings(common.get("model_settings"), live.model_settings):
        log.warning("warning: %s", line)
    counted = common.get("engine", {})
    samples = counted.get("global_samples", progress.consumed_train_samples)
    set_counters(
        live.engine,
        iteration=progress.iteration,
        samples=samples * live.context.sp_size,
        skipped=counted.get("skipped_steps", 0),
    )
    if options.with_schedule and not common.get("schedule"):
        log.warning(
            "warning: the Source has no schedule: this run's goes on at sample %d", progress.consumed_train_samples
        )
        live.schedule.num_samples = progress.consumed_train_samples
    live.schedule.apply()  # what was placed may hold another learning rate than the one that is logged
    if options.with_optimizer:
        set_loss_scaler_state(live.state.loss_scaler, common.get("loss_scaler") or {})
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
            progress.iteration,
            progress.consumed_train_samples,
        )
    if unsaid:
        log.warning("warning: the Source does not say its %s: counted from 0 here", ", ".join(unsaid))


def changed_settings(saved: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> list[str]:
    """One line for each value of how the model is trained that is another than the Source's: the loss may not go on as
    it was. Not an error, as for the order of the samples. Pure."""
    saved = saved or {}
    return [
        f"{key} was {shown(saved[key])} in the Source, is {value!r}: the loss may not go on as it was"
        for key, value in wanted.items()
        if key in saved and saved[key] != value
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
