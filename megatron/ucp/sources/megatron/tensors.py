"""A torch_dist folder's tensors as a Source, block by block and under the names that sources/megatron/names.py knows.

source = CoreTensors.of(folder, metadata, vocab_size=32000, num_layers=32)
source.pieces("decoder.layers.3.self_attention.linear_qkv.weight", "exp_avg")

Blocks that are alike are one tensor there, [blocks, ...]; rows of the vocabulary behind `vocab_size` are padding. Where
each lies is said by the metadata, but for states in flat buckets (buckets.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from megatron.ucp.box import Box
from megatron.ucp.errors import CorruptFileError, SourceError, UnsupportedCheckpointError, listed
from megatron.ucp.layout import Layout
from megatron.ucp.manifest import Manifest, OptimizerInfo, ParameterInfo
from megatron.ucp.naming.gpt_model import MAX_LAYERS
from megatron.ucp.runs import Runs, box_runs
from megatron.ucp.sources.dcp.files import DcpFiles
from megatron.ucp.sources.dcp.metadata import Chunk, Metadata, SavedTensor
from megatron.ucp.sources.megatron.names import NORMS
from megatron.ucp.sources.source import Piece
from megatron.ucp.stored import StoredTensor
from megatron.ucp.topology import Topology

MASTER = "fp32"
_PREFIX = re.compile(r"^(?:(?:module|model)\.)+")
_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(param|fp32_param|master_param|exp_avg|exp_avg_sq)\.(.+)")
_OF_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\..+")
_BLOCK = re.compile(r"(decoder\.layers\.)(?:(\d+)\.)?(.+)")
_OF_VOCABULARY = re.compile(r"embedding\.word_embeddings\.weight|output_layer\.(weight|bias)")
_MASTERS = ("param", "fp32_param", "master_param")


class Held(Protocol):
    """Where one state of one parameter lies."""

    @property
    def keys(self) -> tuple[str, ...]: ...

    def parts(self, metadata: Metadata) -> Iterator[tuple[str, int, Runs]]:
        """(the tensor's name there, number of the chunk, runs)."""


@dataclass(frozen=True)
class Slice:
    """One block of a tensor, or all of it; of the vocabulary's its first rows."""

    key: str
    shape: tuple[int, ...]
    layer: int | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def parts(self, metadata: Metadata) -> Iterator[tuple[str, int, Runs]]:
        whole = self.shape if self.layer is None else (1, *self.shape)
        for number, chunk in enumerate(metadata.tensors[self.key].chunks):
            if (box := self._box(chunk, whole)) is not None:
                yield self.key, number, box_runs(box, whole, chunk.sizes)

    def _box(self, chunk: Chunk, whole: tuple[int, ...]) -> Box | None:
        first = (self.layer or 0, *(0 for _ in whole[1:]))
        atomic, local = [], []
        for offset, size, start, extent in zip(chunk.offsets, chunk.sizes, first, whole, strict=True):
            low, high = max(offset, start), min(offset + size, start + extent)
            if low >= high:
                return None
            atomic.append((low - start, high - start))
            local.append((low - offset, high - offset))
        return Box(tuple(atomic), tuple(local))


class CoreTensors:
    def __init__(self, folder: Path, metadata: Metadata, held: dict[tuple[str, str], Held], manifest: Manifest):
        self.folder, self.manifest, self.metadata = folder, manifest, metadata
        self.files = DcpFiles(folder)
        self._held = held

    @classmethod
    def of(cls, folder: Path, metadata: Metadata, *, vocab_size: int, num_layers: int) -> CoreTensors:
        """Raises UnsupportedCheckpointError or CorruptFileError with all that is wrong. Its manifest knows no steps and
        no groups yet (`with_optimizer`)."""
        weights, states = dict[str, SavedTensor](), dict[tuple[str, str], SavedTensor]()
        held: dict[tuple[str, str], Held] = {}
        strange: list[str] = []
        for key, saved in metadata.tensors.items():
            match = _STATE.fullmatch(key)
            if match is None and (_OF_OPTIMIZER.fullmatch(key) or "._extra_state" in key):
                continue
            own = match[2] if match else key
            state = (MASTER if match[1] in _MASTERS else match[1]) if match else ""
            for name, piece in _slices(own, key, saved, vocab_size, num_layers):
                if (name, state) in held:
                    strange.append(f"{name} is there twice")
                held[name, state] = piece
                shaped = replace(saved, shape=piece.shape)
                if state:
                    states[name, state] = shaped
                else:
                    weights[name] = shaped
        if ownerless := sorted({name for name, _ in states} - set(weights)):
            strange.append(f"the optimizer keeps states of parameters that the model has not: {listed(ownerless)}")
        strange += [
            f"{name} ({state}) is {saved.shape}, its weights {weights[name].shape}"
            for (name, state), saved in states.items()
            if name in weights and saved.shape != weights[name].shape
        ]
        if strange or not weights:
            raise UnsupportedCheckpointError(
                "not the tensors of a model that Megatron-Core saves",
                found=sorted(set(strange)) or list(metadata.tensors)[:20],
                where=folder,
            )
        parameters = {}
        for name, saved in weights.items():
            own_states = sorted(state for other, state in states if other == name)
            weight = held.pop((name, ""))
            held[name, f"{MASTER} weight"] = weight
            held.setdefault((name, MASTER), weight)
            parameters[name] = ParameterInfo(
                layout=Layout.unique(saved.shape),
                states=(MASTER, *(state for state in own_states if state != MASTER)),
                dtype=saved.dtype.name,
            )
        source = cls(folder, metadata, held, _manifest(parameters))
        source.files.require_whole(
            metadata, [(f"{name} ({state})", key) for (name, state), where in held.items() for key in where.keys]
        )
        return source

    def with_states(self, states: Mapping[tuple[str, str], Held]) -> CoreTensors:
        """Also those, of parameters that have only weights."""
        parameters = dict(self.manifest.parameters)
        for name, info in parameters.items():
            more = sorted({state for other, state in states if other == name} - {MASTER})
            parameters[name] = replace(info, states=(MASTER, *more))
        source = CoreTensors(self.folder, self.metadata, {**self._held, **states}, _manifest(parameters))
        used = [(f"{name} ({state})", key) for (name, state), where in states.items() for key in where.keys]
        source.files.require_whole(self.metadata, used)
        return source

    def with_optimizer(self, optimizer: OptimizerInfo, groups: Mapping[str, str], step: float | None) -> CoreTensors:
        """`groups`: name of each parameter's."""
        parameters = {
            name: replace(info, group=groups.get(name, ""), step=step if len(info.states) > 1 else None)
            for name, info in self.manifest.parameters.items()
        }
        manifest = replace(self.manifest, parameters=parameters, optimizer=optimizer)
        return CoreTensors(self.folder, self.metadata, self._held, manifest)

    def weights(self, name: str) -> list[Piece]:
        """Of the weights in the model's own precision."""
        return self._pieces(name, f"{MASTER} weight")

    def rows_there(self, name: str) -> int:
        """First dimension of its tensor there, with the vocabulary's padding, or with all blocks."""
        return self.metadata.tensors[self._held[name, f"{MASTER} weight"].keys[0]].shape[0]

    def has_masters(self) -> bool:
        """Whether masters are there apart from the weights."""
        return any(self._held[name, MASTER] is not self._held[name, f"{MASTER} weight"] for name in self._names())

    def _names(self) -> list[str]:
        return list(self.manifest.parameters)

    def pieces(self, name: str, state: str) -> list[Piece]:
        info = self.manifest.parameters.get(name)
        if info is None or state not in info.states:
            raise SourceError(
                f"the checkpoint holds no {state} of {name}",
                expected=self.manifest.parameters if info is None else info.states,
                where=self.folder,
            )
        return self._pieces(name, state)

    def _pieces(self, name: str, state: str) -> list[Piece]:
        tensors = self.metadata.tensors
        return [
            Piece(self.folder / tensors[key].chunks[number].place.file, (key, number), runs)
            for key, number, runs in self._held[name, state].parts(self.metadata)
        ]

    def tensor(self, piece: Piece) -> StoredTensor:
        key, number = str(piece.key[0]), int(piece.key[1])
        saved = self.metadata.tensors[key]
        return self.files.chunk(key, saved.chunks[number], saved)

    def step(self, name: str) -> float | None:
        return self.manifest.parameters[name].step

    def step_object(self, name: str) -> Any:
        return self.step(name)

    def side_files(self) -> dict[str, Any]:
        return {}

    def other_files(self) -> dict[str, Path]:
        return {}


def _manifest(parameters: dict[str, ParameterInfo]) -> Manifest:
    return Manifest(
        kind="universal",
        topology=Topology(),
        parameters=parameters,
        saved_by={"format": "Megatron-Core torch_dist"},
        unverified="Megatron-Core's checkpoints have no checksums",
    )


def _slices(own: str, key: str, saved: SavedTensor, vocab_size: int, num_layers: int) -> Iterator[tuple[str, Slice]]:
    """(name as names.py has it, where it lies) of one tensor there, whose own name is `own`."""
    name = _PREFIX.sub("", own, count=1)
    block = _BLOCK.fullmatch(name)
    if block is None:
        shape = saved.shape
        if _OF_VOCABULARY.fullmatch(name) and shape and shape[0] > vocab_size:
            shape = (vocab_size, *shape[1:])
        yield name, Slice(key, shape)
        return
    inside = block[3]
    for joined, apart in NORMS.items():
        if inside.startswith(joined):
            inside = apart + inside.removeprefix(joined)
    if block[2] is not None:
        yield f"{block[1]}{int(block[2][:9])}.{inside}", Slice(key, saved.shape)
        return
    if not saved.shape or saved.shape[0] != num_layers or num_layers > MAX_LAYERS:
        raise CorruptFileError(f"{key} is of {saved.shape}", expected=f"({num_layers}, ...): its blocks first")
    for layer in range(num_layers):
        yield f"{block[1]}{layer}.{inside}", Slice(key, saved.shape[1:], layer)
