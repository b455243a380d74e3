"""Source: stock ZeRO-0 saves with experts (`expp_rank_*`), where DeepSpeed made the optimizer's groups.

ZeRO-0 keeps the optimizer's state by index. With experts DeepSpeed divides the program's one list of
parameters into the group "dense-params" and groups "ep_size_N", so that the indices follow the model's own order: the
order of the weights, which are saved by name. It is believed only where every state has the shape of its parameter.

    source = open_moe_zero0(Path("run/global_step100"))

What it cannot see: weights are the masters here, saved once, so a file of weights of another step is not found out, nor
are the optimizers of two ranks (not the first) that changed locations. Read are fp32 saves of one
tensor- and pipeline-parallel rank; whatever leaves the order open (own groups, frozen or tied parameters) is refused.

Source of these conventions: deepspeed/runtime/engine.py (_save_moe_checkpoint), moe/utils.py
(configure_moe_param_groups).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.ucp.errors import CorruptFileError, MissingFileError, SourceError, UnsupportedCheckpointError, listed
from megatron.ucp.layout import Layout
from megatron.ucp.manifest import Manifest, OptimizerInfo, ParameterInfo
from megatron.ucp.sources.deepspeed import DeepSpeedSource
from megatron.ucp.sources.deepspeed_files import list_files
from megatron.ucp.sources.foreign.expert_files import (
    MoeLayer,
    content_faults,
    list_expert_files,
    moe_layers,
    require_expert_files,
    split_name,
)
from megatron.ucp.sources.foreign.expert_source import STEP, ExpertFragment, Location, MoeSource
from megatron.ucp.sources.foreign.layer_files import is_weight
from megatron.ucp.sources.foreign.param_groups import group_names, group_values
from megatron.ucp.sources.foreign.save import NO_MANIFEST, common_from_model_states
from megatron.ucp.sources.one_save import disagreements
from megatron.ucp.sources.optimizer_file import numbers_in
from megatron.ucp.sources.source import FileCache
from megatron.ucp.stored import as_stored, is_tensor
from megatron.ucp.topology import Topology

_DENSE = "dense-params"
_NUM_COMPARED = 16
_EXPERTS = re.compile(r"^ep_size_(\d+)$")


def open_moe_zero0(folder: Path) -> MoeSource:
    """Opens every file. Raises MissingFileError, CorruptFileError, SourceError or UnsupportedCheckpointError."""
    return _Reader(folder).source()


class _Reader:
    def __init__(self, folder: Path):
        self.folder, self.cache = folder, FileCache()
        models = list_files(folder).models
        self.files = list_expert_files(folder)
        if not models:
            raise MissingFileError("no model states (*mp_rank_*_model_states.pt)", where=folder)
        if set(models) != {(0, 0)} or any(key[-1] for key in (*self.files.weights, *self.files.optimizers)):
            self._refuse("ZeRO-0 with experts and tensor or pipeline parallelism is not read", list(models.values()))
        self.model_file = models[0, 0]
        self.model = self.cache.load(self.model_file)
        self.layers = moe_layers(self.model, self.model_file)
        optimizer = self.model.get("optimizer")
        if not isinstance(optimizer, Mapping) or not {"state", "param_groups"} <= set(optimizer):
            self._refuse("only ZeRO-0 in fp32 keeps the state by parameter", list(optimizer or ()))
        self.groups = optimizer["param_groups"]
        self.ep_size = self._ep_size()

    def _refuse(self, why: str, found: Any) -> None:
        raise UnsupportedCheckpointError(
            why,
            found=found,
            where=self.folder,
            do="resume it with the program that saved it under ZeRO-1, and save again",
        )

    def _ep_size(self) -> int:
        names = [str(group.get("name")) for group in self.groups]
        sizes = {match[1] for name in names if (match := _EXPERTS.match(name))}
        if len(sizes) > 1:
            self._refuse(
                "ZeRO-0 saves the optimizers of one group of experts only, and here are several ep sizes", names
            )
        if names[:1] != [_DENSE] or not sizes or not all(map(_EXPERTS.match, names[1:])):
            self._refuse(
                "ZeRO-0 keeps the optimizer's state by index, and nothing names the indices: the groups are not those "
                f"that DeepSpeed itself makes of a list of parameters ({_DENSE}, ep_size_N)",
                names,
            )
        return int(sizes.pop())

    def source(self) -> MoeSource:
        self._check_files()
        dense = self._dense_names()
        optimizers = self._optimizers()
        self._check_agreement(optimizers)
        infos: dict[str, ParameterInfo] = {}
        fragments: dict[str, list[ExpertFragment]] = {}
        copies: dict[tuple[str, str], list[Location]] = {}
        for ep, optimizer in optimizers.items():
            path, weights = self.files.optimizers[ep, 0], {**dense, **self._expert_names(ep)}
            found = self._infos(path, optimizer, weights)
            for index, (name, info) in enumerate(found.items()):
                locations = {state: (path, ("optimizer", "state", index, state)) for state in (*info.states[1:], STEP)}
                if name in dense:
                    for state in info.states[1:]:
                        copies.setdefault((name, state), []).append(locations[state])
                else:
                    fragments[name] = [ExpertFragment(0, 0, info.layout.numel, 0, {"fp32": weights[name], **locations})]
            infos.update(found)
        manifest = Manifest(
            kind="native",
            topology=Topology(dp_size=int(self.model["dp_world_size"])),
            parameters={name: infos[name] for name in dense},
            optimizer=OptimizerInfo(kind="", groups=self._groups()),
            common=common_from_model_states(self.cache.load(self.model_file)),
            zero0_order=[list(dense)],
            saved_by={"deepspeed": str(self.model.get("ds_version", ""))},
            unverified=NO_MANIFEST,
        )
        source = DeepSpeedSource(self.folder, manifest, cache=self.cache)
        topology = replace(manifest.topology, ep_size=self.ep_size)
        manifest = replace(manifest, parameters={**manifest.parameters, **infos}, topology=topology, zero0_order=[])
        return MoeSource(self.folder, manifest, source, fragments, self.cache, copies)

    # -- what there has to be -----------------------------------------------------------------------------------

    def _check_files(self) -> None:
        """Raises naming the experts."""
        if odd := [layer for layer in self.layers if layer.num_experts % self.ep_size]:
            self._refuse(f"experts that cannot be divided over {self.ep_size} ranks", odd)
        every = [(layer, number) for layer in self.layers for number in range(layer.num_experts)]
        require_expert_files(self.folder, self.files, {(layer.number, number, 0): layer for layer, number in every})
        lost = [
            f"expp_rank_{ep}_mp_rank_00_optim_states.pt with {listed(layer.title(n) for layer, n in self._experts(ep))}"
            for ep in range(self.ep_size)
            if (ep, 0) not in self.files.optimizers
        ]
        if lost:
            raise MissingFileError(
                f"{len(lost)} file(s) with the optimizer's states of experts are missing",
                found=f"missing: {'; '.join(lost)}",
                expected=f"one file for each of {self.ep_size} expert-parallel ranks",
                where=self.folder,
                do="bring the files of every node into this folder",
            )
        faults = [
            f"{path.name}: the experts of expert-parallel rank {ep}, but there are {self.ep_size}"
            for (ep, _), path in self.files.optimizers.items()
            if ep >= self.ep_size
        ]
        first = {layer.number: self._shapes(layer, 0) for layer in self.layers}
        for layer, number in every:
            path = self.files.weights[layer.number, number, 0]
            faults += content_faults(layer, number, path, self.cache.load(path), first[layer.number])
        if faults:
            raise SourceError(
                "files of experts do not hold the expert that their name says",
                found=faults,
                where=self.folder,
                do="copy them again from where they were saved, under the names that they had",
            )

    def _optimizers(self) -> dict[int, Mapping[str, Any]]:
        """By expert-parallel rank."""
        found = {}
        for (ep, _), path in self.files.optimizers.items():
            content = self.cache.load(path)
            found[ep] = content.get("optimizer") if isinstance(content, Mapping) else None
            if not isinstance(found[ep], Mapping) or not {"state", "param_groups"} <= set(found[ep]):
                raise CorruptFileError("no optimizer state by parameter", where=path)
        return found

    def _check_agreement(self, optimizers: Mapping[int, Mapping[str, Any]]) -> None:
        """Every rank saves its whole optimizer: what all have must be equal, and no two have the same experts."""
        answers: dict[str, dict[str, Any]] = {}
        of_experts: dict[int, list[int]] = {}
        for ep, optimizer in [(0, self.model["optimizer"]), *optimizers.items()]:
            path = self.files.optimizers[ep, 0] if answers else self.model_file
            states, groups = optimizer["state"], optimizer["param_groups"]
            steps = [float(state[STEP]) for state in states.values() if state.get(STEP) is not None]
            experts = _checksum(states, [index for group in groups[1:] for index in group["params"]])
            answers[path.name] = {
                "the optimizer's step": max(steps, default=None),
                "the number of parameters of each group": [len(group["params"]) for group in groups],
                "the hyper-parameters": [{k: str(v) for k, v in group.items() if k != "params"} for group in groups],
                "the checksum of dense parameters' states": _checksum(states, groups[0]["params"]),
                **({"the checksum of the states of the first rank's experts": experts} if ep == 0 else {}),
            }
            if path is not self.model_file and experts is not None:
                of_experts.setdefault(experts, []).append(ep)
        odd = disagreements(answers)
        for ranks in of_experts.values():
            if len(ranks) > 1:
                names = ", ".join(self.files.optimizers[ep, 0].name for ep in ranks)
                titles = listed(layer.title(number) for ep in ranks for layer, number in self._experts(ep))
                odd.append(f"{names} hold the same states of experts, but are of {titles}")
        if odd:
            raise SourceError(
                "the files are not of one save",
                found=odd,
                where=self.folder,
                do="bring together the files of one save of one run",
            )

    # -- names, in the order of the optimizer's indices -----------------------------------------------------------

    def _dense_names(self) -> dict[str, Location]:
        buffers = set(self.model["buffer_names"])
        module = self.model["module"]
        return {n: (self.model_file, ("module", n)) for n, v in module.items() if n not in buffers and is_weight(v)}

    def _expert_names(self, ep: int) -> dict[str, Location]:
        names: dict[str, Location] = {}
        for layer, number in self._experts(ep):
            path = self.files.weights[layer.number, number, 0]
            keys = {split_name(key.lstrip("."))[2]: key for key in self.cache.load(path)}
            names |= {layer.parameter(number, rest): (path, (keys[rest],)) for rest in self._shapes(layer, number)}
        return names

    def _shapes(self, layer: MoeLayer, number: int) -> dict[str, tuple[int, ...]]:
        """By name inside the expert, without buffers."""
        named = map(split_name, self.model["buffer_names"])
        buffers = {parts[2] for parts in named if parts and parts[0] == layer.name}
        content = self.cache.load(self.files.weights[layer.number, number, 0])
        items = content.items() if isinstance(content, Mapping) else ()
        of_parts = ((split_name(str(key).lstrip(".")), value) for key, value in items)
        return {p[2]: tuple(v.shape) for p, v in of_parts if p and p[2] not in buffers and is_weight(v)}

    def _experts(self, ep: int) -> list[tuple[MoeLayer, int]]:
        """Of one expert-parallel rank."""
        return [
            (layer, ep * num_local + local)
            for layer in self.layers
            for num_local in [layer.num_experts // self.ep_size]
            for local in range(num_local)
        ]

    # -- parameters ---------------------------------------------------------------------------------------------

    def _infos(self, path: Path, optimizer: Any, weights: Mapping[str, Location]) -> dict[str, ParameterInfo]:
        """In the order of the indices. Refuses what does not fit the names, one by one."""
        groups = optimizer["param_groups"]
        owners = [number for number, group in enumerate(groups) for _ in group["params"]]
        indices = [index for group in groups for index in group["params"]]
        num_dense = sum(split_name(name) is None for name in weights)
        if indices != list(range(len(weights))) or len(groups[0]["params"]) != num_dense:
            self._refuse(
                "ZeRO-0 keeps the optimizer's state by index, and there are fewer than weights (frozen or tied ones)",
                f"{path.name}: {len(groups[0]['params'])} dense of {len(indices)} indices, {num_dense} dense of "
                f"{len(weights)} weights",
            )
        names, infos, faults = group_names(self.groups, {}), {}, []
        for index, (name, (file, key)) in enumerate(weights.items()):
            state = optimizer["state"].get(index, {})
            weight = self._weight(file, key)
            shape = tuple(weight.shape)
            tensors = {k: v for k, v in state.items() if is_tensor(v) and v.dim() > 0}
            faults += [
                f"{name}, index {index} in {path.name}: {k} is {tuple(v.shape)}, the weight {shape}"
                for k, v in tensors.items()
                if tuple(v.shape) != shape
            ]
            if str(weight.dtype) != "torch.float32":
                self._refuse("only ZeRO-0 in fp32 has its masters in the weights", f"{name}: {weight.dtype}")
            step = None if state.get(STEP) is None else float(state[STEP])
            infos[name] = ParameterInfo(
                Layout.unique(shape), names[owners[index]], ("fp32", *tensors), step, scalars=numbers_in(state)
            )
        if faults:
            self._refuse("ZeRO-0 keeps the optimizer's state by index, and it is not the order of the weights", faults)
        return infos

    def _weight(self, file: Path, key: tuple[str | int, ...]) -> Any:
        node = self.cache.load(file)
        for part in key:
            node = node[part]
        return node

    def _groups(self) -> dict[str, dict[str, Any]]:
        names = group_names(self.groups, {})
        return {name: group_values(group) for name, group in zip(names, self.groups, strict=True)}


def _checksum(states: Mapping[int, Mapping[str, Any]], indices: list[int]) -> int | None:
    """Of the smallest parameters' states; None where they are all zero."""
    tensors = [
        value
        for index in indices
        for _, value in sorted(states.get(index, {}).items())
        if is_tensor(value) and value.dim() > 0
    ]
    tensors = sorted(tensors, key=lambda value: value.numel())[:_NUM_COMPARED]
    if not any(bool(as_stored(value).array().any()) for value in tensors):
        return None
    return zlib.crc32(b"".join(as_stored(t).array().tobytes() for t in tensors))
