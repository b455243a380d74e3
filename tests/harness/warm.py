"""What the test fork server imports once, so that a fresh rank costs a fork instead of seconds of imports.

As an elastic agent's worker server (megatron/elastic/preload.py), and what only tests need beside it.
"""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging

from megatron.elastic.preload import preload

preload(
    (
        "torch._inductor.compile_fx",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "deepspeed.module_inject.auto_ep_layer",
        "deepspeed.runtime.superoffload.superoffload_stage3",
        "safetensors.torch",
        "matrix.taking",
    )
)

import deepspeed.ops

# Without this DeepSpeed compiles its shared-memory collectives at the first init_distributed (about a minute).
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
