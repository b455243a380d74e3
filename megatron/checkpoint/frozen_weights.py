"""Place the weights of parameters that are not trained, which the optimizer does not hold, and prove it.

    num_elements, own = place_frozen(state, source)         # local
    require_same_base(state, source, own)                   # collective
    faults = frozen_faults(state, own, digests_at_save, digests_placed)     # collective

A frozen weight has no fp32 master: where the run computes in bf16 or fp16, what the Source holds in fp32 is rounded,
and its digest cannot be the one at the save. So two things are proven: that what was read is what was saved, and that
what stands in the model is what was read, rounded. Of a checkpoint that leaves them out, they are another one's, its
base's: that these are the same is known by one digest of all, in the precision in which they were held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron.checkpoint.errors import SourceMismatchError
from megatron.checkpoint.state_digest import frozen_digests
from megatron.engine.engine_state import MASTER, EngineState
from megatron.parallel.rank_errors import reported_by_rank_0
from megatron.ucp.digest import Digest, digest_runs, total
from megatron.ucp.execute import gather
from megatron.ucp.sources import Source
from megatron.ucp.sources.with_base import left_out_of


@dataclass
class FrozenParts:
    """Digests by name, of what this rank counts."""

    as_read: dict[str, Digest] = field(default_factory=dict)
    as_rounded: dict[str, Digest] = field(default_factory=dict)
    as_held: dict[str, Digest] = field(default_factory=dict)
    """In the precision of the run that left them out of its save."""


def place_frozen(state: EngineState, source: Source) -> tuple[int, FrozenParts]:
    """Read this rank's frozen intervals into the live weights; returns the number of elements too. Local."""
    num_elements, parts = 0, FrozenParts()
    told = left_out_of(source)
    held_in = getattr(torch, told.get("dtype", "float32")) if told else None
    for interval in state.frozen_intervals:
        name, weights = interval.name, interval.weights
        # What pads a vocabulary is in no file; it is zero (layers/vocabulary.py).
        values = torch.zeros(interval.numel, dtype=torch.float32)
        gather(source, name, MASTER, source.pieces(name, MASTER), interval.runs, values)
        weights.copy_(values)
        shape, rounded = state.layouts[name].shape, values.to(weights.dtype)
        parts.as_read[name] = digest_runs(values, interval.counted_runs, name=name, state=MASTER, shape=shape)
        parts.as_rounded[name] = digest_runs(rounded, interval.counted_runs, name=name, state=MASTER, shape=shape)
        if held_in is not None:
            held = values.to(held_in)
            parts.as_held[name] = digest_runs(held, interval.counted_runs, name=name, state=MASTER, shape=shape)
        num_elements += interval.numel
    return num_elements, parts


def require_same_base(state: EngineState, source: Source, own: FrozenParts) -> None:
    """Where the Source left out its frozen weights. Collective over the world. Raises SourceMismatchError, on every
    rank, where those that were read instead are not the same."""
    if (told := left_out_of(source)) is None:
        return
    digests = frozen_digests(state, own.as_held)
    found = total({name: {MASTER: digest} for name, digest in digests.items()})
    if found != told["digest"]:
        with reported_by_rank_0(dist.get_rank()):
            raise SourceMismatchError(
                f"{source.folder} was trained beside other weights than those of --pretrained-checkpoint: its "
                f"frozen parameters had digest {told['digest']} in {told.get('dtype', 'float32')}, these "
                f"{len(digests)} have {found}. Give the model that the run began from."
            )


def frozen_faults(
    state: EngineState,
    own: FrozenParts,
    saved: Mapping[str, Mapping[str, str]],
    placed: Mapping[str, Mapping[str, str]],
) -> list[str]:
    """The frozen parameters whose weights are not what the Source saved, rounded; of those that it left out, not what
    was read, rounded. Collective over the world."""
    as_read, as_rounded = frozen_digests(state, own.as_read), frozen_digests(state, own.as_rounded)
    return [
        f"{name} ({MASTER})"
        for name in sorted(state.frozen)
        if placed[name][MASTER] != as_rounded[name]
        or (not own.as_held and saved.get(name, {}).get(MASTER) != as_read[name])
    ]
