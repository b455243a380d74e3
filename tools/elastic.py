#!/usr/bin/env python3
"""Train on the machines that are there: when one is lost the job goes on with the others, when one comes it grows.

    tools/elastic.py store --port 29400                     # once, on a machine that stays (a login node)
    tools/elastic.py agent --nodes 2:8 --nproc-per-node 8 --endpoint node0:29400 --run-id 7b -- \\
        --tensor-model-parallel-size 4 --global-batch-size 480 --save runs/7b --save-interval 100 ...   # on each

After the -- come the flags of pretrain_gpt.py. At every change the ranks that are there take a legal topology with the
same global batch, and go on from the newest whole checkpoint of --save. Exit code 0 when the job has come to its end.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.elastic.cli import main

if __name__ == "__main__":
    sys.exit(main())
