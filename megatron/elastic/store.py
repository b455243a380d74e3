"""The store at which the agents of a job meet, in a process of its own.

Inside an agent it would end with that agent and take all others along. It ends by itself once no agent has shown itself
for a while.

    host(29400, idle_seconds=600)           # returns when everybody is gone
    store = connect("host", 29400)          # an agent's, or a worker's
    beats(store)                            # from now on this process shows itself
"""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta

from torch.distributed import TCPStore

BEATS_EVERY = 5.0
"""Seconds."""
_BEATS = "megatron/agents"
_ENDED = "megatron/ended"


class StoreError(RuntimeError):
    """No store where one is to be, or a port that is taken."""


def host(port: int, idle_seconds: float) -> None:
    """Returns when no agent has shown itself for so long, the first one included. Raises StoreError."""
    try:
        with socket.create_server(("", port)):  # asked first: the store's own refusal is a page of addresses
            pass
        store = TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    except (OSError, RuntimeError) as error:
        raise StoreError(f"no store can be opened at port {port}: {error}. What to do: use another port") from error
    seen, since = -1, time.monotonic()
    while time.monotonic() - since < idle_seconds:
        time.sleep(min(1.0, idle_seconds / 10))
        if (beats := store.add(_BEATS, 0)) != seen:
            seen, since = beats, time.monotonic()


def connect(host: str, port: int, seconds: float = 60.0) -> TCPStore:
    """Waits so long for it. Raises StoreError."""
    until = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, port), timeout=seconds):
                pass
            return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds))
        except (OSError, RuntimeError) as error:
            if time.monotonic() > until:
                raise StoreError(
                    f"no store answers at {host}:{port} after {seconds:g} s: {error}. What to do: start one there "
                    f"(tools/elastic.py store --port {port}), or give an agent on that machine --with-store"
                ) from error
        time.sleep(0.2)


def beats(store: TCPStore) -> None:
    """From a thread, until the process or the store ends."""

    def beat() -> None:
        while True:
            try:
                store.add(_BEATS, 1)
            except RuntimeError:
                return
            time.sleep(BEATS_EVERY)

    threading.Thread(target=beat, name="elastic-beat", daemon=True).start()


def tell_end(store: TCPStore, meeting: str) -> None:
    """That the job has come to its end, to those who stand by."""
    store.set(f"{_ENDED}/{meeting}", "1")


def has_ended(store: TCPStore, meeting: str) -> bool:
    return bool(store.check([f"{_ENDED}/{meeting}"]))
