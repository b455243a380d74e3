"""Source: a checkpoint whose parameters have another program's names, under ours, with all states.

What Hugging Face's Trainer, Accelerate or an FSDP2 program saved of a transformers model becomes a checkpoint that
pretrain_gpt.py goes on from, moments included: q, k and v are one parameter here, and so are their moments. The same
for Megatron-Core and Megatron-DeepSpeed (sources/megatron).

    source = with_names_of(open_source("checkpoint-500"), "SmolLM2-135M")
    source.pieces("layers.0.attention.query_key_value.weight", "exp_avg")
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from megatron.ucp.errors import UnsupportedCheckpointError, listed
from megatron.ucp.execute import gather
from megatron.ucp.huggingface.config_json import describe
from megatron.ucp.huggingface.folder import CONFIG, companions, file_of, read_json
from megatron.ucp.manifest import Manifest, OptimizerInfo, ParameterInfo
from megatron.ucp.naming.gpt_model import GptModel, group_of, layouts
from megatron.ucp.naming.matching import match
from megatron.ucp.naming.names import Names
from megatron.ucp.naming.tensors import Pair
from megatron.ucp.runs import Runs, intersect, whole_runs
from megatron.ucp.sources.source import Piece, Source
from megatron.ucp.stored import StoredTensor
from megatron.ucp.topology import Topology

Parts = list[tuple[Pair, str]]
"""Of one of our parameters: where each of theirs lies in it, and its name there."""


class RenamedSource:
    def __init__(self, inner: Source, parts: dict[str, Parts], manifest: Manifest, companions: Mapping[str, Path]):
        """`companions`: files that come along, see Source.other_files."""
        self.folder, self.manifest = inner.folder, manifest
        self._inner, self._parts, self._companions = inner, parts, dict(companions)
        self.without_copies: frozenset[str] = frozenset()
        """Of which, by their names there, only the first copy counts: the others are no copies."""
        self._pieces: dict[tuple[str, str], list[Piece]] = {}
        self._origin: dict[Piece, Piece | tuple[Pair, str, str]] = {}
        """The inner piece, or what a transposed tensor is made of."""
        self._lock = threading.Lock()
        self._kept = threading.local()
        """The transposed tensor that this thread read last."""

    @classmethod
    def of(
        cls,
        inner: Source,
        names: Names,
        model: GptModel,
        settings: Mapping[str, Any],
        companions: Mapping[str, Path] = MappingProxyType({}),
        called: Mapping[str, str] = MappingProxyType({}),
        *,
        only_adapters: bool = False,
    ) -> RenamedSource:
        """`called`: of parameters whose names `names` does not know, those that it does; `only_adapters`: nothing else
        is there. Raises UnsupportedCheckpointError with all that does not fit."""
        parameters = inner.manifest.parameters
        known = {called.get(name, name): name for name in parameters}
        shapes = {name: parameters[there].layout.shape for name, there in known.items()}
        matched = match(names, model, shapes, only_adapters=only_adapters)
        faults = list(matched.faults)
        if len(known) != len(parameters):
            twice = sorted(name for name in called if known[called[name]] != name)
            faults.append(f"{len(twice)} parameter(s) have a name that another one has, too: {listed(twice)}")
        found = {ours: [(pair, known[name]) for pair, name in parts] for ours, parts in matched.by_parameter.items()}
        for ours, parts in found.items():
            infos = [parameters[name] for _, name in parts]
            kinds = {(info.states, info.step, tuple(info.scalars.items()), info.is_trainable) for info in infos}
            if len(kinds) > 1:
                faults.append(f"{ours}: its parts have other states or steps, or are not all trained")
            if any(info.shapes for info in infos):
                faults.append(f"{ours}: its states have other shapes than its own")
        if faults:
            raise _refused(inner, faults)
        return cls(inner, found, _manifest(inner, found, model, dict(settings)), companions)

    def pieces(self, name: str, state: str) -> list[Piece]:
        if (name, state) not in self._pieces:
            info = self.manifest.parameters.get(name)
            if info is None or state not in info.states:
                return self._inner.pieces(name, state)  # which says that it has no such parameter or state
            found: list[Piece] = []
            for pair, theirs in self._parts[name]:
                found += self._pieces_of(pair, theirs, state)
            with self._lock:
                self._pieces.setdefault((name, state), found)
        return self._pieces[name, state]

    def _pieces_of(self, pair: Pair, theirs: str, state: str) -> list[Piece]:
        inner = self._inner.pieces(theirs, state)
        if theirs in self.without_copies:
            inner = [piece for piece in inner if piece.copy == 0]
        if pair.is_transposed:
            made = Piece(inner[0].file, (theirs, state), pair.runs)
            self._origin[made] = pair, theirs, state
            return [made]
        found = []
        for piece in inner:
            runs = _through(pair.runs, piece.runs)
            if len(runs):
                made = Piece(piece.file, piece.key, runs, piece.offset, piece.copy)
                self._origin[made] = piece
                found.append(made)
        return found

    def tensor(self, piece: Piece) -> StoredTensor:
        origin = self._origin[piece]
        if isinstance(origin, Piece):
            return self._inner.tensor(origin)
        if getattr(self._kept, "piece", None) is not piece:
            self._kept.piece, self._kept.tensor = piece, None  # the one before goes first
            self._kept.tensor = self._transposed(*origin)
        return self._kept.tensor

    def _transposed(self, pair: Pair, theirs: str, state: str) -> StoredTensor:
        numel = math.prod(pair.shape)
        values = np.empty(numel, dtype=np.float32)
        gather(self._inner, theirs, state, self._inner.pieces(theirs, state), whole_runs(numel), values)
        return StoredTensor.of_array(values.reshape(pair.shape).T).flat()

    def step(self, name: str) -> float | None:
        return self.manifest.parameters[name].step

    def step_object(self, name: str) -> Any:
        return self._inner.step_object(self._parts[name][0][1])

    def side_files(self) -> dict[str, Any]:
        return {}

    def other_files(self) -> dict[str, Path]:
        return dict(self._companions)


def with_names_of(inner: Source, like: str | Path) -> RenamedSource:
    """`like`: a folder with the config.json of the model whose names the parameters have. Raises
    UnsupportedCheckpointError with all that does not fit, and what reading config.json raises."""
    like = Path(like)
    described = describe(read_json(like, CONFIG))
    if described.family is None or described.model is None:
        raise _refused(inner, list(described.faults))
    return RenamedSource.of(inner, described.family, described.model, described.settings, beside(like))


def beside(like: Path) -> dict[str, Path]:
    """What belongs to a model beside its weights."""
    return {name: file_of(like, name) for name in [CONFIG, *companions(like)]}


def _through(ours: Runs, inner: Runs) -> Runs:
    """From (ours, theirs, length) and (theirs, file, length): (ours, file, length), by ascending places in ours."""
    by_theirs = ours[:, [1, 0, 2]]
    runs = intersect(by_theirs[np.argsort(by_theirs[:, 0], kind="stable")], inner)
    return np.ascontiguousarray(runs[np.argsort(runs[:, 0], kind="stable")])


def _manifest(inner: Source, parts: dict[str, Parts], model: GptModel, settings: dict[str, Any]) -> Manifest:
    there = inner.manifest
    parameters = {}
    for name, layout in layouts(model).items():
        if name not in parts:
            continue  # only adapters are there
        info = there.parameters[parts[name][0][1]]
        groups = {there.parameters[theirs].group for _, theirs in parts[name]}
        parameters[name] = ParameterInfo(
            layout=layout,
            group=groups.pop() if len(groups) == 1 else "",
            states=info.states,
            step=info.step,
            scalars=info.scalars,
            is_trainable=info.is_trainable,
            dtype=info.dtype,
        )
    parameters, optimizer = _with_our_groups(parameters, there.optimizer)
    return Manifest(
        kind="universal",
        topology=Topology(),
        parameters=parameters,
        optimizer=optimizer,
        model=model.to_json(),
        common={**there.common, "model_settings": settings},
        saved_by=there.saved_by,
        unverified="its parameters had other names, of which its digests are" if there.digests else there.doubt,
    )


def _with_our_groups(
    parameters: dict[str, ParameterInfo], optimizer: OptimizerInfo
) -> tuple[dict[str, ParameterInfo], OptimizerInfo]:
    """Groups by the names that this program gives its own, where all parameters of each have the same values there;
    otherwise as they are."""
    ours = {name: group_of(name, info.layout.shape) for name, info in parameters.items() if info.is_trainable}
    values: dict[str, dict[str, Any]] = {}
    for name, group in ours.items():
        told = optimizer.groups.get(parameters[name].group)
        if told is None or values.setdefault(group, told) != told:
            return parameters, optimizer
    named = {name: replace(info, group=ours.get(name, "")) for name, info in parameters.items()}
    return named, replace(optimizer, groups={name: dict(held) for name, held in values.items()})


def _refused(inner: Source, faults: list[str]) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        f"its parameters are not those of the model that is described: {len(faults)} reason(s)",
        found=faults,
        where=inner.folder,
        do="give the description of the model that was trained, in the same names",
    )
