"""Which checkpoint a run starts from, and which instead where that one turns out to be damaged.

    starting_point = StartingPoint(config.checkpoint, topology, zero_stage)
    plan = starting_point.first()                       # open on every rank; collective, as the next
    plan = starting_point.instead_of(plan, error)       # after loading it has raised DamagedCheckpointError

What was found damaged is marked, so that the next start need not find out again.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.checkpoint.errors import DamagedCheckpointError, all_ranks_or_none
from megatron.checkpoint.resume import ResumeError, ResumePlan, Wanted, choose_pretrained, choose_resume, open_planned
from megatron.config.checkpoint import CheckpointConfig
from megatron.parallel.rank_errors import reported_by_rank_0
from megatron.ucp.commit import damage_of, mark_damaged
from megatron.ucp.errors import UcpError
from megatron.ucp.manifest import left_out
from megatron.ucp.run_folder import OpenCheckpoint, find_checkpoints
from megatron.ucp.sources.with_base import with_left_out
from megatron.ucp.topology import Topology

log = logging.getLogger(__name__)


class StartingPoint:
    def __init__(self, config: CheckpointConfig, topology: Topology, zero_stage: int, base: str | None = None):
        """`base`: where frozen weights are that a checkpoint leaves out, by default --pretrained-checkpoint."""
        self._config, self._base = config, base or config.pretrained_checkpoint
        self._wanted = Wanted(
            topology,
            zero_stage,
            config.universal_checkpoint,
            config.exit_on_missing_checkpoint and not config.pretrained_checkpoint,
            config.load_strict,
            config.finetune,
        )
        self._damaged: dict[str, str] = {}
        """Why, by name, of what this start has found damaged."""

    def first(self) -> ResumePlan:
        """Collective over the world. Raises ResumeError, and what reading and opening checkpoints raise."""
        return self._opened(self._plan())

    def instead_of(self, plan: ResumePlan, error: DamagedCheckpointError) -> ResumePlan:
        """Never a fresh start. Collective over the world. Raises the error where the plan's checkpoint was asked for by
        name or with --load-strict, and where there is no other."""
        return self._opened(self._next(plan, error))

    def _opened(self, plan: ResumePlan) -> ResumePlan:
        while True:
            for note in plan.notes:
                log.warning("warning: %s", note)
            log.info("%s", plan.reason)
            try:
                return self._with_base(open_planned(plan))
            except DamagedCheckpointError as error:
                plan = self._next(plan, error)

    def _with_base(self, plan: ResumePlan) -> ResumePlan:
        """With the frozen weights of --pretrained-checkpoint, where the checkpoint leaves out its own."""
        if plan.opened is None or not left_out(plan.opened.source.manifest):
            return plan
        if self._base is None:
            with reported_by_rank_0(dist.get_rank()):
                raise ResumeError(
                    f"{plan.folder} leaves out the weights that are not trained (--exclude-frozen-parameters), and no "
                    "checkpoint is given that has them. What to do: give --pretrained-checkpoint as the run that saved "
                    "it did; another base is refused by its digest"
                )
        base = open_planned(self._decided(self._plan_of_base))
        assert base.opened is not None and base.folder is not None
        log.info("the weights that are not trained are those of %s", base.folder)
        with all_ranks_or_none("opening", base.folder):
            source = with_left_out(plan.opened.source, base.opened.source)
        return dataclasses.replace(plan, opened=OpenCheckpoint(source, plan.opened.identity))

    def _next(self, plan: ResumePlan, error: DamagedCheckpointError) -> ResumePlan:
        config, folder = self._config, plan.folder
        is_chosen_here = config.load_tag is None and folder is not None and folder.parent == Path(config.load or "")
        if folder is None or not is_chosen_here or config.load_strict:
            raise error
        self._damaged[folder.name] = " ".join(str(error).split())[:300]
        try:
            other = self._plan()
        except (ResumeError, UcpError):
            raise error from None
        if other.is_fresh:
            raise error
        log.error("error: %s", error)
        log.warning("warning: %s is damaged, is marked as such and passed over (--load-strict stops instead)", folder)
        return other

    def _plan(self) -> ResumePlan:
        return self._decided(self._plan_on_rank_0)

    def _plan_on_rank_0(self) -> ResumePlan:
        found, config = None, self._config
        if config.load:
            folder, only_universal = Path(config.load), config.universal_checkpoint
            found = find_checkpoints(folder, config.load_tag, only_universal, self._damaged)
        plan = choose_resume(found, self._wanted)
        if plan.is_fresh and config.pretrained_checkpoint:
            plan = self._plan_of_base()
        if found is not None:
            _mark(found.load, found.damaged)
        return plan

    def _plan_of_base(self) -> ResumePlan:
        found = find_checkpoints(Path(self._base or ""))
        return choose_pretrained(found, dataclasses.replace(self._wanted, use_universal=False))

    def _decided(self, choose: Callable[[], ResumePlan]) -> ResumePlan:
        """On rank 0, the same everywhere: folders may look different from another node. Collective over the world."""
        outcome: list[Any] = [None, None]
        opened = None
        if dist.get_rank() == 0:
            try:
                plan = choose()
                opened, outcome[0] = plan.opened, dataclasses.replace(plan, opened=None)  # what is open stays here
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            with reported_by_rank_0(dist.get_rank()):
                raise outcome[1]
        return dataclasses.replace(outcome[0], opened=opened)


def _mark(run_folder: Path, damaged: Mapping[str, str]) -> None:
    """Those that carry no mark yet."""
    for name, why in damaged.items():
        if not damage_of(run_folder / name):
            try:
                mark_damaged(run_folder / name, why)
            except OSError as fault:
                log.warning("warning: the mark could not be left in %s: %s", run_folder / name, fault)
