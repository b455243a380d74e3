"""Source: a PyTorch DCP folder with a model and its optimizer, by the parameters' own names.

source = DcpSource.open("outputs/checkpoint/step-1000")
source.pieces("layers.0.attention.wq.weight", "exp_avg")

Names are the model's (a "model." or "module." that all of them begin with is left out). The optimizer's states stand
under "optim.state.NAME.STATE" (get_state_dict) or "optimizer.state.NAME.STATE" (TorchTitan); its groups under
"....param_groups.N.KEY" or "....param_groups.NAME.KEY". All else that a program keeps beside them is left out. Where a
chunk's values lie is found out when they are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.ucp.errors import SourceError, UnsupportedCheckpointError, listed
from megatron.ucp.layout import Layout
from megatron.ucp.manifest import Manifest, OptimizerInfo, ParameterInfo
from megatron.ucp.sources.dcp.files import DcpFiles, runs_of
from megatron.ucp.sources.dcp.metadata import METADATA, Metadata, SavedTensor, read_metadata
from megatron.ucp.sources.source import Piece
from megatron.ucp.stored import StoredTensor
from megatron.ucp.topology import Topology

MASTER = "fp32"
_STATE = re.compile(r"(?:.+\.)?(?:optim|optimizer|optimizers)\.state\.(.+)\.(\w+)")
_GROUP = re.compile(r"(?:.+\.)?(?:optim|optimizer|optimizers)\.param_groups\.(.+)\.(\w+)")
_PREFIXES = ("model.", "module.")


class DcpSource:
    def __init__(self, folder: Path, metadata: Metadata, keys: Mapping[tuple[str, str], str], manifest: Manifest):
        """`keys`: of each (parameter, state) the name there."""
        self.folder, self.manifest = folder, manifest
        self._metadata, self._keys = metadata, keys
        self._files = DcpFiles(folder)
        self._steps: dict[str, float | None] = {}

    @classmethod
    def open(cls, folder: str | Path) -> DcpSource:
        """Raises CorruptFileError, UnsafePickleError or UnsupportedCheckpointError with all that is wrong."""
        folder = Path(folder)
        metadata = read_metadata(folder)
        names, states = _sorted_by_kind(metadata)
        if not names:
            raise UnsupportedCheckpointError(
                "no parameters of a model in the folder", found=list(metadata.tensors)[:20], where=folder
            )
        keys = {(name, MASTER): key for name, key in names.items()}
        keys |= {(name, state): key for (name, state), key in states.items() if name in names and state != "step"}
        if strange := sorted({name for name, _ in states} - set(names)):
            raise UnsupportedCheckpointError(
                "the optimizer keeps states of parameters that the model has not", found=listed(strange), where=folder
            )
        source = cls(folder, metadata, keys, Manifest(kind="universal", topology=Topology(), parameters={}))
        source._steps = {name: source._number(states.get((name, "step"))) for name in names}
        source.manifest = source._manifest(names, states)
        source.manifest.require_sound(folder)
        source._files.require_whole(metadata, [(f"{name} ({state})", key) for (name, state), key in keys.items()])
        return source

    def _manifest(self, names: Mapping[str, str], states: Mapping[tuple[str, str], str]) -> Manifest:
        tensors = self._metadata.tensors
        parameters = {}
        groups, members = self._groups(names)
        for name, key in names.items():
            own = [state for (other, state) in states if other == name and state != "step"]
            shapes = {state: tensors[states[name, state]].shape for state in own}
            parameters[name] = ParameterInfo(
                layout=Layout.unique(tensors[key].shape),
                group=members.get(name, ""),
                states=(MASTER, *sorted(state for state in own if len(shapes[state]))),
                step=self._steps[name],
                scalars={s: self._number(states[name, s]) or 0.0 for s in own if not len(shapes[s])},
                shapes={s: shape for s, shape in shapes.items() if len(shape) and shape != tensors[key].shape},
                dtype=tensors[key].dtype.name,
            )
        return Manifest(
            kind="universal",
            topology=Topology(),
            parameters=parameters,
            optimizer=OptimizerInfo(kind="", groups=groups),
            saved_by={"format": "PyTorch DCP"},
            unverified="PyTorch's distributed checkpoints have no checksums",
        )

    def _groups(self, names: Mapping[str, str]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """(numbers, texts and lists of the optimizer's groups, the group of each parameter). Groups are kept by number
        with the names of their parameters, or for each parameter; those that say the same are one here."""
        told: dict[str, dict[str, Any]] = {}
        owner = {name: name for name in names}
        for key, place in self._metadata.values.items():
            if not (match := _GROUP.fullmatch(key)):
                continue
            value = self._files.value(place)
            if match[2] == "params":
                owner |= {name: match[1] for name in value if name in names} if isinstance(value, list) else {}
            elif value is None or isinstance(value, (bool, int, float, str)):
                told.setdefault(match[1], {})[match[2]] = value
            elif isinstance(value, (tuple, list)) and all(isinstance(v, (int, float)) for v in value):
                told.setdefault(match[1], {})[match[2]] = list(value)
        kinds: list[dict[str, Any]] = []
        for values in told.values():
            if values not in kinds:
                kinds.append(values)
        found = {str(number): values for number, values in enumerate(kinds)}
        if len(kinds) == 1:
            return found, dict.fromkeys(names, "0")
        return found, {name: str(kinds.index(told[key])) for name, key in owner.items() if key in told}

    def pieces(self, name: str, state: str) -> list[Piece]:
        tensor = self._tensor_of(name, state)
        return [
            Piece(self.folder / chunk.place.file, (name, state, number), runs_of(chunk, tensor.shape))
            for number, chunk in enumerate(tensor.chunks)
        ]

    def tensor(self, piece: Piece) -> StoredTensor:
        name, state, number = piece.key
        whole = self._tensor_of(str(name), str(state))
        chunk = whole.chunks[int(number)]
        return self._files.chunk(f"{name} ({state})", chunk, whole)

    def _number(self, key: str | None) -> float | None:
        """Of a tensor without dimensions."""
        tensor = None if key is None else self._metadata.tensors[key]
        if tensor is None or tensor.shape or len(tensor.chunks) != 1:
            return None
        content = self._files.value(tensor.chunks[0].place)
        return float(content) if isinstance(content, StoredTensor) and content.numel() == 1 else None

    def _tensor_of(self, name: str, state: str) -> SavedTensor:
        if (name, state) not in self._keys:
            info = self.manifest.parameters.get(name)
            raise SourceError(
                f"the checkpoint holds no {state} of {name}",
                expected=self.manifest.parameters if info is None else info.states,
                where=self.folder,
            )
        return self._metadata.tensors[self._keys[name, state]]

    def step(self, name: str) -> float | None:
        return self._steps.get(name)

    def step_object(self, name: str) -> Any:
        return self._steps.get(name)

    def side_files(self) -> dict[str, Any]:
        return {}

    def other_files(self) -> dict[str, Path]:
        return {}


def is_dcp(folder: Path) -> bool:
    return (folder / METADATA).is_file()


def _sorted_by_kind(metadata: Metadata) -> tuple[dict[str, str], dict[tuple[str, str], str]]:
    """(parameter -> key, (parameter, state) -> key)."""
    states = {(match[1], match[2]): key for key in metadata.tensors if (match := _STATE.fullmatch(key))}
    others = [key for key in metadata.tensors if key not in states.values() and not _GROUP.fullmatch(key)]
    owners = {name for name, _ in states}
    for prefix in _PREFIXES:
        under = {key.removeprefix(prefix): key for key in others if key.startswith(prefix)}
        # The state dict's own "model.", not a name's: with it the optimizer's names would not be found.
        if under and (not owners or owners <= under.keys()) and not owners & set(others):
            return under, states
    return {key: key for key in others}, states
