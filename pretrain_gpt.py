"""Pretrain a GPT.

    deepspeed --num_gpus 2 pretrain_gpt.py --deepspeed --tensor-model-parallel-size 2 ...
    torchrun --nproc-per-node 2 pretrain_gpt.py --tensor-model-parallel-size 2 ...

`python -m megatron.config` lists every flag; examples/ has complete command lines.
"""

import sys

from megatron.config.arguments import parse
from megatron.training.launch import LaunchInfo, distributed

from megatron.config.errors import ConfigError


def main(argv: list[str]) -> int:
    try:
        result = parse(argv)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    launch = LaunchInfo.from_environment()
    with distributed(launch, result.config.run, notes=result.notes):
        # Imported late: a wrong flag is told in a moment, without loading DeepSpeed first.
        from megatron.training.build import build_run
        from megatron.training.loop import fit, test

        run = build_run(result.config, launch)
        with run.run_log:
            fit(run)
            if run.config.run.eval_iters:
                test(run)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
