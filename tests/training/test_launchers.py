"""Who am I under srun and mpirun: a table of environments as these launchers set them, and two real runs."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from matrix.recording import command_line, write_dataset
from megatron.training.launch import LaunchError, LaunchInfo, prepare_environment
from megatron.training.launchers import first_host

ROOT = Path(__file__).resolve().parents[2]

SRUN = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_NNODES": "2",
}  # fmt: skip
ONE_NODE = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "3", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1",
    "SLURM_NNODES": "1", "SLURM_STEP_NODELIST": "node09",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MPICH4 = {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "3", "PMI_LOCAL_SIZE": "4"}
PALS = {"PMI_RANK": "3", "PMI_SIZE": "4", "PALS_LOCAL_RANKID": "0", "PALS_LOCAL_SIZE": "1", "MASTER_ADDR": "x0"}
# sbatch --ntasks 4, no srun in the script: what SLURM sets for the script itself.
BATCH = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "4"}
BATCH |= {"SLURM_JOB_NODELIST": "node03"}
TORCH = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "a"}
TORCH |= {"MASTER_PORT": "1"}

PORT_77_0, PORT_77_3, PORT_77, PORT_PRTE = (
    str(20000 + zlib.crc32(job) % 12000) for job in (b"77.0", b"77.3", b"77", b"prterun-n1-5@1")
)

RIGHT = {
    # environment, (rank, local rank, world size, local size), where to meet
    "srun, two nodes": (SRUN, (5, 1, 8, 4), ("node03", PORT_77_0)),
    "srun, uneven nodes": (
        {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "6,2", "SLURM_LOCALID": "1", "SLURM_PROCID": "7"},
        (7, 1, 8, 2),
        ("node03", PORT_77_0),
    ),
    "srun, one node": (ONE_NODE, (1, 1, 2, 2), ("127.0.0.1", PORT_77_3)),
    "srun of part of the job's tasks": ({**SRUN, "SLURM_NTASKS": "64"}, (5, 1, 8, 4), ("node03", PORT_77_0)),
    "srun, the user's own address": (
        {**SRUN, "MASTER_ADDR": "ib0", "MASTER_PORT": "5"}, (5, 1, 8, 4), ("ib0", "5"),
    ),
    "srun in a container that passes no step on, with an address": (
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "MASTER_ADDR": "a", "MASTER_PORT": "5"},
        (0, 0, 2, 2), ("a", "5"),
    ),
    "srun, the script exported WORLD_SIZE": ({**SRUN, "WORLD_SIZE": "8"}, (5, 1, 8, 4), ("node03", PORT_77_0)),
    "srun --mpi=pmi2": ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8"}, (5, 1, 8, 4), ("node03", PORT_77_0)),
    "srun --mpi=pmix": ({**SRUN, "PMIX_RANK": "5"}, (5, 1, 8, 4), ("node03", PORT_77_0)),
    "mpirun of Open MPI": (OPEN_MPI, (1, 1, 2, 2), ("127.0.0.1", "29500")),
    "mpirun of Open MPI 5": (
        {**OPEN_MPI, "PMIX_RANK": "1", "PMIX_NAMESPACE": "prterun-n1-5@1"}, (1, 1, 2, 2), ("127.0.0.1", PORT_PRTE),
    ),
    "mpirun of Open MPI inside a batch job": ({**BATCH, **OPEN_MPI}, (1, 1, 2, 2), ("127.0.0.1", PORT_77)),
    "mpirun whose daemons are steps of SLURM": (
        {**SRUN, **OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
        (1, 0, 2, 1), ("node03", PORT_77),
    ),
    "Intel MPI on two nodes of SLURM": (
        {**SRUN, **HYDRA, "SLURM_PROCID": "1"}, (3, 1, 4, 2), ("node03", PORT_77),
    ),
    "MPICH 4": (MPICH4, (3, 3, 4, 4), ("127.0.0.1", "29500")),
    "PALS with an address": (PALS, (3, 0, 4, 1), ("x0", "29500")),
    "torchrun in a step of SLURM": ({**SRUN, **TORCH}, (9, 1, 16, 8), None),
    "torchrun under mpirun": ({**OPEN_MPI, **TORCH}, (9, 1, 16, 8), None),
    "srun -n 1": ({**ONE_NODE, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (0, 0, 1, 1), None),
    "mpirun -n 1": ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, (0, 0, 1, 1), None),
    "sbatch with one task": ({**BATCH, "SLURM_NTASKS": "1"}, (0, 0, 1, 1), None),
    "a shell of salloc on the login node": ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, (0, 0, 1, 1), None),
    "a shell of salloc on a node": ({**BATCH, "SLURM_STEP_ID": "4294967290"}, (0, 0, 1, 1), None),
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_ranks_are_taken_from_the_launcher(case: str) -> None:
    environ, expected, address = RIGHT[case]
    launch = LaunchInfo.from_environment(environ)
    assert (launch.rank, launch.local_rank, launch.world_size, launch.local_world_size) == expected
    assert launch.address == address
    assert launch.is_plain == (expected[2] == 1)
    prepared = {**environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    prepare_environment(launch, prepared)  # and what torch and DeepSpeed read agrees
    assert (prepared["RANK"], prepared["WORLD_SIZE"], prepared["LOCAL_RANK"]) == tuple(
        str(expected[index]) for index in (0, 2, 1)
    )
    if launch.address is not None:
        assert (prepared["MASTER_ADDR"], prepared["MASTER_PORT"]) == launch.address


REFUSED = {
    "the issue's, rank 0": ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "Missing: SLURM_STEP_ID.*srun"),
    "the issue's, rank 1": ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "Missing: SLURM_STEP_ID.*srun"),
    "sbatch without srun": (BATCH, "SLURM_NTASKS=4.*Missing: SLURM_STEP_ID.*RANK=0 WORLD_SIZE=1"),
    "sbatch without srun, told so": ({**BATCH, "SLURM_STEP_ID": "4294967291"}, "Missing: SLURM_STEP_ID"),
    "srun, no size": ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}, "Missing: SLURM_STEP_NUM_TASKS or SLURM_NTASKS"),
    "srun, no nodes": (
        {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "Missing: LOCAL_RANK, MASTER_ADDR",
    ),
    "srun, not a rank": ({**SRUN, "SLURM_PROCID": "8"}, "rank 8 is not a rank of 8"),
    "srun, no number": ({**SRUN, "SLURM_PROCID": "x"}, "SLURM_PROCID='x'"),
    "srun, broken nodes": ({**SRUN, "SLURM_STEP_NODELIST": "node[03"}, "no list of nodes"),
    "srun, another WORLD_SIZE": ({**SRUN, "WORLD_SIZE": "1"}, "contradicts itself: WORLD_SIZE=1, but 8 of SLURM"),
    "srun, another RANK": ({**SRUN, "RANK": "0"}, "contradicts itself: RANK=0, but 5 of SLURM"),
    "Open MPI, no size": ({"OMPI_COMM_WORLD_RANK": "1"}, "Missing: OMPI_COMM_WORLD_SIZE"),
    "Open MPI, no rank": ({"OMPI_COMM_WORLD_SIZE": "2"}, "Missing: OMPI_COMM_WORLD_RANK"),
    "Open MPI on two nodes": ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "Missing: MASTER_ADDR"),
    "Open MPI and PMI differ": ({**OPEN_MPI, **HYDRA}, "contradict each other: OMPI_COMM_WORLD_RANK=1.*PMI_RANK=3"),
    "Open MPI and PMIx differ": ({**OPEN_MPI, "PMIX_RANK": "0"}, "contradict each other.*PMIX_RANK=0"),
    "PMI, no size": ({"PMI_RANK": "0"}, "Missing: PMI_SIZE"),
    "PMI, no place on the node": ({"PMI_RANK": "0", "PMI_SIZE": "2", "MASTER_ADDR": "a"}, "Missing: LOCAL_RANK"),
    "PMI and SLURM differ": ({**SRUN, "PMI_RANK": "1", "PMI_SIZE": "8"}, "contradict each other"),
    "PMIx alone": ({"PMIX_RANK": "1"}, "Missing: WORLD_SIZE"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_one_of_several_never_takes_itself_for_the_whole_run(case: str) -> None:
    environ, part = REFUSED[case]
    with pytest.raises(LaunchError, match=part):
        LaunchInfo.from_environment(environ)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"), ("node[03-05,9]", "node03"), ("node[7,9-11],other", "node7"), ("a,b[1-2]", "a"),
        ("rack[1-2]n[04-09]", "rack1n04"), ("gpu-[001-128].site.org", "gpu-001.site.org"), ("n[ 1-2]x", "n1x"),
    ],
)  # fmt: skip
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", "[", "node[", "node[]", ",a", "a b", "node[1-2", "node]"])
def test_what_is_no_list_of_nodes_is_refused(nodes: str) -> None:
    with pytest.raises(LaunchError, match="no list of nodes"):
        first_host(nodes)


def _of_slurm(rank: int) -> dict[str, str]:
    place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_ID": "0", "SLURM_NNODES": "1"}
    return place | {"SLURM_NTASKS": "2"}


def _of_open_mpi(rank: int) -> dict[str, str]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "SIZE": 2, "LOCAL_SIZE": 2}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in names.items()}


@pytest.mark.parametrize(
    ("of_rank", "job"), [(_of_slurm, "SLURM_JOB_ID"), (_of_open_mpi, "PMIX_NAMESPACE")], ids=["srun", "mpirun"]
)
def test_two_processes_train_one_run_without_torchs_variables(of_rank, job: str, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "ranks_text_document")
    flags = command_line(data, zero=1, iters=2, save=tmp_path / "save", log_interval=1)
    environment = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", job: str(os.getpid())}
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "pretrain_gpt.py"), *flags],
            env=environment | of_rank(rank), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)[-4000:]
    assert "iteration 2/2 | samples 16 | loss" in outputs[0] and "iteration 2/2" not in outputs[1]
    assert "tp1 pp1 dp2" in outputs[0]
    states = sorted(path.name for path in (tmp_path / "save" / "global_step2").glob("*_optim_states.pt"))
    assert len(states) == 2, states
