"""The environment of an elastic job's processes: what is set for an agent, and what a rank takes from it.

set_for_agent(is_cpu=True)
take(environment)                    # in the forked rank: from now on its own
take_part(num_ranks=2)               # of three, one stands by
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def set_for_agent(is_cpu: bool) -> None:
    """What the user set stays, but for what torch needs so that a restart works."""
    # With torch 2.13's shared store the ranks of a restart do not find each other ("connectFullMesh failed").
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if is_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def is_cpu() -> bool:
    """A process that has been forked cannot use a GPU that its parent has looked at."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return True
    import torch

    return not torch.accelerator.is_available()


def take(environment: Mapping[str, str]) -> None:
    """In a forked process: the environment that its agent gave it, instead of the server's."""
    os.environ.clear()
    os.environ.update(environment)


def meeting() -> str:
    """At which this rank has met the others: of each start another one."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    return "/".join(os.environ.get(name, "") for name in names)


def take_part(num_ranks: int) -> None:
    """The first so many ranks of the world are the world: DeepSpeed reads its size here."""
    os.environ["WORLD_SIZE"] = str(num_ranks)
