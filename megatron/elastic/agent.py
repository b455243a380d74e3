"""torch's elastic agent for one machine, with the settings under which a job survives what machines do.

    run_agent(AgentOptions(endpoint=("node0", 29400), run_id="pretrain-7b", min_nodes=2, max_nodes=8), argv)

Each agent watches its own ranks and the store at which agents meet. Where a rank dies, or an agent comes or goes, all
agents meet again and start their ranks anew, which go on from the newest whole checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.config.arguments import parse
from megatron.config.config import Config
from megatron.config.errors import ConfigError, Problem
from megatron.elastic.launch import is_cpu, set_for_agent
from megatron.elastic.policy import fit, read_table

_PROXY = Path(__file__).with_name("proxy.py")
_KEEP_ALIVE = {"keep_alive_interval": 2, "keep_alive_max_attempt": 3}
"""Seconds, and so many missed: less, and an agent on a busy machine is taken for dead."""


@dataclass(frozen=True)
class AgentOptions:
    endpoint: tuple[str, int]
    """Of the store."""
    run_id: str
    min_nodes: int = 1
    max_nodes: int = 1
    nproc_per_node: int = 1
    topologies: str | None = None
    grace: int = 30
    """Seconds that ranks have to save and end when they are asked to."""
    max_failures: int = 10
    """Starts in a row that fail without a new checkpoint."""
    last_call: int = 5
    """Seconds that agents wait for others to come, once there are enough."""
    preload: bool | None = None
    """Whether ranks are forked from a process that has imported everything; None: where there is no GPU."""
    with_store: bool = False
    local_address: str | None = None


def training_flags(argv: Sequence[str], options: AgentOptions) -> tuple[str, ...]:
    """What the ranks are started with: `argv` and what an elastic job needs. Raises ConfigError for flags that would
    be another job at every start, and where nothing fits the largest world."""
    config = parse(argv).config
    if problems := list(_problems(config)):
        raise ConfigError(problems)
    added = ["--exit-signal-handler"]
    if config.run.exit_signal_grace is None:
        added += ["--exit-signal-grace", str(options.grace)]
    if config.checkpoint.load is None:
        added += ["--load", str(config.checkpoint.save)]
    flags = (*argv, *added)
    table = read_table(options.topologies) if options.topologies else None
    fit(parse(flags).config, options.max_nodes * options.nproc_per_node, table)
    return flags


def _problems(config: Config) -> Iterator[Problem]:
    checkpoint, run = config.checkpoint, config.run
    if checkpoint.save is None:
        yield Problem("an elastic job goes on from its saves", flags=("--save",), fix="give --save and --save-interval")
    if run.global_batch_size is None:
        yield Problem(
            "the batch of an elastic job must not depend on how many ranks there are",
            flags=("--global-batch-size",),
            fix="give --global-batch-size, one that many numbers divide (12, 24, 48, 96, ...)",
        )
    if checkpoint.load is not None and checkpoint.save is not None and not _is_one(checkpoint.load, checkpoint.save):
        yield Problem(
            "--load would be loaded anew at every start",
            found=f"--load {checkpoint.load} with --save {checkpoint.save}",
            expected="one folder",
            flags=("--load", "--save"),
            fix="copy the checkpoint that is to be gone on from, and its pointer, into --save",
        )
    for name in ("load_tag", "finetune", "universal_checkpoint", "no_load_optim", "no_load_rng", "no_load_lr_state"):
        if getattr(checkpoint, name):
            flag = "--" + name.replace("_", "-")
            yield Problem(f"{flag} would apply anew at every start", flags=(flag,), fix=f"start without {flag}")
    if run.exit_signal_handler and run.exit_signal != "SIGTERM":
        yield Problem(
            "an agent asks its ranks to end by SIGTERM",
            found=f"--exit-signal {run.exit_signal}",
            flags=("--exit-signal",),
        )


def _is_one(load: str, save: str) -> bool:
    return Path(load).resolve() == Path(save).resolve()


def run_agent(options: AgentOptions, argv: Sequence[str]) -> int:
    """Returns the exit code: 0 when the job has come to its end, 1 where it failed for good, 128 and the signal's
    number after a signal. Raises ConfigError and StoreError."""
    flags = training_flags(argv, options)
    on_cpu = is_cpu()
    set_for_agent(on_cpu)
    preload = on_cpu if options.preload is None else options.preload
    with _worker_server(options, flags, preload) as socket:
        from megatron.elastic.store import beats

        store = _store(options)
        beats(store)
        return _launch(options, socket)


@contextlib.contextmanager
def _worker_server(options: AgentOptions, flags: Sequence[str], preload: bool) -> Iterator[str]:
    """The path of its socket. It ends with this process, and with the block."""
    folder = tempfile.mkdtemp(prefix="megatron-elastic-")
    path = os.path.join(folder, "socket")
    job = {"argv": flags, "store": options.endpoint, "topologies": options.topologies}
    config = parse(flags).config
    save, grace = str(config.checkpoint.save), config.run.exit_signal_grace
    command = [sys.executable, "-m", "megatron.elastic.worker_server", path, "--agent", str(os.getpid())]
    command += ["--job", json.dumps(job), "--save", save, "--max-failures", str(options.max_failures)]
    command += ["--grace", str(grace)]
    process = subprocess.Popen([*command, *(["--preload"] if preload else [])])
    try:
        while not os.path.exists(path):
            if process.poll() is not None:
                raise RuntimeError(f"the worker server ended with exit code {process.returncode}: see above")
            time.sleep(0.02)
        yield path
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _store(options: AgentOptions):
    """A connection to the store, which is started where it is asked for and not there."""
    from megatron.elastic.store import StoreError, connect

    if options.with_store:
        with contextlib.suppress(StoreError):
            return connect(*options.endpoint, seconds=0.0)
        command = [sys.executable, "-m", "megatron.elastic.cli", "store", "--port", str(options.endpoint[1])]
        # Of a session of its own: it is to outlive this agent.
        null = subprocess.DEVNULL  # what it says, too: another agent may be faster
        subprocess.Popen(command, start_new_session=True, stdin=null, stdout=null, stderr=null)
    return connect(*options.endpoint)


def _launch(options: AgentOptions, socket: str) -> int:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousClosedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    host, port = options.endpoint
    waits = {"join_timeout": 86400, "last_call_timeout": options.last_call, "read_timeout": 15}
    config = LaunchConfig(
        min_nodes=options.min_nodes,
        max_nodes=options.max_nodes,
        nproc_per_node=options.nproc_per_node,
        run_id=options.run_id,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{host}:{port}",
        rdzv_configs={"is_host": "0", **_KEEP_ALIVE, **waits},
        # Membership changes are not counted; what fails over and over is ended by the worker server.
        max_restarts=1_000_000,
        local_addr=options.local_address,
        shutdown_timeout=options.grace + 5,
    )
    try:
        elastic_launch(config, sys.executable)("-IS", str(_PROXY), socket)
    except ChildFailedError as error:
        print(f"elastic: the job failed: {error.name}", file=sys.stderr)
        return 1
    except RendezvousClosedError:
        print("elastic: the other agents have ended the job", file=sys.stderr)
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
