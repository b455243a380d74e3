"""--async-save writes what a save writes that training waits for, and whatever happens, no checkpoint is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import OrderedDict
from pathlib import Path

import pytest

from harness.ranks import RankFailure, run_ranks
from matrix.families import MODELS
from matrix.recording import build, command_line
from megatron.ucp.verify import verify

SLOW = 1e-4
"""Share of a processor with which a save of a tiny model takes until it is told to hurry."""


def _argv(
    data: Path, save: Path, *extra: str, iters: int = 6, interval: int = 2, offloads: bool = False, **flags
) -> list[str]:
    if offloads:
        flags["deepspeed_config"] = save.parent / "offload.json"
        flags["deepspeed_config"].write_text('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}')
    return [*command_line(data, iters=iters, save=save, save_interval=interval, **flags), *extra]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _fit(rank: int, world_size: int, argv: list[str], plant=None) -> tuple[list, int]:
    """(what the log was told of saves, iteration reached)."""
    from megatron.training.loop import fit

    run = build(argv, rank, world_size)
    if plant is not None:
        plant(run, rank)
    fit(run)
    return run.run_log.saves, run.progress.iteration


CELLS = {
    "zero1": {"zero": 1},
    "zero3": {"zero": 3},
    "pp2": {"pp": 2},
    "zero0": {"zero": 0},
    "muon": {"zero": 2, "optimizer": "muon"},
    "offload": {"zero": 3, "offloads": True},
    "bf16": {"zero": 2, "bf16": True},
    "experts": {**MODELS["moe"], "moe_expert_parallel_size": 2},
    "frozen": {"zero": 1, "freeze_parameters": "layers.0.*"},
}


@pytest.mark.parametrize("cell", CELLS)
def test_same_bytes_as_a_save_that_training_waits_for(cell: str, data, tmp_path):
    """Training goes on changing every value while they are copied and written."""
    _, reached = run_ranks(2, _fit, _argv(data, tmp_path / "waits", **CELLS[cell]))[0]
    saves, _ = run_ranks(2, _fit, _argv(data, tmp_path / "behind", "--async-save", **CELLS[cell]), _copies_late)[0]
    assert reached == 6
    assert saves == [(i, stage) for i in (2, 4, 6) for stage in ("staged", "written", "durable")]
    assert _files(tmp_path / "behind") == _files(tmp_path / "waits")


def _slow(run, rank: int) -> None:
    """So that steps are taken before it is written."""
    from megatron.checkpoint import background

    background._SHARE_OF_A_PROCESSOR = SLOW


def _copies_late(run, rank: int) -> None:
    """All of the state, however small, and not before the optimizer waits for it."""
    from megatron.checkpoint import staging_memory
    from megatron.checkpoint.background import BackgroundSaves

    _slow(run, rank)
    staging_memory._LEFT_FOR_LATER = 0
    copy_all, finish_copy = staging_memory._copy_all, BackgroundSaves._finish_copy
    is_waited_for = threading.Event()

    def copy_when_waited_for(pairs):
        assert is_waited_for.wait(60) and pairs
        is_waited_for.clear()
        copy_all(pairs)

    def wait_for(saves):
        if saves._in_flight is not None and saves._in_flight.copying is not None:
            is_waited_for.set()
        finish_copy(saves)

    staging_memory._copy_all, BackgroundSaves._finish_copy = copy_when_waited_for, wait_for


def test_an_optimizer_that_does_not_tell_of_its_steps(data, tmp_path):
    """The state has changed before it was copied: that save fails, the later ones copy at once."""
    run_ranks(2, _fit, _argv(data, tmp_path / "waits", zero=1))
    saves, _ = run_ranks(2, _fit, _argv(data, tmp_path / "behind", "--async-save", zero=1), _is_silent)[0]
    assert [stage for i, stage in saves if i == 2] == ["staged", "failed"]
    assert [i for i, stage in saves if stage == "durable"] == [4, 6]
    behind, waits = _files(tmp_path / "behind"), _files(tmp_path / "waits")
    assert behind == {name: content for name, content in waits.items() if not name.startswith("global_step2")}


def _is_silent(run, rank: int) -> None:
    from torch.utils.hooks import RemovableHandle

    from megatron.engine.engine_state import EngineState

    _copies_late(run, rank)
    EngineState.before_next_step = lambda state, call: RemovableHandle(OrderedDict())


def test_a_state_that_was_not_copied_is_not_the_same(data, tmp_path):
    """The control: what the test above compares does depend on the copy."""
    run_ranks(2, _fit, _argv(data, tmp_path / "waits", zero=1))
    run_ranks(2, _fit, _argv(data, tmp_path / "behind", "--async-save", zero=1), _copies_once)
    behind, waits = _files(tmp_path / "behind"), _files(tmp_path / "waits")
    assert {name for name in waits if behind[name] != waits[name] and name.startswith("global_step4")}


def _copies_once(run, rank: int) -> None:
    from megatron.checkpoint.staging_memory import StagingMemory

    begin_copy, kept = StagingMemory.begin_copy, []

    def once(memory, tensors, unchanging):
        if not kept:
            kept.append(begin_copy(memory, tensors, unchanging))
        return kept[0]

    StagingMemory.begin_copy = once


def test_the_worker_is_killed(data, tmp_path):
    """Training goes on, the save is told to have failed, and the next one succeeds with another process."""
    saves, reached = run_ranks(2, _fit, _argv(data, tmp_path, "--async-save", zero=1), _kills_first_worker)[0]
    assert reached == 6
    assert [stage for i, stage in saves if i == 2] == ["staged", "failed"]
    assert [i for i, stage in saves if stage == "durable"] == [4, 6]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["global_step4", "global_step6"]
    assert (tmp_path / "latest").read_text() == "global_step6"
    assert verify(tmp_path / "global_step6").findings == ()


def _kills_first_worker(run, rank: int) -> None:
    from megatron.ucp.save_worker import SaveWorker

    _slow(run, rank)
    send, killed = SaveWorker.send, []

    def send_and_kill(worker, order):
        send(worker, order)
        if rank == 1 and not killed:
            killed.append(os.kill(worker.pid, signal.SIGKILL))

    SaveWorker.send = send_and_kill


def test_the_worker_is_killed_while_it_has_nothing_to_do(data, tmp_path):
    saves, _ = run_ranks(2, _fit, _argv(data, tmp_path, "--async-save", zero=1), _kills_idle_worker)[0]
    assert [i for i, stage in saves if stage == "durable"] == [2, 4, 6]


def _kills_idle_worker(run, rank: int) -> None:
    from megatron.checkpoint.background import BackgroundSaves

    begin = BackgroundSaves.begin

    def kill_and_begin(saves, folder, progress):
        if rank == 1 and progress.iteration == 4:
            os.kill(saves._worker.pid, signal.SIGKILL)
            saves._worker._process.wait()
        return begin(saves, folder, progress)

    BackgroundSaves.begin = kill_and_begin


def test_an_order_that_only_some_ranks_could_give(data, tmp_path):
    """The others' workers are at it already: what they answer must not be taken for an answer to the next order."""
    run_ranks(2, _fit, _argv(data, tmp_path / "waits", zero=1))
    saves, _ = run_ranks(2, _fit, _argv(data, tmp_path / "behind", "--async-save", zero=1), _cannot_send_once)[0]
    assert [i for i, stage in saves if stage == "durable"] == [4, 6]
    behind, waits = _files(tmp_path / "behind"), _files(tmp_path / "waits")
    assert behind == {name: content for name, content in waits.items() if not name.startswith("global_step2")}


def _cannot_send_once(run, rank: int) -> None:
    from megatron.ucp.save_worker import SaveWorker, SaveWorkerError

    _slow(run, rank)
    send, failed = SaveWorker.send, []

    def send_or_fail(worker, order):
        if rank == 1 and not failed:
            failed.append(True)
            raise SaveWorkerError("planted")
        send(worker, order)

    SaveWorker.send = send_or_fail


def test_a_failure_stops_the_run_if_asked(data, tmp_path):
    argv = _argv(data, tmp_path, "--async-save", "--exit-on-save-failure", zero=1)
    with pytest.raises(
        RankFailure, match=r"(?s)CheckpointError: saving .*global_step2 failed on 1 of 2 ranks.*signal 9"
    ):
        run_ranks(2, _fit, argv, _kills_first_worker)
    assert not (tmp_path / "latest").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_is_killed_while_its_save_is_written(victim: int, data, tmp_path):
    """Its worker ends by itself and nothing is committed; the same command goes on from the checkpoint before."""
    argv = _argv(data, tmp_path, "--async-save", zero=1)
    with pytest.raises(RankFailure, match=f"rank {victim} died: exit code -9"):
        run_ranks(2, _fit_until_killed, argv, victim, str(tmp_path / "pids"))
    assert (tmp_path / "latest").read_text() == "global_step2"
    workers = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(workers) == 2
    until = time.monotonic() + 20
    while (left := [pid for pid in workers if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left
    assert (tmp_path / "global_step4.tmp").is_dir() and not (tmp_path / "global_step4").exists()
    saves, reached = run_ranks(2, _fit, [*argv, "--load", str(tmp_path)])[0]
    assert reached == 6 and [i for i, stage in saves if stage == "durable"] == [4, 6]
    assert not list(tmp_path.glob("*.tmp"))


def _fit_until_killed(rank: int, world_size: int, argv: list[str], victim: int, pids: str) -> None:
    from megatron.ucp.save_worker import SaveWorker

    start = SaveWorker.start

    def recorded(handle):
        worker = start(handle)
        with open(pids, "a") as file:
            file.write(f"{worker.pid}\n")
        return worker

    SaveWorker.start = recorded

    def plant(run, rank):
        from megatron.training.saves import Saves

        after_step = Saves.after_step

        def after(saves, *, is_last):
            if run.progress.iteration == 3:
                saves.finish_last()  # the first is durable
                _slow(run, rank)
            after_step(saves, is_last=is_last)
            if run.progress.iteration == 5 and rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)

        Saves.after_step = after

    _fit(rank, world_size, argv, plant)


ROOM = {
    "cap": (["--async-save-max-gib", "1e-6"], None, "a copy of a rank's state takes"),
    "host": ([], 1000, "copies of its ranks' states take"),
}


@pytest.mark.parametrize("case", ROOM)
def test_without_room_training_waits(case: str, data, tmp_path):
    flags, available, reason = ROOM[case]
    argv = _argv(data, tmp_path, "--async-save", *flags, zero=1)
    told = run_ranks(2, _fit_and_log, argv, available)[0]
    assert f"saves are written while training waits: {reason}" in told
    assert sorted(p.name for p in tmp_path.glob("global_step*")) == ["global_step2", "global_step4", "global_step6"]
    assert verify(tmp_path / "global_step6").findings == ()


def _fit_and_log(rank: int, world_size: int, argv: list[str], available: int | None) -> str:
    import io
    import logging

    from megatron.checkpoint import background

    if available is not None:
        background.available_bytes = lambda: available
    heard = logging.StreamHandler(io.StringIO())
    logging.getLogger("megatron").addHandler(heard)
    logging.getLogger("megatron").setLevel(logging.INFO)
    _fit(rank, world_size, argv)
    return heard.stream.getvalue()


def test_one_in_flight(data, tmp_path):
    """A save that is due while the one before is written waits for it; each is what it is without --async-save."""
    run_ranks(2, _fit, _argv(data, tmp_path / "waits", zero=1, interval=1, iters=3))
    argv = _argv(data, tmp_path / "behind", "--async-save", zero=1, interval=1, iters=3)
    saves, _ = run_ranks(2, _fit, argv, _slow)[0]
    assert saves == [(i, stage) for i in (1, 2, 3) for stage in ("staged", "written", "durable")]
    assert _files(tmp_path / "behind") == _files(tmp_path / "waits")


def test_copies_that_drifted_apart_stop_the_run_and_are_not_committed(data, tmp_path):
    """One element of a layer norm differs between tensor-parallel ranks; both are written before anybody can know."""
    argv = _argv(data, tmp_path, "--async-save", tp=2, zero=1, iters=4, interval=4)
    with pytest.raises(RankFailure, match=r"(?s)DivergedCopiesError.*layers\.0\.input_norm\.weight"):
        run_ranks(2, _fit, argv, _drifts)
    assert not (tmp_path / "latest").exists() and not (tmp_path / "global_step4").exists()


def _drifts(run, rank: int) -> None:
    from megatron.training.saves import Saves

    after_step = Saves.after_step

    def after(saves, *, is_last):
        for interval in run.live.state.intervals:
            if interval.name == "layers.0.input_norm.weight" and is_last and rank == 1:
                interval.master[0] += 1.0
        after_step(saves, is_last=is_last)

    Saves.after_step = after


def test_a_save_in_flight_survives_a_loss_that_is_not_finite(data, tmp_path):
    """The state that was staged is whole; only what came after is not."""
    argv = _argv(data, tmp_path, "--async-save", zero=1)
    with pytest.raises(RankFailure, match="NonFiniteLossError"):
        run_ranks(2, _fit, argv, _loses_its_mind)
    assert (tmp_path / "latest").read_text() == "global_step2"
    assert verify(tmp_path / "global_step2").findings == ()


def _loses_its_mind(run, rank: int) -> None:
    import math

    from megatron.training import loop

    _slow(run, rank)
    step = loop.train_step
    loop.train_step = lambda *args: math.nan if run.progress.iteration == 2 else step(*args)


def test_a_folder_that_cannot_be_written(data, tmp_path):
    """Told at the save; training goes on, and the last save, for which there is no next time, is an error."""
    with pytest.raises(RankFailure, match="CheckpointError: .*no room for global_step4"):
        run_ranks(2, _fit, _argv(data, tmp_path, "--async-save", zero=1, iters=4), _full_disk)
    assert not (tmp_path / "latest").exists()


def _full_disk(run, rank: int) -> None:
    import errno

    from megatron.ucp import commit

    def fail(final, **kwargs):
        raise OSError(errno.ENOSPC, f"no room for {final.name}")

    commit.stage = fail
