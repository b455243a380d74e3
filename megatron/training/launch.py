"""Who this process is, and the process group: the only place that reads or sets environment variables.

Torchrun, the deepspeed launcher, srun, mpirun and plain `python` end in the same LaunchInfo, and what
DeepSpeed reads from the environment by itself is made to agree with it.

    launch = LaunchInfo.from_environment(local_rank=config.run.local_rank)
    notes = init_distributed(launch, config.run.distributed_backend, timeout_minutes=10)    # collective
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta

from megatron.training.launchers import LaunchError, launcher_variables, number

SHM_COMM_VARIABLE = "MEGATRON_SHM_COMM"
"""1 lets DeepSpeed build and use its shared-memory collectives for CPU; the first start then compiles a minute."""

_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class LaunchInfo:
    """Which process of which run this is."""

    rank: int = 0
    local_rank: int = 0
    """Among the processes of this machine: the index of its device."""
    world_size: int = 1
    local_world_size: int = 1
    """Processes on this machine."""
    is_plain: bool = True
    """Started by `python` alone: no launcher, no address to meet at."""
    wants_shm_comm: bool = False
    address: tuple[str, str] | None = None
    """Where rank 0 is met, host and port, if this was started by srun or mpirun, which do not say it."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None, local_rank: int | None = None) -> LaunchInfo:
        """`local_rank` is the launcher's --local_rank, if it passes one. RANK and WORLD_SIZE, where both are set, are
        believed; without them srun's or mpirun's own variables. Raises LaunchError if only part of what a launcher
        sets is there, or if it contradicts itself."""
        environ = os.environ if environ is None else environ
        wants_shm_comm = environ.get(SHM_COMM_VARIABLE, "0") == "1"
        derived = {} if "RANK" in environ and "WORLD_SIZE" in environ else launcher_variables(environ)
        environ = {**environ, **derived}
        if "RANK" not in environ and (number(environ, "WORLD_SIZE") or 1) == 1:
            return cls(wants_shm_comm=wants_shm_comm)
        missing = [name for name in _REQUIRED if name not in environ]
        if missing:
            raise LaunchError(
                f"the environment of a launcher is incomplete. Missing: {', '.join(missing)}. Expected: all of "
                f"{', '.join(_REQUIRED)}. What to do: start with torchrun or deepspeed, or unset RANK and WORLD_SIZE"
            )
        rank, world_size = number(environ, "RANK") or 0, number(environ, "WORLD_SIZE") or 0
        local = number(environ, "LOCAL_RANK")
        if local is None:
            local = rank if local_rank is None else local_rank
        if local_rank is not None and local_rank != local:
            raise LaunchError(
                f"--local_rank {local_rank} contradicts LOCAL_RANK={local} in the environment. "
                "What to do: leave --local_rank to the launcher"
            )
        if not 0 <= rank < world_size:
            raise LaunchError(f"RANK={rank} is not a rank of WORLD_SIZE={world_size}")
        local_size = number(environ, "LOCAL_WORLD_SIZE") or number(environ, "LOCAL_SIZE") or world_size
        address = (environ["MASTER_ADDR"], environ["MASTER_PORT"]) if derived else None
        return cls(rank, local, world_size, local_size, False, wants_shm_comm, address)


def prepare_environment(launch: LaunchInfo, environ: MutableMapping[str, str] | None = None) -> None:
    """What must be set before deepspeed is imported: the accelerator, where there is none; a fair share of the
    cores for each process; the ranks under the names that DeepSpeed reads. What the user set stays."""
    environ = os.environ if environ is None else environ
    environ.setdefault("OMP_NUM_THREADS", str(threads_per_process(launch)))
    environ.setdefault("RANK", str(launch.rank))
    environ.setdefault("LOCAL_RANK", str(launch.local_rank))
    environ.setdefault("WORLD_SIZE", str(launch.world_size))
    if launch.address is not None:
        environ.setdefault("MASTER_ADDR", launch.address[0])
        environ.setdefault("MASTER_PORT", launch.address[1])
    if "DS_ACCELERATOR" not in environ and not _has_accelerator():
        environ["DS_ACCELERATOR"] = "cpu"


def threads_per_process(launch: LaunchInfo) -> int:
    """The cores this process may use, shared with the others on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // launch.local_world_size)


def init_distributed(launch: LaunchInfo, backend: str = "nccl", timeout_minutes: float = 10) -> list[str]:
    """Start torch.distributed through DeepSpeed. Collective over the world; does nothing if it is up already.
    Returns notes for the user. Raises LaunchError."""
    prepare_environment(launch)

    import deepspeed
    import deepspeed.ops
    import torch
    from deepspeed.accelerator import get_accelerator

    if torch.distributed.is_initialized() and deepspeed.comm.is_initialized():
        return []
    # torch and numpy may have been imported before OMP_NUM_THREADS was set.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].split(",")[0]))
    if not launch.wants_shm_comm:
        # The only switch that DeepSpeed looks at before it compiles this op (comm/torch.py, build_shm_op).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = get_accelerator()
    backend, notes = choose_backend(backend, accelerator.device_name())
    if accelerator.device_name() != "cpu":
        accelerator.set_device(launch.local_rank)
    timeout = timedelta(minutes=timeout_minutes)
    set_timeout_of_groups(timeout)
    if launch.is_plain and not torch.distributed.is_initialized():
        # One process meets nobody: no port to be taken, no file to be left behind.
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    return notes


def set_timeout_of_groups(timeout: timedelta) -> None:
    """Of every process group that is made from now on, by DeepSpeed too, which names no timeout when it makes one:
    torch's defaults (10 minutes for nccl, 30 for all others) are replaced. Raises LaunchError."""
    from torch.distributed import distributed_c10d

    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        if not hasattr(distributed_c10d, name):
            raise LaunchError(
                f"--distributed-timeout-minutes cannot reach every process group: this torch has no "
                f"torch.distributed.distributed_c10d.{name}. What to do: install a version of torch that the README "
                "names"
            )
        setattr(distributed_c10d, name, timeout)


def check_precision(precision: str) -> None:
    """Raise LaunchError if this device does not compute in `precision`; DeepSpeed would, but without advice."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    is_supported = {"fp32": True, "bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    if not is_supported[precision]:
        raise LaunchError(
            f"--{precision} is not supported on this device ({accelerator.device_name()}). "
            f"Expected one of: {', '.join(name for name, is_there in is_supported.items() if is_there)}. "
            f"What to do: drop --{precision} or use another; a checkpoint of one precision resumes in any other"
        )


def close_distributed() -> None:
    """Leave the process group; after an error too, so that the other ranks notice."""
    if "torch" not in sys.modules:
        return  # a question about the flags: there is none, and loading torch would be all that it waits for
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def choose_backend(asked: str, device: str) -> tuple[str, list[str]]:
    """The backend for a device of DeepSpeed's accelerator ("cuda", "cpu", ...): nccl, which is Megatron's default,
    becomes gloo on the CPU. Raises LaunchError for a backend that cannot be meant."""
    if device == "cpu" and asked == "nccl":
        return "gloo", ["--distributed-backend nccl is run as gloo: there is no CUDA device"]
    if device == "cpu" and asked == "hccl":
        raise LaunchError(
            f"--distributed-backend {asked} needs its own device; found only the CPU. What to do: use gloo"
        )
    return asked, []


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
