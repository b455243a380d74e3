"""What a run's log says of its state: the digest at each save, and the digest of what stood in the engine after a load.

The idea: both numbers are read from different files, the Source's log and the Target's, written by different
processes; equal means that the state that was resumed is the state that was saved.

    digests = read_digests(Path("runs/fig7/7a/logs/source_tp2_pp2_dp2_z1.log"))
    digests.saved[30]          # "e8e507904dc9f13a9cdea2dce03c39af"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tb_analysis.errors import NoRunsError

# The trainer's words (megatron/checkpoint/saving.py and loading.py); a test holds them together.
_SAVED = re.compile(r"saved \S.*global_step(\d+): .* state digest ([0-9a-f]{32})$")
_LOADED = re.compile(r"state digest ([0-9a-f]{32}) equals the one at save")


@dataclass(frozen=True)
class StateDigests:
    """128-bit state digests in hexadecimal."""

    saved: Mapping[int, str] = field(default_factory=dict)
    """By iteration; of an iteration saved twice the last."""
    loaded: str | None = None
    """Of what was loaded; None for a run that was not resumed, or whose load could not be proven."""


def read_digests(log: Path) -> StateDigests:
    """Of the log of one run. Raises NoRunsError if there is no such file."""
    if not log.is_file():
        raise NoRunsError(
            f"{log}: no such log. A run's output is expected there under the name of its folder of events."
        )
    saved, loaded = {}, None
    for line in log.read_text(errors="replace").splitlines():
        if match := _SAVED.search(line.rstrip()):
            saved[int(match.group(1))] = match.group(2)
        elif match := _LOADED.search(line):
            loaded = match.group(1)
    return StateDigests(saved, loaded)
