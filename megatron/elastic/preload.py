"""Everything that a rank imports, so that a process that is forked from this one has it.

Imports only: a process that has run a matmul with several OpenMP threads may hang its children after a fork, and one
that has touched a GPU cannot pass it on. DeepSpeed pulls in torch._dynamo with the first optimizer; it is imported here
too. So is all that is ours: every rank would compile it again where Python may keep no byte code
(PYTHONDONTWRITEBYTECODE).
"""

from __future__ import annotations

import gc
import importlib
import pkgutil
from collections.abc import Iterable

import megatron

_THEIRS = (
    "torch",
    "torch._dynamo",
    "deepspeed",
    "deepspeed.pipe",
    "deepspeed.runtime.pipe.engine",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.bf16_optimizer",
    "torch.utils.serialization.config",
    "torch.profiler._cupti_monitor",
)


def preload(more: Iterable[str] = ()) -> None:
    """`more`: modules beside those of a training run. DS_ACCELERATOR is set."""
    for name in (*_THEIRS, *_ours(), *more):
        importlib.import_module(name)
    gc.collect()
    # The children share the parent's heap; a collection in a child would touch, and so copy, all of it.
    gc.freeze()


def _ours() -> list[str]:
    """But for what needs a GPU's packages, and for programs."""
    modules = (module.name for module in pkgutil.walk_packages(megatron.__path__, "megatron."))
    return [name for name in modules if ".triton_" not in name and not name.endswith("__main__")]
