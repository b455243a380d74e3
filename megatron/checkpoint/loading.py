"""Place a Source of any topology into a live engine: native, direct or universal, one path for all.

    progress = load(live, open_planned(plan))

DeepSpeed's load_checkpoint is not used: each rank reads the intervals it keeps and writes them into the optimizer's own
tensors; the digest of what then stands in the engine is held against the one in the Source.
"""

from __future__ import annotations

import logging
import time

import torch.distributed as dist

from megatron.checkpoint.errors import CheckpointError, SourceMismatchError, all_ranks_or_none
from megatron.checkpoint.frozen_weights import place_frozen, require_same_base
from megatron.checkpoint.judging import misfits
from megatron.checkpoint.live_run import LiveRun
from megatron.checkpoint.placing import place
from megatron.checkpoint.progress import Progress
from megatron.checkpoint.proof import prove
from megatron.checkpoint.restoring import restore_counters
from megatron.checkpoint.resume import LoadOptions, ResumePlan
from megatron.parallel.rank_errors import reported_by_rank_0
from megatron.ucp.errors import listed

log = logging.getLogger(__name__)


def load(live: LiveRun, plan: ResumePlan, options: LoadOptions | None = None) -> Progress:
    """Place the planned Source, which is open, into a freshly built engine; returns how far it had come.

    Collective over the world. Raises SourceMismatchError before anything is placed, but for a base of other weights,
    which their digest tells; CheckpointError where a digest does not match.
    """
    options = options or LoadOptions()
    started = time.perf_counter()
    if plan.folder is None or plan.opened is None:
        raise ValueError("the plan's checkpoint is not open: give what open_planned returns")
    folder, source, identity = plan.folder, plan.opened.source, plan.opened.identity
    with all_ranks_or_none("opening", folder):
        if options.with_optimizer:
            live.state.make_states()
        if problems := misfits(live, source, options):
            raise SourceMismatchError(
                f"{folder} does not fit this run; nothing was loaded:\n  " + "\n  ".join(problems)
            )
    with all_ranks_or_none("loading", folder):
        num_elements = place(live, source, options)
        num_frozen, frozen = place_frozen(live.state, source)
        identity.require_unchanged()
    require_same_base(live.state, source, frozen)
    live.state.refresh_weights()
    with all_ranks_or_none("refreshing the weights from", folder):
        if stale := live.state.stale_weights():
            raise CheckpointError(f"live weights are not the masters that were placed: {listed(stale, 20)}")
    with reported_by_rank_0(dist.get_rank()):
        prove(live.state, source, with_optimizer=options.with_optimizer, kind=plan.kind, frozen=frozen)
    progress = restore_counters(live, source, options, is_same_topology=plan.kind == "native")
    with all_ranks_or_none("loading", folder):
        identity.require_unchanged()
    seconds = time.perf_counter() - started
    log.info(
        "loaded %s in %.2f s: rank 0 read %.1f MiB; iteration %d, consumed samples %d",
        folder,
        seconds,
        (num_elements + num_frozen) * 4 / 2**20,
        progress.iteration,
        progress.consumed_train_samples,
    )
    return progress
