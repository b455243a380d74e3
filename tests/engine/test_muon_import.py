"""An engine starts without torch's inductor, and what DeepSpeed wants compiled is compiled when it is called."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from matrix.recording import command_line
from megatron.engine.muon_import import MUON, when_called

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("zero", [0, 1])
def test_the_first_iteration_needs_no_inductor(zero, data):
    """A process of its own: the tests' ranks have loaded all sorts of things."""
    code = (
        "import sys; from pretrain_gpt import main; main(sys.argv[1:]); "
        f"print([m for m in ('torch._inductor.compile_fx', {MUON!r}) if m in sys.modules])"
    )
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    line = command_line(data, zero=zero, iters=1)
    done = subprocess.run([sys.executable, "-c", code, *line], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The second is loaded: were it not, there would be nothing to keep the first away from.
    assert done.stdout.splitlines()[-1] == str([MUON])


def test_it_is_compiled_once_when_it_is_called():
    compiled = []

    def stock():
        def decorator(function):
            compiled.append(function.__name__)
            return lambda x: function(x) + 100

        return decorator

    @when_called(stock)
    def double(x):
        """Doubles."""
        return 2 * x

    assert not compiled and double.__doc__ == "Doubles."
    assert [double(1), double(2)] == [102, 104] and compiled == ["double"]


def test_inside_of_another_compiled_function_it_is_a_part_of_it():
    @when_called(lambda: torch.compile(backend="eager", fullgraph=True))
    def inner(x):
        return x * 2

    @when_called(lambda: torch.compile(backend="eager", fullgraph=True))
    def outer(x):
        return inner(x) + 1

    x = torch.arange(3.0)
    assert torch.equal(outer(x), x * 2 + 1) and torch.equal(inner(x), x * 2)
