"""Run a script that uses Accelerate with DeepSpeed where there is no GPU, which Accelerate itself does not.

torchrun --nproc-per-node 2 on_cpu.py train.py ARGUMENTS
"""

import os
import runpy
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

from accelerate.state import DistributedType, PartialState
from deepspeed import init_distributed


def gloo(self, *args, **kwargs):
    return "gloo", DistributedType.MULTI_GPU


PartialState._prepare_backend = gloo
init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
del sys.argv[0]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
