"""Which process of which run this is, from the variables of srun and mpirun, which set none of torch's.

What a launcher's variables say becomes torch's (RANK, WORLD_SIZE, LOCAL_RANK, ..., MASTER_PORT), or the
start is refused by the names of what is missing. A process that is one of several never takes itself for the whole run.

    variables = launcher_variables(environ)     # {"RANK": "1", "WORLD_SIZE": "2", ...}; {} for a lone process

| started by | rank, size, place on the node | where to meet |
|---|---|---|
| srun | SLURM_PROCID, SLURM_STEP_NUM_TASKS or SLURM_NTASKS, SLURM_LOCALID | first host of SLURM_STEP_NODELIST |
| mpirun of Open MPI | OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE | this machine, or SLURM's first host |
| of MVAPICH | MV2_COMM_WORLD_RANK, ... | the same |
| of MPICH, Intel MPI, PALS | PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, PMI_LOCAL_RANK, PALS_LOCAL_RANKID | the same |

MPI's variables win over SLURM's: inside an allocation mpirun's daemons, not the ranks, are the tasks of SLURM.
A shell of salloc is a lone process. So is a batch script, which SLURM gives SLURM_PROCID=0 and all of SLURM_NTASKS; but
where it asked for several tasks, srun was forgotten more likely than meant, and the start is refused.

MASTER_PORT, where it is not given: 20000 + crc32(the job's name) % 12000, the name being SLURM's job and step or
PMIx's namespace, so that two jobs on one machine do not meet; without any such name 29500, as torchrun's.
MASTER_ADDR and MASTER_PORT of the user's own always win. Pure: looks at nothing but the mapping it is given.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

LOWEST_PORT, NUM_PORTS, DEFAULT_PORT = 20000, 12000, 29500
"""Below the ports that Linux gives to outgoing connections (32768 on)."""
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""SLURM numbers its batch, interactive and external steps from the top (slurm.h: SLURM_BATCH_SCRIPT, ...)."""


class LaunchError(RuntimeError):
    """An environment that does not say which rank this is, or a backend that is not there."""


@dataclass(frozen=True)
class _Family:
    """Of one kind of launcher, the variables that may say each thing, best first."""

    name: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]


_MPI = (
    _Family(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Family(
        "MVAPICH",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Family(
        "MPICH, Intel MPI or PALS",
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
    ),
)


@dataclass(frozen=True)
class _Place:
    """What one launcher says."""

    family: str
    said_by: str
    """The variables of rank and size, for messages."""
    rank: int
    size: int
    local_rank: int | None
    local_size: int | None


def launcher_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """torch's variables as srun's or mpirun's say them; empty for a lone process. Raises LaunchError where they say
    that this is one of several processes but not all that is needed, or contradict each other."""
    place = _place(environ)
    if place is None or place.size == 1:
        return {}
    if not 0 <= place.rank < place.size:
        raise LaunchError(f"{place.said_by}: rank {place.rank} is not a rank of {place.size}")
    found: dict[str, int | str | None] = {"RANK": place.rank, "WORLD_SIZE": place.size}
    found |= {"LOCAL_RANK": place.local_rank, "LOCAL_WORLD_SIZE": place.local_size}
    if differing := [
        f"{name}={environ[name]}, but {value} of {place.family}"
        for name, value in found.items()
        if value is not None and name in environ and number(environ, name) != value
    ]:
        raise LaunchError(
            f"the environment contradicts itself: {'; '.join(differing)} ({place.said_by}). What to do: unset what a "
            "script exported, or give RANK and WORLD_SIZE both, which are then believed"
        )
    is_one_node = place.local_size == place.size
    found["MASTER_ADDR"] = environ.get("MASTER_ADDR") or ("127.0.0.1" if is_one_node else _first_host(environ))
    found["MASTER_PORT"] = environ.get("MASTER_PORT") or str(_port(environ, place))
    found["LOCAL_RANK"] = environ.get("LOCAL_RANK", found["LOCAL_RANK"])
    if missing := [name for name in ("LOCAL_RANK", "MASTER_ADDR") if found[name] is None]:
        raise LaunchError(
            f"{place.said_by} says that this is rank {place.rank} of {place.size} ({place.family}), but not all that a "
            f"rank must know. Missing: {', '.join(missing)}. What to do: set it for every rank (MASTER_ADDR: the host "
            "of rank 0; LOCAL_RANK: the number among the ranks of this machine), or start with torchrun or deepspeed"
        )
    return {name: str(value) for name, value in found.items() if value is not None}


def number(environ: Mapping[str, str], name: str) -> int | None:
    """None where it is not set. Raises LaunchError where it is no whole number."""
    text = environ.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"{name}={text!r} in the environment is not a whole number") from None


def first_host(nodes: str) -> str:
    """Of SLURM's list of nodes: "node[03-05,9],other" is node03, node04, node05, node9, other."""
    head = re.match(r"(?:[^,\[\]]|\[[^\[\]]*\])+(?=,|$)", nodes)
    host = re.sub(r"\[\s*([^\],-]+)[^\]]*\]", r"\1", head.group()) if head else ""
    if not re.fullmatch(r"[\w.:-]+", host):
        raise LaunchError(f"{nodes!r} is no list of nodes such as node[03-05,9]. What to do: set MASTER_ADDR")
    return host


def _place(environ: Mapping[str, str]) -> _Place | None:
    slurm = _slurm(environ)
    said = [place for family in _MPI if (place := _mpi(environ, family))]
    pmix = number(environ, "PMIX_RANK")
    for other in said:
        wrong = other if (other.rank, other.size) != (said[0].rank, said[0].size) else None
        if wrong or (pmix is not None and pmix != other.rank):
            raise LaunchError(
                f"the launcher's variables contradict each other: {said[0].said_by} "
                f"and {wrong.said_by if wrong else f'PMIX_RANK={pmix}'}. "
                "What to do: start from a shell that no other launcher started, or give RANK and WORLD_SIZE both"
            )
    if said and said[0].local_rank is None and slurm is not None:  # srun --mpi=pmi2 says it twice
        if (slurm.rank, slurm.size) != (said[0].rank, said[0].size):
            raise LaunchError(f"the launcher's variables contradict each other: {said[0].said_by} and {slurm.said_by}")
        return slurm
    if said:
        return said[0]
    if slurm is None and pmix is not None:
        size = number(environ, "WORLD_SIZE")
        if size is None:
            raise LaunchError(
                f"PMIX_RANK={pmix} says that this is one of several processes. Missing: WORLD_SIZE, their number. "
                "What to do: set it for every rank, or start with torchrun or deepspeed"
            )
        return _Place("PMIx", f"PMIX_RANK={pmix}, WORLD_SIZE={size}", pmix, size, None, None)
    if not slurm:
        _refuse_forgotten_srun(environ)
    return slurm


def _mpi(environ: Mapping[str, str], family: _Family) -> _Place | None:
    rank, size = number(environ, family.rank), number(environ, family.size)
    if rank is None and size is None:
        return None
    if rank is None or size is None:
        missing, there = (family.rank, family.size) if rank is None else (family.size, family.rank)
        raise LaunchError(
            f"{there}={environ[there]} says that {family.name} started this process. Missing: {missing}. What to do: "
            "pass all of its variables on (into a container, say), or give RANK and WORLD_SIZE"
        )
    local_rank, local_size = _first(environ, family.local_rank), _first(environ, family.local_size)
    said_by = f"{family.rank}={rank}, {family.size}={size}"
    return _Place(family.name, said_by, rank, size, local_rank, local_size)


def _slurm(environ: Mapping[str, str]) -> _Place | None:
    """None outside of a step that srun started."""
    rank, size = number(environ, "SLURM_PROCID"), _first(environ, ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))
    if rank is None or not _is_step(environ):
        return None
    if size is None:
        raise LaunchError(
            f"SLURM_PROCID={rank} says that srun started this process. Missing: SLURM_STEP_NUM_TASKS or SLURM_NTASKS. "
            "What to do: pass SLURM's variables on (into a container, say), or give RANK and WORLD_SIZE"
        )
    is_one_node = _first(environ, ("SLURM_STEP_NUM_NODES", "SLURM_NNODES")) == 1
    local_rank = number(environ, "SLURM_LOCALID")
    if local_rank is None and is_one_node:
        local_rank = rank
    said_by = f"SLURM_PROCID={rank}, {size} tasks"
    return _Place("SLURM", said_by, rank, size, local_rank, size if is_one_node else _tasks_here(environ))


def _is_step(environ: Mapping[str, str]) -> bool:
    """The user's own address means several processes too, whatever else was passed on to them."""
    step = number(environ, "SLURM_STEP_ID")
    if step is not None:
        return 0 <= step < _FIRST_SPECIAL_STEP
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
    return any(name in environ for name in names) or all(name in environ for name in ("MASTER_ADDR", "MASTER_PORT"))


def _refuse_forgotten_srun(environ: Mapping[str, str]) -> None:
    """None for a lone process."""
    rank, size = number(environ, "SLURM_PROCID"), number(environ, "SLURM_NTASKS")
    is_interactive = number(environ, "SLURM_STEP_ID") == 0xFFFFFFFA
    if rank is None or (size or 1) == 1 or is_interactive:
        return
    raise LaunchError(
        f"SLURM_PROCID={rank} and SLURM_NTASKS={size} say that this job has {size} tasks, but not that srun started "
        "this process as one of them. Missing: SLURM_STEP_ID. What to do: start with `srun python pretrain_gpt.py ...` "
        "(in a container, pass SLURM's variables on), with torchrun or deepspeed, or, to train in one process, set "
        "RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500"
    )


def _tasks_here(environ: Mapping[str, str]) -> int | None:
    """Of "2(x3),1", which is 2, 2, 2, 1 by node, this node's."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or ""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d{1,6})\))?", text):
        counts += [int(count)] * int(times or 1)
    node = number(environ, "SLURM_NODEID")
    if node is not None and 0 <= node < len(counts):
        return counts[node]
    return number(environ, "SLURM_NTASKS_PER_NODE")


def _first_host(environ: Mapping[str, str]) -> str | None:
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if environ.get(name):
            return first_host(environ[name])
    return None


def _port(environ: Mapping[str, str], place: _Place) -> int:
    """The same on every rank: mpirun's daemons are steps of SLURM, each another one."""
    job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid") or environ.get("SLURM_JOB_ID")
    if place.family == "SLURM" and "SLURM_JOB_ID" in environ:
        job = f"{environ['SLURM_JOB_ID']}.{environ.get('SLURM_STEP_ID', '')}"
    return LOWEST_PORT + zlib.crc32(job.encode()) % NUM_PORTS if job else DEFAULT_PORT


def _first(environ: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    return next((value for name in names if (value := number(environ, name)) is not None), None)
