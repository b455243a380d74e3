"""What was written is what was once saved: the digest of a state that was just read against the Source's own.

require_saved(source, "final_norm.weight", "exp_avg", digest)
"""

from __future__ import annotations

from megatron.ucp.digest import Digest
from megatron.ucp.errors import DigestMismatchError
from megatron.ucp.expert_digests import changed_experts
from megatron.ucp.expert_labels import label_of
from megatron.ucp.sources.source import Source


def require_saved(source: Source, name: str, state: str, digest: Digest) -> None:
    """Raises DigestMismatchError. A Source without digests says nothing."""
    saved = source.manifest.digests.get(name, {}).get(state)
    if saved is not None and saved != digest.hex():
        raise DigestMismatchError(
            f"{name} ({state}){label_of(changed_experts(source, name, state))} is not what was saved",
            found=digest.hex(),
            expected=saved,
            where=source.folder,
            do="the files changed since the save: run `python -m megatron.ucp verify` on the folder",
        )
