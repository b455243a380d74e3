"""The command line of tools/elastic.py.

main(["agent", "--nodes", "2:8", "--endpoint", "node0:29400", "--run-id", "7b", "--", *flags_of_pretrain_gpt])
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron.config.errors import ConfigError
from megatron.elastic.agent import AgentOptions, run_agent

DEFAULT_PORT = 29400


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="elastic.py", description="Train with the machines that are there: one agent on each, one store for all."
    )
    commands = p.add_subparsers(dest="command", required=True)
    store = commands.add_parser("store", help="the place where agents meet; on a machine that stays")
    store.add_argument("--port", type=int, default=DEFAULT_PORT)
    store.add_argument("--idle-minutes", type=float, default=10.0, help="ends so long after the last agent (10)")
    agent = commands.add_parser("agent", help="one machine of the job; then --, and the flags of pretrain_gpt.py")
    agent.add_argument("--endpoint", type=_endpoint, required=True, metavar="HOST:PORT", help="of the store")
    agent.add_argument("--run-id", required=True, help="the job's name, the same on all machines")
    agent.add_argument("--nodes", type=_nodes, default=(1, 1), metavar="MIN:MAX", help="agents that make a job (1:1)")
    agent.add_argument("--nproc-per-node", type=int, default=1, help="ranks of this machine (1)")
    agent.add_argument("--topologies", metavar="JSON", help='for some world sizes: {"3": {"tp": 1, "micro_batch": 4}}')
    agent.add_argument(
        "--grace", type=int, default=30, metavar="SECONDS", help="for a last save when asked to end (30)"
    )
    agent.add_argument("--max-failures", type=int, default=10, help="starts that fail without a new checkpoint (10)")
    agent.add_argument("--last-call", type=int, default=5, metavar="SECONDS", help="wait for more agents (5)")
    agent.add_argument("--with-store", action="store_true", help="start the store here, if there is none yet")
    agent.add_argument("--local-address", help="by which other machines reach this one; default: its name")
    agent.add_argument(
        "--preload",
        action=argparse.BooleanOptionalAction,
        help="fork ranks from a process that has imported everything; default: where there is no GPU",
    )
    agent.add_argument("flags", nargs=argparse.REMAINDER, help="of pretrain_gpt.py, after --")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    given = parser().parse_args(argv)
    if given.command == "store":
        return _store(given.port, given.idle_minutes * 60)
    options = AgentOptions(
        endpoint=given.endpoint,
        run_id=given.run_id,
        min_nodes=given.nodes[0],
        max_nodes=given.nodes[1],
        nproc_per_node=given.nproc_per_node,
        topologies=given.topologies,
        grace=given.grace,
        max_failures=given.max_failures,
        last_call=given.last_call,
        preload=given.preload,
        with_store=given.with_store,
        local_address=given.local_address,
    )
    try:
        return run_agent(options, given.flags[1:] if given.flags[:1] == ["--"] else given.flags)
    except (ConfigError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _store(port: int, idle_seconds: float) -> int:
    from megatron.elastic.store import StoreError, host

    try:
        host(port, idle_seconds)
    except StoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _endpoint(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no HOST:PORT")
    return host, int(port)


def _nodes(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not (low.isdecimal() and (high or low).isdecimal()) or not 1 <= int(low) <= int(high or low):
        raise argparse.ArgumentTypeError(f"{text!r} is no MIN:MAX")
    return int(low), int(high or low)


if __name__ == "__main__":
    sys.exit(main())
