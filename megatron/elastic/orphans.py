"""No process of a job outlives the one that started it: an orphan would train on, beside those that took its place."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""


def end_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """This process gets the signal when `parent`, its parent (strictly, the thread that started it), ends, however that
    ends. Elsewhere than on Linux: nothing."""
    if not sys.platform.startswith("linux"):
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it has ended already, and will not tell
        os.kill(os.getpid(), number)
