"""Which rank tells of an error that several have. Imports no torch: a wrong flag is told before that is loaded.

with reported_by_rank_0(rank):      # what is wrong for every rank is told once
    main()
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

REPORTED_ELSEWHERE = "is_reported_elsewhere"
"""Attribute of an error that another rank reports too: true where this rank need not."""


@contextlib.contextmanager
def reported_by_rank_0(rank: int) -> Iterator[None]:
    """The block fails on every rank or on none, in the same way."""
    try:
        yield
    except Exception as error:
        setattr(error, REPORTED_ELSEWHERE, rank > 0)
        raise
