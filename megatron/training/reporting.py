"""What a run says on the console, and how it ends when something is wrong.

log = set_up_logging(rank)          # rank 0 talks, the others only warn
with report_errors():               # a named error is its message and exit code 2, not a traceback
    main()
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator

from megatron.parallel.rank_errors import REPORTED_ELSEWHERE

FORMAT = "[%(asctime)s] %(message)s"
DATE_FORMAT = "%H:%M:%S"


def set_up_logging(rank: int) -> logging.Logger:
    """Lines of `megatron` on stdout; DeepSpeed's and others' only from warnings on."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(FORMAT if rank == 0 else f"[rank {rank}] {FORMAT}", DATE_FORMAT))
    log = logging.getLogger("megatron")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # DeepSpeed's pipeline sends activations by broadcast inside backward; nothing is differentiated through it.
    warnings.filterwarnings("ignore", message="c10d::broadcast_: an autograd kernel was not registered")
    return log


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Errors that carry their own explanation end the process with it; all others keep their traceback."""
    try:
        yield
    except Exception as error:
        if not _explains_itself(error):
            raise
        if getattr(error, REPORTED_ELSEWHERE, False):
            # A launcher ends all ranks once it sees one end: the one that tells comes first.
            time.sleep(1)
        else:
            print(f"\n{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        # Not sys.exit: ranks that wait in a collective are ended by the launcher, and threads of the process
        # group must not keep this one alive until then.
        sys.stdout.flush()
        os._exit(2)


def _explains_itself(error: Exception) -> bool:
    """Our own named errors; a traceback would only bury what they say."""
    return type(error).__module__.split(".")[0] == "megatron"
