"""Pretrain a GPT.

    deepspeed --num_gpus 2 pretrain_gpt.py --deepspeed --tensor-model-parallel-size 2 ...
    torchrun --nproc-per-node 2 pretrain_gpt.py --tensor-model-parallel-size 2 ...

`python -m megatron.config` lists every flag; examples/ has complete command lines.
"""

import sys

from megatron.training.entry import parsed, pretrain
from megatron.training.estimate import estimate
from megatron.training.launch import close_distributed
from megatron.training.reporting import report_errors


def main(argv: list[str]) -> int:
    result, launch = parsed(argv)
    if not result.config.estimate.estimate:
        pretrain(result, launch)
    elif launch.rank == 0:
        print(estimate(result.config, launch.world_size))
    return 0


if __name__ == "__main__":
    try:
        # Inside: the message comes before the process group is left, which may wait for other ranks.
        with report_errors():
            sys.exit(main(sys.argv[1:]))
    finally:
        close_distributed()
