"""Open a checkpoint once on each rank, and know that all ranks see the same one.

opened = open_everywhere(folder)        # collective over the world
opened.source, opened.identity
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron.checkpoint.errors import CheckpointError, all_ranks_or_none
from megatron.parallel.agreement import gathered
from megatron.parallel.rank_errors import reported_by_rank_0
from megatron.ucp.identity import Identity
from megatron.ucp.manifest import MANIFEST_NAME
from megatron.ucp.run_folder import OpenCheckpoint
from megatron.ucp.sources import open_source


def open_everywhere(folder: Path, opened: OpenCheckpoint | None = None) -> OpenCheckpoint:
    """`opened` is taken where this rank has opened it already. Collective over the world. Raises CheckpointError, on
    every rank, where one cannot open it or ranks do not see the same."""
    with all_ranks_or_none("opening", folder):
        identity = opened.identity if opened else Identity.of(folder)
    _require_same_everywhere(identity)
    with all_ranks_or_none("opening", folder):
        return opened or OpenCheckpoint(open_source(folder), identity)


def _require_same_everywhere(identity: Identity) -> None:
    """One ucp.json for all: a node with other files, or with none, would place another state than the rest."""
    seen = gathered(f"SHA-256 {identity.manifest[:16]}" if identity.manifest else "none")
    if len(set(seen)) > 1:
        ranks = "; ".join(f"ranks {[r for r, s in enumerate(seen) if s == what][:8]}: {what}" for what in set(seen))
        with reported_by_rank_0(dist.get_rank()):
            raise CheckpointError(
                f"ranks do not see the same checkpoint in {identity.folder}: {MANIFEST_NAME} is, on {ranks}. "
                "Put the whole folder where every node reads it."
            )
