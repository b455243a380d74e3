"""How far a long command has come.

line = ProgressLine()
convert(folder, output, progress=line)
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm


class ProgressLine:
    """Bytes, rate and time left: tqdm's bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._bar: tqdm | None = None
        self._started = self._shown = time.monotonic()

    def __call__(self, done: int, total_bytes: int) -> None:
        """Called by one thread at a time."""
        if not self._stream.isatty():
            self._print(done, total_bytes)
            return
        if self._bar is None:
            self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, unit_divisor=1024, file=self._stream)
        self._bar.update(done - self._bar.n)
        if done >= total_bytes:
            self._bar.close()

    def _print(self, done: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now - self._shown < 10:
            return
        self._shown = now
        rate = done / max(now - self._started, 1e-9)
        left = (total_bytes - done) / max(rate, 1)
        text = f"{done / 2**20:.0f} / {total_bytes / 2**20:.0f} MiB, {rate / 2**20:.0f} MiB/s, {left:.0f} s left"
        print(text, file=self._stream, flush=True)
