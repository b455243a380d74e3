"""Who am I, from each launcher's environment; and one plain process that starts without port, file or compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from megatron.training.launch import (
    LaunchError,
    LaunchInfo,
    check_precision,
    choose_backend,
    prepare_environment,
    threads_per_process,
)

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}
DEEPSPEED = {
    "RANK": "3",
    "LOCAL_RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_SIZE": "4",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}


def test_torchrun() -> None:
    assert LaunchInfo.from_environment(TORCHRUN) == LaunchInfo(5, 1, 8, 4, is_plain=False)


def test_deepspeed_launcher_passes_local_rank_too() -> None:
    assert LaunchInfo.from_environment(DEEPSPEED, local_rank=3) == LaunchInfo(3, 3, 4, 4, is_plain=False)


def test_plain_python() -> None:
    assert LaunchInfo.from_environment({}) == LaunchInfo()
    assert LaunchInfo.from_environment({"WORLD_SIZE": "1"}).is_plain
    assert LaunchInfo.from_environment({"MEGATRON_SHM_COMM": "1"}).wants_shm_comm


@pytest.mark.parametrize(
    ("change", "local_rank", "part"),
    [
        ({"MASTER_PORT": None}, None, "Missing: MASTER_PORT"),
        ({"RANK": None}, None, "Missing: RANK"),
        ({"RANK": "8"}, None, "RANK=8 is not a rank of WORLD_SIZE=8"),
        ({"RANK": "one"}, None, "RANK='one'"),
        ({}, 2, "--local_rank 2 contradicts LOCAL_RANK=1"),
    ],
)
def test_broken_environment_is_refused(change: dict[str, str | None], local_rank: int | None, part: str) -> None:
    environ = {name: value for name, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(LaunchError, match=part):
        LaunchInfo.from_environment(environ, local_rank)


def test_backend() -> None:
    assert choose_backend("nccl", "cuda") == ("nccl", [])
    assert choose_backend("gloo", "cpu") == ("gloo", [])
    backend, (note,) = choose_backend("nccl", "cpu")
    assert backend == "gloo" and "no CUDA" in note
    with pytest.raises(LaunchError, match="hccl"):
        choose_backend("hccl", "cpu")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_unsupported_precision_is_refused_with_advice(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    other = {"bf16": "fp16", "fp16": "bf16"}[precision]
    monkeypatch.setattr(get_accelerator(), f"is_{precision}_supported", lambda: False)
    monkeypatch.setattr(get_accelerator(), f"is_{other}_supported", lambda: True)
    with pytest.raises(LaunchError, match=f"--{precision} is not supported.*fp32, {other}"):
        check_precision(precision)
    check_precision(other)
    check_precision("fp32")


def test_environment_is_completed_not_overwritten() -> None:
    environ = {"OMP_NUM_THREADS": "3", "DS_ACCELERATOR": "xpu", "RANK": "7"}
    prepare_environment(LaunchInfo(), environ)
    assert environ == {
        "OMP_NUM_THREADS": "3",
        "DS_ACCELERATOR": "xpu",
        "RANK": "7",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
    }


def test_cores_are_shared() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_per_process(LaunchInfo()) == cores
    assert threads_per_process(LaunchInfo(world_size=cores * 4, local_world_size=cores * 4)) == 1


PLAIN = """
import json, sys
from megatron.training.launch import LaunchInfo, close_distributed, init_distributed
launch = LaunchInfo.from_environment()
notes = init_distributed(launch, "nccl")
import deepspeed, torch, torch.distributed as dist
value = torch.ones(2)
deepspeed.comm.all_reduce(value)
group = dist.new_group([0])
dist.all_reduce(value, group=group)
again = init_distributed(launch, "nccl")
built = [name for name in sys.modules if "shm_comm" in name and not name.startswith("deepspeed.ops")]
print(json.dumps([notes, again, dist.get_backend(), dist.get_world_size(), value.tolist(), built]))
close_distributed()
assert not dist.is_initialized()
"""


def test_plain_process_starts(tmp_path) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environ = {name: value for name, value in os.environ.items() if name not in names}
    environ |= {"TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", PLAIN], env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    notes, again, backend, world_size, value, built = json.loads(done.stdout.strip().splitlines()[-1])
    assert any("gloo" in note for note in notes)
    assert (again, backend, world_size, value, built) == ([], "gloo", 1, [1.0, 1.0], [])
    assert list(tmp_path.iterdir()) == []  # nothing was compiled
