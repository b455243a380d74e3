"""A run whose state has changed in memory goes on from its newest whole checkpoint, if that is asked for.

progress = fit_and_go_back(run)            # as loop.fit; collective
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from megatron.checkpoint.errors import DamagedCheckpointError
from megatron.checkpoint.loading import load
from megatron.checkpoint.progress import Progress
from megatron.checkpoint.resume import ResumeError, ResumePlan
from megatron.checkpoint.state_watch import StateChangedError
from megatron.training.loop import Run, fit
from megatron.training.starting_point import StartingPoint
from megatron.ucp.errors import UcpError

log = logging.getLogger(__name__)


def fit_and_go_back(run: Run, begins: Callable[[int], None] = lambda iteration: None) -> Progress:
    """Raises StateChangedError where nobody asked to go back, where nothing is saved to go back to, and where it
    changed again before anything newer was saved: then a machine is failing."""
    reached = -1
    while True:
        try:
            return fit(run, begins)
        except StateChangedError as error:
            if not run.config.run.go_back_on_state_change:
                raise
            log.error("error: %s", error)
            reached = _go_back(run, error, reached)


def _go_back(run: Run, error: StateChangedError, reached: int) -> int:
    """The iteration gone back to, which is after `reached`. The samples are planned for the whole run, and stay."""
    checkpoint = dataclasses.replace(
        run.config.checkpoint,
        load=run.config.checkpoint.save,
        load_tag=None,
        load_strict=False,
        finetune=False,
        pretrained_checkpoint=None,
        universal_checkpoint=False,
        exit_on_missing_checkpoint=True,
    )
    live = run.live
    zero_stage, base = live.engine.zero_optimization_stage(), run.config.checkpoint.pretrained_checkpoint
    starting_point = StartingPoint(checkpoint, live.context.topology, zero_stage, base)
    try:
        plan = _after(reached, starting_point.first(), error)
        while True:
            try:
                run.progress = load(live, plan)
                break
            except DamagedCheckpointError as damage:
                plan = _after(reached, starting_point.instead_of(plan, damage), error)
    except (ResumeError, UcpError, DamagedCheckpointError) as nothing:
        raise error from nothing
    run.run_log.go_back(run.progress)
    log.warning("warning: went back to iteration %d, %s", run.progress.iteration, plan.folder)
    return run.progress.iteration


def _after(reached: int, plan: ResumePlan, error: StateChangedError) -> ResumePlan:
    if plan.opened is None or int(plan.opened.source.manifest.iteration or 0) <= reached:
        raise error
    return plan
