"""Place the weights of parameters that are not trained, which the optimizer does not hold, and prove it.

    num_elements, own = place_frozen(state, source)         # local
    faults = frozen_faults(state, own, digests_at_save, digests_placed)     # collective

A frozen weight has no fp32 master: where the run computes in bf16 or fp16, what the Source holds in fp32 is rounded,
and its digest cannot be the one at the save. So two things are proven: that what was read is what was saved, and that
what stands in the model is what was read, rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from megatron.checkpoint.state_digest import frozen_digests
from megatron.engine.engine_state import MASTER, EngineState
from megatron.ucp.digest import Digest, digest_runs
from megatron.ucp.execute import gather
from megatron.ucp.sources import Source


@dataclass
class FrozenParts:
    """Digests by name, of what this rank counts."""

    as_read: dict[str, Digest] = field(default_factory=dict)
    as_rounded: dict[str, Digest] = field(default_factory=dict)


def place_frozen(state: EngineState, source: Source) -> tuple[int, FrozenParts]:
    """Read this rank's frozen intervals into the live weights; returns the number of elements too. Local."""
    num_elements, parts = 0, FrozenParts()
    for interval in state.frozen_intervals:
        name, weights = interval.name, interval.weights
        # What pads a vocabulary is in no file; it is zero (layers/vocabulary.py).
        values = torch.zeros(interval.numel, dtype=torch.float32)
        gather(source, name, MASTER, source.pieces(name, MASTER), interval.runs, values)
        weights.copy_(values)
        shape, rounded = state.layouts[name].shape, values.to(weights.dtype)
        parts.as_read[name] = digest_runs(values, interval.counted_runs, name=name, state=MASTER, shape=shape)
        parts.as_rounded[name] = digest_runs(rounded, interval.counted_runs, name=name, state=MASTER, shape=shape)
        num_elements += interval.numel
    return num_elements, parts


def frozen_faults(
    state: EngineState,
    own: FrozenParts,
    saved: Mapping[str, Mapping[str, str]],
    placed: Mapping[str, Mapping[str, str]],
) -> list[str]:
    """The frozen parameters whose weights are not what the Source saved, rounded. Collective over the world."""
    as_read, as_rounded = frozen_digests(state, own.as_read), frozen_digests(state, own.as_rounded)
    return [
        f"{name} ({MASTER})"
        for name in sorted(state.frozen)
        if saved.get(name, {}).get(MASTER) != as_read[name] or placed[name][MASTER] != as_rounded[name]
    ]
