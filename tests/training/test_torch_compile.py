"""--torch-compile trains as without it, under every kind of parallelism, and resumes checkpoints of runs without it."""

from __future__ import annotations

import shutil

import pytest

from harness.ranks import run_ranks
from matrix.cells import Cell
from matrix.recording import command_line, train

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler for a CPU",
)
CASES = {
    "tp2, cut sequences": (Cell(tp=2, zero=1, cut=True), {}),
    "zero3": (Cell(dp=2, zero=3), {}),
    "pp2, dropout": (Cell(pp=2, zero=1), {"hidden_dropout": 0.1}),
}


def _trained(rank: int, world_size: int, argv: list[str]):
    """The curves, and how many graphs were compiled."""
    curves = train(rank, world_size, argv)
    from torch._dynamo.utils import counters

    return curves, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("case", CASES)
def test_trains_the_same(case: str, data, tmp_path):
    cell, flags = CASES[case]
    flags = {**cell.flags, **flags, "num_layers": 2, "iters": 4}
    plain = run_ranks(cell.world_size, train, command_line(data, **flags, save=tmp_path, save_interval=2))[0]
    argv = command_line(data, **flags, load=tmp_path, load_tag="global_step2", torch_compile=True)
    for compiled, num_graphs in run_ranks(cell.world_size, _trained, argv, timeout=400):
        assert num_graphs >= 1
        assert sorted(compiled.losses) == [3, 4]
        for step, loss in compiled.losses.items():
            assert loss == pytest.approx(plain.losses[step], abs=2e-6)
            assert compiled.grad_norms[step] == pytest.approx(plain.grad_norms[step], rel=2e-5)
