"""Exports beside a run: what is waited for, and what is not."""

import signal
import subprocess

import pytest

from harness.ranks import run_ranks
from matrix.recording import build, command_line


def _stopped(rank, world_size, argv, by_signal):
    """How many exports had ended when training had, and whether any process was left."""
    import os

    from megatron.training.loop import fit

    started = []

    class Slow(subprocess.Popen):
        def __init__(self, arguments, **options):
            is_export = "export" in arguments
            super().__init__(["sleep", "3"] if is_export else arguments, **options)
            if is_export:
                started.append(self)

    subprocess.Popen = Slow
    run = build(argv, rank, world_size)
    if by_signal:
        original = run.batches.train

        def train(consumed):
            for number, sample in enumerate(original(consumed)):
                if number == 9:  # in the second iteration
                    os.kill(os.getpid(), signal.SIGTERM)
                yield sample

        run.batches.train = train
    fit(run)
    return run.is_stopped_by_signal, [process.poll() for process in started]


@pytest.mark.parametrize("by_signal", [False, True])
def test_the_end_of_a_run_waits_for_exports_unless_a_signal_ended_it(by_signal, data, tmp_path):
    flags = {"iters": 3 if by_signal else 1, "save": tmp_path / "run", "save_interval": 1, "export_hf_interval": 1}
    argv = command_line(data, **flags, exit_signal_handler=True)
    was_stopped, ended = run_ranks(1, _stopped, argv, by_signal)[0]
    assert was_stopped is by_signal
    if by_signal:
        assert ended[0] == -signal.SIGTERM and len(ended) == 1  # the rest was not begun
    else:
        assert ended == [0]
