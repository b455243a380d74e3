"""Real agents, store and ranks: machines die and come, and the curve is the one of a run that never stopped."""

import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from elastic.job import TOOL, ElasticJob, free_port

from harness.ranks import run_ranks
from matrix.recording import command_line, train
from megatron.config.errors import ConfigError
from megatron.elastic.agent import AgentOptions, training_flags
from megatron.elastic.cli import parser
from tb_analysis.event_files import read_curve

LOSS = "lm-loss-training/lm loss"


@pytest.fixture
def jobs(tmp_path):
    started: list[ElasticJob] = []

    def start(nodes: str, flags: list[str], *options: str) -> ElasticJob:
        started.append(ElasticJob(tmp_path, nodes, flags, *options))
        return started[-1]

    yield start
    for job in started:
        job.close()


def _flags(data: Path, folder: Path, **flags) -> list[str]:
    """tp2 dp2 of four ranks, dp3 of three."""
    options = {"save": folder / "save", "save_interval": 20, "log_interval": 1, "tensorboard_dir": folder / "events"}
    options |= {"global_batch_size": 12, "lr": 1e-3, "min_lr": 1e-4, "lr_decay_iters": 400, "iters": 100_000, "zero": 1}
    return command_line(data, **{**options, "tp": 2, "micro_batch": 2, **flags})


def test_a_machine_dies_a_rank_dies_a_machine_comes(jobs, data, tmp_path):
    job = jobs("1:4", _flags(data, tmp_path))
    for _ in range(4):
        job.add()
    job.until(lambda: job.newest_iteration() >= 45)

    lost = job.agents[3]
    doomed = [*job.ranks_of(lost), *psutil.Process(lost.pid).children()]
    lost.kill()  # with it everything that it has started
    job.until(lambda: "elastic: 3 rank(s) as tp1 pp1 dp3" in job.text())
    assert not [process for process in doomed if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    at = job.newest_iteration()
    job.until(lambda: job.newest_iteration() >= at + 25)

    [rank] = job.ranks_of(job.agents[1])
    rank.kill()
    job.until(lambda: job.text().count("elastic: 3 rank(s) as tp1 pp1 dp3") == 2)
    at = job.newest_iteration()
    job.until(lambda: job.newest_iteration() >= at + 10)

    job.add()
    job.until(lambda: job.text().count("elastic: 4 rank(s) as tp2 pp1 dp2") == 2)
    # Growing loses nothing: all ranks end at one iteration, with a save, from which the larger job goes on.
    [stopped] = set(re.findall(r"stopping at iteration (\d+): SIGTERM", job.text()))
    job.until(lambda: job.newest_iteration() >= int(stopped) + 15)
    for agent in job.agents:
        agent.send_signal(signal.SIGTERM)
    ended = 128 + signal.SIGTERM
    assert [agent.wait(60) for agent in job.agents] == [ended, ended, ended, -signal.SIGKILL, ended], job.text()[-5000:]
    assert f"(iteration {stopped}, saved as tp1 pp1 dp3 ZeRO-1) as tp2 pp1 dp2" in job.text()
    assert job.text().count("equals the one at save") == 3 and "is not what was saved" not in job.text()
    last = int((tmp_path / "save/latest").read_text().removeprefix("global_step"))
    assert f"stopping at iteration {last}: SIGTERM" in job.text()

    # One curve: every iteration once, with the losses of one rank that never stopped.
    curve = read_curve(tmp_path / "events", LOSS)
    assert curve.steps.tolist() == list(range(1, last + 1))
    plain = _flags(
        data, tmp_path / "plain", tp=1, save=None, save_interval=None, tensorboard_dir=None, exit_interval=last
    )
    [whole] = run_ranks(1, train, plain, timeout=240)
    assert curve.values.tolist() == pytest.approx(list(whole.losses.values()), abs=5e-6)
    samples = read_curve(tmp_path / "events", f"{LOSS} vs samples")
    assert samples.steps.tolist() == list(range(12, 12 * last + 1, 12))


def test_a_rank_for_which_there_is_no_place_stands_by(jobs, data, tmp_path):
    """A batch of eight has no thirds. The spare rank ends with the job, and takes over where one is lost."""
    job = jobs("1:3", _flags(data, tmp_path, tp=1, global_batch_size=8, micro_batch=1, iters=150))
    for _ in range(3):
        job.add()
    job.until(lambda: job.newest_iteration() >= 25)
    assert "elastic: 2 rank(s) as tp1 pp1 dp2, 1 of 3 standing by" in job.text()
    counts = {agent: len(job.ranks_of(agent)) for agent in job.agents}
    assert set(counts.values()) == {1}, "the spare one is there"
    busiest = max(job.agents, key=lambda agent: sum(job.ranks_of(agent)[0].cpu_times()[:2]))
    busiest.kill()
    job.until(lambda: "elastic: 2 rank(s) as tp1 pp1 dp2;" in job.text())
    assert sorted(agent.wait(240) for agent in job.agents) == [-signal.SIGKILL, 0, 0], job.text()[-5000:]
    assert job.newest_iteration() == 150


def test_a_spare_rank_ends_with_the_job(jobs, data, tmp_path):
    job = jobs("3:3", _flags(data, tmp_path, tp=1, global_batch_size=8, micro_batch=1, iters=5))
    for _ in range(3):
        job.add()
    assert [agent.wait(120) for agent in job.agents] == [0, 0, 0], job.text()[-5000:]
    assert "1 of 3 standing by" in job.text()


def test_what_fails_at_every_start_is_given_up(jobs, data, tmp_path):
    # As long as the run lives: the checkpoint's model is another one's.
    run_ranks(1, _trained_and_saved, command_line(data, save=tmp_path / "save", iters=1))
    job = jobs("1:1", _flags(data, tmp_path, tp=1, num_layers=6), "--max-failures", "2")
    agent = job.add()
    assert agent.wait(120) not in (0, None)
    assert "2 starts ended in failure without a new checkpoint (global_step1 in" in job.text(), job.text()[-3000:]


def _trained_and_saved(rank: int, world_size: int, argv: list[str]) -> None:
    from matrix.recording import build
    from megatron.training.loop import fit

    fit(build(argv, rank, world_size))


def test_an_agent_that_is_asked_to_end_saves_and_the_job_starts_again_from_there(jobs, data, tmp_path):
    job = jobs("1:1", _flags(data, tmp_path, tp=1, save_interval=10_000), "--with-store", "--no-preload")
    agent = job.add()
    job.until(lambda: job.newest_iteration() >= 5)
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(60) == 128 + signal.SIGTERM
    [stopped] = re.findall(r"stopping at iteration (\d+): SIGTERM", job.text())
    assert (tmp_path / "save/latest").read_text() == f"global_step{stopped}"
    job.add()
    job.until(lambda: f"resuming from native checkpoint global_step{stopped}" in job.text())


OPTIONS = AgentOptions(("h", 1), "job", 1, 4)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"save": None, "save_interval": None}, "goes on from its saves"),
        ({"global_batch_size": None}, "must not depend on how many ranks"),
        ({"load": "elsewhere"}, "--load would be loaded anew"),
        ({"finetune": True}, "--finetune would apply anew"),
        ({"load_tag": "global_step1"}, "--load-tag would apply anew"),
        ({"no_load_optim": True}, "--no-load-optim would apply anew"),
        ({"exit_signal_handler": True, "exit_signal": "SIGUSR1"}, "by SIGTERM"),
        ({"num_layers": 0}, "num-layers"),
    ],
)
def test_flags_that_would_be_another_job_at_every_start_are_refused(flags, told, data, tmp_path):
    with pytest.raises(ConfigError, match=told):
        training_flags(_flags(data, tmp_path, **flags), OPTIONS)


def test_what_an_elastic_job_needs_is_added(data, tmp_path):
    added = training_flags(_flags(data, tmp_path), OPTIONS)[len(_flags(data, tmp_path)) :]
    assert list(added) == ["--exit-signal-handler", "--exit-signal-grace", "30", "--load", str(tmp_path / "save")]
    given = _flags(data, tmp_path, load=tmp_path / "x/../save", exit_signal_grace=7, exit_signal_handler=True)
    assert training_flags(given, OPTIONS) == (*given, "--exit-signal-handler")


@pytest.mark.parametrize("nodes", ["0:1", "2:1", "x", "", "1:", ":2"])
def test_what_is_no_number_of_nodes(nodes, capsys):
    if nodes == "1:":
        return
    with pytest.raises(SystemExit):
        parser().parse_args(["agent", "--endpoint", "h:1", "--run-id", "x", "--nodes", nodes])
    assert "is no MIN:MAX" in capsys.readouterr().err


@pytest.mark.parametrize("endpoint", ["h", "h:", ":1", "h:x", "h:0", "h:99999"])
def test_what_is_no_endpoint(endpoint, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["agent", "--run-id", "x", "--endpoint", endpoint])
    assert "is no HOST:PORT" in capsys.readouterr().err


def test_a_store_ends_when_nobody_comes_and_a_port_that_is_taken_is_told(tmp_path):
    port = free_port()
    store = subprocess.Popen([*TOOL, "store", "--port", str(port), "--idle-minutes", "0.1"])
    try:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < deadline and store.poll() is None
            time.sleep(0.1)
        second = subprocess.run([*TOOL, "store", "--port", str(port)], capture_output=True, text=True, timeout=60)
        assert second.returncode == 2 and f"no store can be opened at port {port}" in second.stderr
        assert "frame #" not in second.stderr
        assert store.wait(60) == 0
    finally:
        store.kill()
