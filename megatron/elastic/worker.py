"""One rank of an elastic job, from its start to its exit code.

    code = work(job)                # in a process that an agent started, with a launcher's environment

It takes the topology that the policy gives to the ranks that are there, and goes on from the newest whole checkpoint
of --save. Ranks for which there is no place stand by until the job ends.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

from megatron.elastic.launch import meeting, take_part
from megatron.elastic.policy import fit, read_table
from megatron.elastic.store import connect, has_ended, tell_end
from megatron.parallel.rank_errors import reported_by_rank_0
from megatron.training.entry import parsed, pretrain
from megatron.training.launch import close_distributed
from megatron.training.reporting import report_errors

INTERRUPTED = 75
"""EX_TEMPFAIL of sysexits.h: a signal ended the run before its last iteration. 0 would be the job's success."""
_POLLED_EVERY = 1.0


@dataclass(frozen=True)
class Job:
    """What an agent tells its workers."""

    argv: tuple[str, ...]
    """Of pretrain_gpt.py."""
    store: tuple[str, int]
    topologies: str | None = None


def work(job: Job) -> int:
    """The exit code. Errors that explain themselves end the process, with exit code 2."""
    try:
        with report_errors():
            return _train(job)
    finally:
        close_distributed()


def _train(job: Job) -> int:
    result, launch = parsed(job.argv)
    with reported_by_rank_0(launch.rank):
        fitted = fit(result.config, launch.world_size, read_table(job.topologies) if job.topologies else None)
    if launch.rank == 0:
        print(f"elastic: {fitted.told(launch.world_size)}", flush=True)
    if launch.rank >= fitted.num_ranks:
        store = connect(*job.store)
        while not has_ended(store, meeting()):
            time.sleep(_POLLED_EVERY)
        return 0
    take_part(fitted.num_ranks)
    trained = dataclasses.replace(result, config=fitted.config)
    ending = pretrain(trained, dataclasses.replace(launch, world_size=fitted.num_ranks), is_restarted=True)
    if ending.is_interrupted:
        return INTERRUPTED
    if launch.rank == 0 and fitted.num_ranks < launch.world_size:
        tell_end(connect(*job.store), meeting())
    return 0
