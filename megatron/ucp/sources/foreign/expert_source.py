"""The Source of a folder with experts in files of their own: dense parameters by another Source, experts by a table.

For every parameter of an expert the reader has worked out who holds which stretch of which
tensor-parallel shard, and where each state of it lies; pieces follow from that and the layout.

    locations = {"fp32": (file, ("optimizer_state_dict", ...)), ...}
    fragment = ExpertFragment(tp=0, start=0, stop=40, offset=20, locations=locations)
    source = MoeSource(folder, manifest, dense, {"1.deepspeed_moe.experts.deepspeed_experts.3.w": [fragment]}, cache)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.ucp.errors import CorruptFileError, SourceError
from megatron.ucp.layout import ShardRank
from megatron.ucp.manifest import Manifest
from megatron.ucp.runs import shard_runs
from megatron.ucp.sources.deepspeed import DeepSpeedSource
from megatron.ucp.sources.source import FileCache, Piece
from megatron.ucp.stored import StoredTensor

STEP = "step"

Location = tuple[Path, tuple[str | int, ...]]
"""A file and the path to a tensor in it."""


@dataclass(frozen=True)
class ExpertFragment:
    """Elements [start, stop) of shard `tp` of a parameter, from element `offset` of a state's tensor."""

    tp: int
    start: int
    stop: int
    offset: int
    locations: Mapping[str, Location]
    """By state, and of STEP."""


class MoeSource:
    """`dense` answers for all parameters that are not in `experts`. `copies`: further holders of dense states."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        dense: DeepSpeedSource,
        experts: Mapping[str, list[ExpertFragment]],
        cache: FileCache,
        copies: Mapping[tuple[str, str], list[Location]] | None = None,
    ):
        self.folder, self.manifest = folder, manifest
        self._dense, self._experts, self._cache, self._copies = dense, experts, cache, copies or {}

    def step(self, name: str) -> float | None:
        return self.manifest.parameters[name].step if name in self._experts else self._dense.step(name)

    def pieces(self, name: str, state: str) -> list[Piece]:
        if name not in self._experts:
            pieces = self._dense.pieces(name, state)
            locations = self._copies.get((name, state), [])
            return pieces + [
                Piece(file, key, piece.runs, piece.offset, copy)
                for piece in pieces
                for copy, (file, key) in enumerate(locations, start=1)
            ]
        info = self.manifest.parameters[name]
        if state not in info.states:
            raise SourceError(f"the checkpoint holds no {state} of {name}", expected=info.states)
        layout, fragments = info.layout_of(state), self._experts[name]
        tp_size = max(fragment.tp for fragment in fragments) + 1
        pieces = []
        for fragment in fragments:
            file, key = fragment.locations[state]
            rank = ShardRank(fragment.tp, tp_size)
            # tp rank 0 owns all it holds; the others' copies of it are compared when the parameter is read.
            for owned, copy in ((None, fragment.tp),) if layout.is_averaged else ((True, 0), (False, fragment.tp)):
                runs = shard_runs(layout, rank, fragment.start, fragment.stop, owned)
                if len(runs):
                    pieces.append(Piece(file, key, runs, fragment.offset, copy))
        return pieces

    def tensor(self, piece: Piece) -> StoredTensor:
        return self._cache.tensor(piece.file, piece.key)

    def step_object(self, name: str) -> Any:
        if name not in self._experts:
            return self._dense.step_object(name)
        file, key = self._experts[name][0].locations.get(STEP, (None, ()))
        if file is None:
            return None
        node = self._cache.load(file)
        try:
            for part in key[:-1]:
                node = node[part]
        except (KeyError, IndexError, TypeError) as error:
            raise CorruptFileError("no optimizer state", expected=" / ".join(map(str, key)), where=file) from error
        return node.get(key[-1])

    def side_files(self) -> dict[str, Any]:
        return self._dense.side_files()

    def other_files(self) -> dict[str, Path]:
        return self._dense.other_files()
