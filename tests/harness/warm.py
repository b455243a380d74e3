"""What the test fork server imports once, so that a fresh rank costs a fork instead of seconds of imports.

Imports only: a process that has run a matmul with several OpenMP threads may hang its children after a fork.
DeepSpeed pulls in torch._dynamo and inductor at the first ``initialize``; they are imported here too. So is all that
is ours: every rank would compile it again where Python may keep no byte code (PYTHONDONTWRITEBYTECODE).
"""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import importlib
import logging
import pkgutil

import megatron


def _ours() -> list[str]:
    """But for what needs a GPU's packages, and for programs."""
    modules = (module.name for module in pkgutil.walk_packages(megatron.__path__, "megatron."))
    return [name for name in modules if ".triton_" not in name and not name.endswith("__main__")]


for name in (
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "deepspeed",
    "deepspeed.pipe",
    "deepspeed.runtime.pipe.engine",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "safetensors.torch",
    "torch.utils.serialization.config",
    "torch.profiler._cupti_monitor",
    *_ours(),
    "matrix.taking",
):
    importlib.import_module(name)

import deepspeed.ops

# Without this DeepSpeed compiles its shared-memory collectives at the first init_distributed (about a minute).
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

gc.collect()
# The children share the parent's heap; a collection in a child would touch, and so copy, all of it.
gc.freeze()
