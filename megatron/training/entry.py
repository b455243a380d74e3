"""A whole training run, from the command line to the last save: what pretrain_gpt.py and an elastic worker call.

result, launch = parsed(argv)               # told by one rank where the flags are wrong
ending = pretrain(result, launch)
ending.is_interrupted                       # a signal ended it before its last iteration
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.config.arguments import ParseResult, parse
from megatron.parallel.rank_errors import reported_by_rank_0
from megatron.training.launch import LaunchInfo, check_precision, init_distributed
from megatron.training.reporting import set_up_logging


@dataclass(frozen=True)
class Ending:
    iteration: int
    last_iteration: int
    is_by_signal: bool

    @property
    def is_interrupted(self) -> bool:
        """By a signal: whoever sent it may want the run to go on."""
        return self.is_by_signal and self.iteration < self.last_iteration


def parsed(argv: Sequence[str]) -> tuple[ParseResult, LaunchInfo]:
    """Raises ConfigError and LaunchError, of which rank 0 tells."""
    with reported_by_rank_0(LaunchInfo.from_environment().rank):
        result = parse(argv)
        return result, LaunchInfo.from_environment(local_rank=result.config.run.local_rank)


def pretrain(result: ParseResult, launch: LaunchInfo, *, is_restarted: bool = False) -> Ending:
    """Collective over the world. Raises what building and training raise. `is_restarted`: somebody starts all ranks
    again where one fails, and waits for them to end."""
    # Before any process group: a configuration that cannot run is told by one rank, at once.
    with reported_by_rank_0(launch.rank):
        log = set_up_logging(launch.rank)
        config = result.config.validate(launch.world_size)
    run = config.run
    notes = init_distributed(launch, run.distributed_backend, timeout_minutes=run.distributed_timeout_minutes)
    check_precision(config.optimizer.precision)
    for note in (*result.notes, *notes):
        log.info("note: %s", note)

    # Imported late: what is wrong with the flags is told without waiting for DeepSpeed to load.
    from megatron.training.build import build_run
    from megatron.training.going_back import fit_and_go_back
    from megatron.training.loop import test
    from megatron.training.presence import Presence

    with Presence.of_world(run.distributed_timeout_minutes, looks_for_lost=not is_restarted) as presence:
        built = build_run(config, launch)
        with built.ownership, built.run_log:
            progress = fit_and_go_back(built, presence.at)
            # Not after an exit condition: whoever stopped the run may not wait for an evaluation.
            if run.eval_iters and progress.iteration >= built.last_iteration:
                test(built)
    return Ending(progress.iteration, built.last_iteration, built.is_stopped_by_signal)
