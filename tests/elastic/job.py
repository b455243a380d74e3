"""A job of real agents on this machine, for tests and measurements: a store, agents that come and go, what they say."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
TOOL = [sys.executable, str(ROOT / "tools/elastic.py")]


class ElasticJob:
    """A store, and agents that are added to it."""

    def __init__(self, folder: Path, nodes: str, flags: list[str], *options: str):
        self.folder, self.port = folder, free_port()
        self.command = [*TOOL, "agent", "--endpoint", f"127.0.0.1:{self.port}", "--run-id", "job", "--nodes", nodes]
        self.command += ["--local-address", "127.0.0.1", *options, "--", *flags]
        self.environment = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
        self.environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}
        self.agents: list[subprocess.Popen] = []
        store = [*TOOL, "store", "--port", str(self.port), "--idle-minutes", "1"]
        self.store = subprocess.Popen(store, env=self.environment)

    def add(self) -> subprocess.Popen:
        with open(self.folder / f"agent{len(self.agents)}.log", "wb") as log:
            agent = subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=log)
        self.agents.append(agent)
        return agent

    def text(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("agent*.log")))

    def newest_iteration(self) -> int:
        return max(map(int, re.findall(r"iteration +(\d+)/", self.text())), default=0)

    def until(self, holds, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, self.text()[-5000:]
            time.sleep(0.1)

    def ranks_of(self, agent: subprocess.Popen) -> list[psutil.Process]:
        servers = psutil.Process(agent.pid).children()
        return [
            rank for server in servers if "worker_server" in " ".join(server.cmdline()) for rank in server.children()
        ]

    def close(self) -> None:
        for process in (*self.agents, self.store):
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
