"""Who owns a folder: alive, dead, elsewhere, no mark at all."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from megatron.ucp import owner
from megatron.ucp.errors import OwnedByOtherError
from megatron.ucp.owner import claim, claimed, lives, mark_of, release

HOST = socket.gethostname()


@pytest.fixture
def other():
    """Another process, alive."""
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def _briefly(monkeypatch):
    monkeypatch.setattr(owner, "WATCHED_FOR", 0.4)
    monkeypatch.setattr(owner, "RENEWED_EVERY", 0.05)


def write(path, **fields):
    path.write_text(json.dumps(fields))
    return path


def test_claim_and_release(tmp_path):
    mark = claim(tmp_path / "mark")
    assert mark.is_mine and mark.is_here and lives(mark) and mark.pid == os.getpid()
    assert claim(tmp_path / "mark").token != mark.token  # a process may claim again what is its own
    release(mark)  # no longer this one
    assert (tmp_path / "mark").exists()
    release(mark_of(tmp_path / "mark"))
    assert list(tmp_path.iterdir()) == []


def test_a_live_owner_is_respected_and_a_dead_one_is_not(tmp_path, other):
    path = write(tmp_path / "mark", host=HOST, pid=other.pid)
    with pytest.raises(OwnedByOtherError, match=f"pid {other.pid} on {HOST}"):
        claim(path)
    other.kill()
    other.wait()
    assert claim(path).is_mine and [p.name for p in tmp_path.iterdir()] == ["mark"]


def test_a_pid_that_is_used_again_is_another_process(tmp_path, other):
    path = write(tmp_path / "mark", host=HOST, pid=other.pid, started="1")
    assert claim(path).is_mine


@pytest.mark.parametrize("elsewhere", [{"host": "elsewhere"}, {"host": HOST, "place": "another container"}], ids=str)
def test_elsewhere_what_is_renewed_lives_and_what_is_not_is_dead(tmp_path, elsewhere):
    path, ended = write(tmp_path / "mark", pid=1, **elsewhere), threading.Event()

    def renew():
        while not ended.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(OwnedByOtherError, match="pid 1"):
            claim(path)
    finally:
        ended.set()
        thread.join()
    assert claim(path).is_mine


def test_what_is_claimed_is_renewed_until_the_end(tmp_path):
    path = tmp_path / "mark"
    with claimed(path) as mark:
        first = path.stat().st_mtime_ns
        deadline = time.monotonic() + 20
        while path.stat().st_mtime_ns == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime_ns > first and mark_of(path) == mark
    assert not path.exists()


def test_what_is_no_mark_is_never_replaced(tmp_path):
    (tmp_path / "text").write_text("a user's own file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "text")
    os.mkfifo(tmp_path / "fifo")
    for name in ("text", "folder", "link", "fifo"):
        with pytest.raises(OwnedByOtherError, match="is none"):
            claim(tmp_path / name)
    assert (tmp_path / "text").read_text() == "a user's own file" and len(list(tmp_path.iterdir())) == 4


def test_of_many_that_claim_at_once_one_gets_it(tmp_path):
    # Each looks for long at the dead one's mark, so that without the lock several would find it dead at once.
    script = (
        "import sys, time; from megatron.ucp import owner; from megatron.ucp.owner import claim\n"
        "lives = owner.lives\n"
        "owner.lives = lambda mark: (time.sleep(0.3), False)[1] if mark.pid == 2**22 + 1 else lives(mark)\n"
        "sys.stdin.readline()\n"
        "try: claim(sys.argv[1]); print('mine', flush=True)\n"
        "except Exception as error: print(type(error).__name__, flush=True)\n"
        "sys.stdin.read()"
    )
    write(tmp_path / "mark", host=HOST, pid=2**22 + 1)  # a dead one's, which all want to replace
    command = [sys.executable, "-c", script, str(tmp_path / "mark")]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    try:
        for process in started:
            process.stdin.write("go\n")
            process.stdin.flush()
        told = sorted(process.stdout.readline().strip() for process in started)
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert told == ["OwnedByOtherError"] * 5 + ["mine"]
