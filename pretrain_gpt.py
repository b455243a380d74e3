"""Pretrain a GPT.

    deepspeed --num_gpus 2 pretrain_gpt.py --deepspeed --tensor-model-parallel-size 2 ...
    torchrun --nproc-per-node 2 pretrain_gpt.py --tensor-model-parallel-size 2 ...

`python -m megatron.config` lists every flag; examples/ has complete command lines.
"""

import sys

from megatron.config.arguments import parse
from megatron.parallel.rank_errors import reported_by_rank_0
from megatron.training.estimate import estimate
from megatron.training.launch import LaunchInfo, check_precision, close_distributed, init_distributed
from megatron.training.reporting import report_errors, set_up_logging


def main(argv: list[str]) -> int:
    # Before any process group: a configuration that cannot run is told by one rank, at once.
    with reported_by_rank_0(LaunchInfo.from_environment().rank):
        result = parse(argv)
        launch = LaunchInfo.from_environment(local_rank=result.config.run.local_rank)
        if result.config.estimate.estimate:
            if launch.rank == 0:
                print(estimate(result.config, launch.world_size))
            return 0
        log = set_up_logging(launch.rank)
        config = result.config.validate(launch.world_size)
    run = config.run
    notes = init_distributed(launch, run.distributed_backend, timeout_minutes=run.distributed_timeout_minutes)
    check_precision(config.optimizer.precision)
    for note in (*result.notes, *notes):
        log.info("note: %s", note)

    # Imported late: what is wrong with the flags is told without waiting for DeepSpeed to load.
    from megatron.training.build import build_run
    from megatron.training.loop import fit, test
    from megatron.training.presence import Presence

    with Presence.of_world(run.distributed_timeout_minutes) as presence:
        built = build_run(config, launch)
        with built.ownership, built.run_log:
            progress = fit(built, presence.at)
            # Not after an exit condition: whoever stopped the run may not wait for an evaluation.
            if run.eval_iters and progress.iteration >= built.last_iteration:
                test(built)
    return 0


if __name__ == "__main__":
    try:
        # Inside: the message comes before the process group is left, which may wait for other ranks.
        with report_errors():
            sys.exit(main(sys.argv[1:]))
    finally:
        close_distributed()
