"""The processes between torch's agent and a rank: what they pass on, and that none outlives another."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
PROXY = ROOT / "megatron/elastic/proxy.py"
SERVER = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from megatron.elastic import worker_server
def work(job):
    exec(os.environ["DO"])
    return int(os.environ.get("CODE", "0"))
worker_server.work = work
worker_server.main(sys.argv[1:])
"""


class Job:
    """A stand-in for an agent, its worker server, and proxies as an agent starts them."""

    def __init__(self, folder: Path, max_failures: int = 10, grace: int = 4):
        self.folder, self.path = folder, str(folder / "socket")
        told = json.dumps({"argv": [], "store": ["h", 1], "topologies": None})
        options = ["--job", told, "--save", str(folder), "--max-failures", str(max_failures), "--grace", str(grace)]
        agent = (
            "import os, subprocess, sys, time\n"
            "server = [sys.executable, '-c', *sys.argv[1:], '--agent', str(os.getpid())]\n"
            "print(subprocess.Popen(server).pid, flush=True)\n"
            "time.sleep(600)"
        )
        command = [sys.executable, "-c", agent, SERVER, self.path, *options]
        with open(folder / "errors", "ab") as errors:
            self.agent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        self.server = psutil.Process(int(self.agent.stdout.readline()))
        self.proxies: list[subprocess.Popen] = []
        until(lambda: os.path.exists(self.path))

    def rank(self, do: str, code: int = 0, **environment: str) -> subprocess.Popen:
        environment = {"PATH": os.environ["PATH"], "DO": do, "CODE": str(code), "MASTER_PORT": "1", **environment}
        command = [sys.executable, "-IS", str(PROXY), self.path]
        proxy = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.proxies.append(proxy)
        return proxy

    def ranks(self) -> list[psutil.Process]:
        return self.server.children()

    def errors(self) -> str:
        return (self.folder / "errors").read_text()

    def close(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for rank in self.ranks():
                rank.kill()
            self.server.kill()
        for process in (self.agent, *self.proxies):
            process.kill()
        for process in (self.agent, *self.proxies):
            process.communicate()


def until(holds, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def job(tmp_path):
    """Of which something is killed."""
    started = Job(tmp_path)
    yield started
    started.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    started = Job(tmp_path_factory.mktemp("shared"))
    yield started
    started.close()


@pytest.mark.parametrize("code", [0, 2, 75, 255])
def test_a_rank_ends_as_it_ends(code, shared):
    proxy = shared.rank("print('said', os.environ['X']); print('complained', file=sys.stderr)", code, X="é 1")
    output, errors = proxy.communicate(timeout=60)
    assert (proxy.returncode, output, errors) == (code, "said é 1\n", "complained\n")
    until(lambda: not shared.ranks())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_a_signal_that_ended_it_is_told(number, shared):
    proxy = shared.rank(f"os.kill(os.getpid(), {int(number)}); time.sleep(60)")
    proxy.communicate(timeout=60)
    assert proxy.returncode == -number


def test_an_error_is_its_traceback_and_exit_code_1(shared):
    proxy = shared.rank("raise ValueError('of my own')")
    assert "ValueError: of my own" in proxy.communicate(timeout=60)[1] and proxy.returncode == 1
    proxy = shared.rank("sys.exit(7)")
    assert not proxy.communicate(timeout=60)[1] and proxy.returncode == 7


def test_several_ranks_at_once_each_with_its_own(shared):
    proxies = [shared.rank("print(os.environ['LOCAL_RANK']); time.sleep(0.2)", n, LOCAL_RANK=str(n)) for n in range(5)]
    assert [(p.communicate(timeout=60)[0], p.returncode) for p in proxies] == [(f"{n}\n", n) for n in range(5)]


SAVES = """
def save(number, frame):
    time.sleep(1.5); print('saved', flush=True); os._exit(75)
signal.signal(signal.SIGTERM, save); print('ready', flush=True); time.sleep(60)
"""


def test_a_signal_reaches_the_rank(shared):
    proxy = shared.rank(SAVES)
    assert proxy.stdout.readline() == "ready\n"
    proxy.send_signal(signal.SIGTERM)
    assert proxy.communicate(timeout=60)[0] == "saved\n" and proxy.returncode == 75


def test_a_rank_that_was_asked_to_end_finishes_its_save_and_the_next_waits(shared):
    """torch's agent kills what has not ended 30 s after it was asked to; a save may take longer."""
    proxy = shared.rank(SAVES)
    assert proxy.stdout.readline() == "ready\n"
    proxy.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    proxy.kill()
    [rank] = shared.ranks()
    following = shared.rank("print('began', time.time())")
    other = shared.rank("print('began')", LOCAL_RANK="1")
    assert other.communicate(timeout=60)[0] == "began\n" and rank.is_running(), "one in another place does not wait"
    assert following.communicate(timeout=60)[0].startswith("began")
    assert proxy.stdout.read() == "saved\n" and not rank.is_running()


def test_a_rank_that_stands_still_is_ended_for_the_next_one(shared):
    proxy = shared.rank(SAVES)
    assert proxy.stdout.readline() == "ready\n"
    [rank] = shared.ranks()
    rank.suspend()
    proxy.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    proxy.kill()
    assert shared.rank("print('began')").communicate(timeout=60)[0] == "began\n"
    assert not rank.is_running()


def test_one_that_waits_for_its_place_can_be_asked_to_end_too(shared):
    proxy = shared.rank(SAVES)
    assert proxy.stdout.readline() == "ready\n"
    following = shared.rank("print('began')")
    time.sleep(0.3)
    following.send_signal(signal.SIGTERM)
    assert following.communicate(timeout=60)[0] == "" and following.returncode == -signal.SIGTERM
    assert len(shared.ranks()) == 1
    proxy.send_signal(signal.SIGTERM)
    assert proxy.communicate(timeout=60)[0] == "saved\n"


def test_a_rank_whose_proxy_was_killed_is_ended_at_once(tmp_path):
    """It was not asked to save, so there is nothing to wait for."""
    job = Job(tmp_path, grace=600)
    try:
        proxy = job.rank("print('ready', flush=True); time.sleep(600)")
        assert proxy.stdout.readline() == "ready\n"
        [rank] = job.ranks()
        proxy.kill()
        until(lambda: not rank.is_running())
    finally:
        job.close()


@pytest.mark.parametrize("victim", ["agent", "server"])
def test_none_outlives_its_agent(victim, job):
    proxy = job.rank("signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)")
    assert proxy.stdout.readline() == "ready\n"
    [rank] = job.ranks()
    (job.agent if victim == "agent" else job.server).kill()
    until(lambda: not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE)
    until(lambda: not job.server.is_running() or job.server.status() == psutil.STATUS_ZOMBIE)
    assert "worker server of this agent is gone" in proxy.communicate(timeout=60)[1] and proxy.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_all_processes_leaves_the_rank_its_last_save(number, job):
    """As a scheduler sends it: the server has to outlive its ranks' saves, which end by themselves."""
    proxy = job.rank(SAVES.replace("SIGTERM", signal.Signals(number).name))
    assert proxy.stdout.readline() == "ready\n"
    for process in (job.server, *job.ranks()):
        process.send_signal(number)
    assert proxy.communicate(timeout=60)[0] == "saved\n" and proxy.returncode == 75


def fails(job: Job, attempt: int, do: str = "", code: int = 2) -> int:
    proxy = job.rank(do, code, MASTER_PORT=str(attempt))
    proxy.communicate(timeout=60)
    return proxy.returncode


def test_what_fails_over_and_over_ends_the_agent(tmp_path):
    job = Job(tmp_path, max_failures=3)
    try:
        assert [fails(job, attempt) for attempt in range(3)] == [2, 2, 2]
        assert job.agent.poll() is None
        assert fails(job, 3) == 1
        assert job.agent.wait(60) == -signal.SIGTERM
        assert "3 starts ended in failure without a new checkpoint (none in" in job.errors()
    finally:
        job.close()


def test_failures_with_progress_ranks_that_fail_together_and_last_saves_do_not(tmp_path):
    job = Job(tmp_path, max_failures=3)
    try:
        for attempt in range(6):
            (tmp_path / f"global_step{attempt}").mkdir()
            (tmp_path / "latest").write_text(f"global_step{attempt}")
            assert fails(job, attempt) == 2
        assert [fails(job, 10) for _ in range(4)] == [2] * 4, "the ranks of one start are one failure"
        assert [fails(job, 20 + n, code=75) for n in range(4)] == [75] * 4
        assert [fails(job, 30 + n, code=0) for n in range(4)] == [0] * 4
        assert job.agent.poll() is None
    finally:
        job.close()


@pytest.mark.parametrize("content", [b"", b"\n", b"{}\n", b"[" * 100_000 + b"\n", b"\xff\n", b"x" * (1 << 23)])
def test_what_is_no_request_is_dropped(content, shared):
    with socket.socket(socket.AF_UNIX) as stranger, contextlib.suppress(OSError):
        stranger.connect(shared.path)
        stranger.sendall(content)
    assert shared.rank("print('fine')").communicate(timeout=60)[0] == "fine\n"


def test_handles_are_not_kept(shared):
    for _ in range(20):
        shared.rank("pass").communicate(timeout=60)
    before = shared.server.num_fds()
    for _ in range(20):
        shared.rank("pass").communicate(timeout=60)
    assert shared.server.num_fds() == before
    proxy = shared.rank("print(sorted(os.listdir('/proc/self/fd'), key=int))")
    mine = proxy.communicate(timeout=60)[0]
    assert len(json.loads(mine.replace("'", '"'))) <= 6, f"a rank holds what is not its own: {mine}"
