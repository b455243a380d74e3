"""Source: stock saves with experts of deepspeed.moe.layer.MoE, without a ucp.json.

Dense parameters are read as in every foreign folder (dense.py). Expert e of a layer is a parameter for itself, under
its number in the whole layer; the optimizer's files know it by its number within a rank, so which ranks hold it is
worked out from DeepSpeed's groups (expert_ranks.py) and then held against the weights in the experts' own files
(expert_weights.py). ZeRO-1, ZeRO-2 and BF16_Optimizer here, ZeRO-0 in moe_zero0.py.

    source = open_moe(Path("run/global_step100"))
    source.pieces("layers.1.moe.deepspeed_moe.experts.deepspeed_experts.3.up.weight", "exp_avg")

What it cannot see: weights and masters that were exchanged alike.
Source of these conventions: deepspeed/runtime/engine.py (_save_moe_checkpoint), runtime/zero/stage_1_and_2.py
(_configure_moe_settings: partition_count, real_dp_process_group), moe/utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron.ucp.errors import MissingFileError, SourceError, UnsupportedCheckpointError, listed
from megatron.ucp.layout import Layout
from megatron.ucp.manifest import ParameterInfo
from megatron.ucp.sources.deepspeed import DeepSpeedSource
from megatron.ucp.sources.flat_states import Fragment, append_fragment
from megatron.ucp.sources.foreign.dense import DenseReader
from megatron.ucp.sources.foreign.expert_files import (
    MoeLayer,
    content_faults,
    list_expert_files,
    moe_layers,
    require_expert_files,
    split_name,
    without_experts,
)
from megatron.ucp.sources.foreign.expert_ranks import ExpertRanks, ranks_of_experts
from megatron.ucp.sources.foreign.expert_source import STEP, ExpertFragment, MoeSource
from megatron.ucp.sources.foreign.expert_weights import weight_faults
from megatron.ucp.sources.foreign.layer_files import is_weight
from megatron.ucp.sources.foreign.param_groups import Seen, group_names
from megatron.ucp.sources.foreign.save import open_all, open_save
from megatron.ucp.sources.optimizer_file import OptimizerFile, numbers_in
from megatron.ucp.stored import is_tensor


def open_moe(folder: Path, column_parallel: tuple[str, ...] = ()) -> MoeSource:
    """Opens every file. Raises, before any tensor is read, MissingFileError, CorruptFileError, SourceError (the files
    contradict each other) or UnsupportedCheckpointError; where it is about experts, with their layers and numbers."""
    return _ExpertReader(folder, column_parallel).source()


@dataclass
class _Expert:
    """One parameter of one expert."""

    layer: MoeLayer
    number: int
    rest: str
    pp: int
    group: int | None
    """None: frozen."""
    shards: list[tuple[int, ...]] = field(default_factory=list)
    """Shapes, by tp shard."""
    fragments: list[ExpertFragment] = field(default_factory=list)


class _ExpertReader:
    """Reads the experts of a save, and has `dense` read the rest."""

    def __init__(self, folder: Path, column_parallel: tuple[str, ...]):
        self.folder = folder
        self.expert_files = list_expert_files(folder)
        self.save = open_save(folder, _partition_counts_of_dense)
        self.cache, self.topology = self.save.cache, self.save.topology
        self._require_complete()
        open_all(folder, self.cache, self.expert_files.weights.values())
        self.models = {mp: self.save.model(mp) for mp in self.save.mp_ranks}
        self.listed = {mp: _listed_experts(content) for mp, content in self.models.items()}
        seen: Seen = {}
        self.group_names = {mp: group_names(self.save.optimizer(0, mp).param_groups(), seen) for mp in self.models}
        without = {mp: without_experts(content) for mp, content in self.models.items()}
        self.dense = DenseReader(self.save, without, column_parallel, self.group_names)
        self.layers: dict[int, list[MoeLayer]] = {}
        self.ranks: dict[int, dict[int, ExpertRanks]] = {}
        for pp in range(self.topology.pp_size):
            self.layers[pp], self.ranks[pp] = self._stage(pp)

    def source(self) -> MoeSource:
        self._check_expert_files()
        experts = {**self._trained(), **self._frozen()}
        self._check_expert_weights(experts)
        dense = self._dense_source()
        layouts = self._expert_layouts(experts)
        infos = {name: self._info(expert, layouts[name]) for name, expert in experts.items()}
        ep_size = max((ranks.ep_size for of_stage in self.ranks.values() for ranks in of_stage.values()), default=1)
        # Without expert tensor parallelism DeepSpeed's groups may span tp, which no topology of ours says.
        topology = self.topology if self.topology.zero_size % ep_size else replace(self.topology, ep_size=ep_size)
        parameters = {**dense.manifest.parameters, **infos}
        manifest = replace(dense.manifest, topology=topology, parameters=parameters, fragments={})
        fragments = {name: expert.fragments for name, expert in experts.items()}
        return MoeSource(self.folder, manifest, dense, fragments, self.cache)

    # -- what there has to be -----------------------------------------------------------------------------------

    def _stage(self, pp: int) -> tuple[list[MoeLayer], dict[int, ExpertRanks]]:
        tp_size = self.topology.tp_size
        path, content = self.save.files.model(pp * tp_size), self.save.model(pp * tp_size)
        layers = moe_layers(content, path)
        files = (file for tp in range(tp_size) for file in self.save.optimizers(pp * tp_size + tp))
        return layers, ranks_of_experts(content, next(files), layers, self.topology, path)

    def _require_complete(self) -> None:
        try:
            self.save.require_complete()
        except MissingFileError as error:
            if lost := self._experts_of_missing():
                raise MissingFileError(
                    f"{error.what}, with the optimizer's states of experts",
                    found=f"{error.found}; in them: {'; '.join(lost[:20])}",
                    expected=error.expected,
                    where=error.where,
                    do=error.do,
                ) from None
            raise

    def _experts_of_missing(self) -> list[str]:
        found, tp_size = self.save.files, self.topology.tp_size
        lost: dict[str, None] = {}
        stages = {pp for pp in range(self.topology.pp_size) if (0, pp * tp_size) in found.models}
        for pp in sorted(stages & {mp // tp_size for _, mp in found.zeros}):
            layers, ranks_of = self._stage(pp)
            for z in range(self.topology.zero_size):
                for tp in range(tp_size):
                    for layer in layers if (z, pp * tp_size + tp) not in found.zeros else []:
                        if ranks := ranks_of.get(layer.number):
                            num_local = layer.num_experts // ranks.ep_size
                            first = ranks.ep_rank(z, tp) * num_local
                            lost |= dict.fromkeys(layer.title(n) for n in range(first, first + num_local))
        return list(lost)

    def _weight_files(self, pp: int, layer: MoeLayer, number: int) -> list[Path]:
        """The file of an expert for each of its tp shards. The first rank that holds one has written it."""
        return [self.expert_files.weights[layer.number, number, mp] for mp in self._writers(pp, layer, number)]

    def _writers(self, pp: int, layer: MoeLayer, number: int) -> list[int]:
        ranks = self.ranks[pp].get(layer.number)
        tp_size = self.topology.tp_size
        if ranks is None:
            if tp_size > 1:
                raise UnsupportedCheckpointError(
                    f"nothing of the experts of layer {layer.number} ({layer.name}) is trained, so that under tensor "
                    "parallelism the files do not say how they are cut",
                    where=self.folder,
                )
            return [pp]
        holders = ranks.holders(number // (layer.num_experts // ranks.ep_size))
        return [pp * tp_size + shard[0][1] for shard in holders]

    def _check_expert_files(self) -> None:
        expected = {
            (layer.number, number, mp): (layer, pp)
            for pp, layers in self.layers.items()
            for layer in layers
            for number in range(layer.num_experts)
            for mp in self._writers(pp, layer, number)
        }
        require_expert_files(self.folder, self.expert_files, {key: layer for key, (layer, _) in expected.items()})
        faults = []
        for (_, number, mp), (layer, pp) in sorted(expected.items(), key=lambda item: item[0]):
            ranks = self.ranks[pp].get(layer.number)
            num_local = layer.num_experts // ranks.ep_size if ranks else layer.num_experts
            trained = self.listed[mp].get((layer.name, number % num_local), {})
            path = self.expert_files.weights[layer.number, number, mp]
            faults += content_faults(layer, number, path, self.cache.load(path), trained)
        if faults:
            raise SourceError(
                "files of experts do not hold the expert that their name says",
                found=faults,
                where=self.folder,
                do="copy them again from where they were saved, under the names that they had",
            )

    # -- parameters ---------------------------------------------------------------------------------------------

    def _dense_source(self) -> DeepSpeedSource:
        """With the tables of the dense parameters as the manifest's, for the files' own list experts too."""
        rows: dict[str, list[list[int]]] = {}
        for mp in self.models:
            for z, file in enumerate(self.save.optimizers(mp)):
                for group, table in enumerate(file.tables):
                    for name, (offset, numel) in table.items():
                        if not split_name(name):
                            rows.setdefault(name, []).append([mp, z, group, offset, numel])
        return self.dense.source(replace(self.dense.manifest(), fragments=rows))

    def _trained(self) -> dict[str, _Expert]:
        """By global name: what the optimizer's files hold of the experts."""
        experts: dict[str, _Expert] = {}
        faults: list[str] = []
        for pp, layers in self.layers.items():
            by_name = {layer.name: layer for layer in layers}
            for group, ranks in self._expert_groups(pp, by_name):
                for ep_rank in range(ranks.ep_size):
                    for tp, holders in enumerate(ranks.holders(ep_rank)):
                        self._collect(experts, faults, by_name, (pp, group), ep_rank, tp, holders)
        self.dense.refuse_not_held(faults)
        return experts

    def _expert_groups(self, pp: int, layers: Mapping[str, MoeLayer]) -> Iterator[tuple[int, ExpertRanks]]:
        mp = pp * self.topology.tp_size
        for group, table in enumerate(self.models[mp]["param_shapes"]):
            found = {self.ranks[pp][layers[parts[0]].number] for name in table if (parts := split_name(name))}
            if len(found) > 1 or (found and not all(map(split_name, table))):
                raise UnsupportedCheckpointError(
                    "a parameter group holds experts beside dense parameters, or of several expert parallelisms",
                    found=f"group {group} of mp_rank {mp}: {listed(table, 4)}",
                    where=self.folder,
                    do="use split_params_into_different_moe_groups_for_optimizer",
                )
            if found:
                yield group, found.pop()

    def _collect(
        self,
        experts: dict[str, _Expert],
        faults: list[str],
        layers: Mapping[str, MoeLayer],
        pp_group: tuple[int, int],
        ep_rank: int,
        tp: int,
        holders: Sequence[tuple[int, int]],
    ) -> None:
        """Adds what one group has of tp shard `tp` of the experts of one expert-parallel rank."""
        pp, group = pp_group
        first_mp = pp * self.topology.tp_size
        shapes = self.models[first_mp + tp]["param_shapes"][group]
        files = [self.save.optimizer(z, first_mp + t) for z, t in holders]
        by_path = {file.path: file for file in files}
        found = self.dense.reordered(first_mp + tp, group, shapes, files, faults) or _own_fragments(files, group)
        for name, shape in shapes.items():
            layer_name, local, rest = split_name(name)
            layer = layers[layer_name]
            number = ep_rank * (layer.num_experts // self.ranks[pp][layer.number].ep_size) + local
            expert = experts.setdefault(layer.parameter(number, rest), _Expert(layer, number, rest, pp, group))
            expert.shards.append(tuple(shape))
            fragments = found.get(name, [])
            expert.fragments += [_expert_fragment(tp, fragment, by_path[fragment.file]) for fragment in fragments]
            num_found = sum(fragment.stop - fragment.start for fragment in fragments)
            if num_found != math.prod(shape):
                names = listed(file.path.name for file in files)
                faults.append(f"{layer.title(number)}: {num_found} of {math.prod(shape)} elements of {rest} in {names}")

    def _frozen(self) -> dict[str, _Expert]:
        """What the experts' files hold beside what is trained; buffers are no parameters."""
        experts: dict[str, _Expert] = {}
        for pp, layers in self.layers.items():
            mp = pp * self.topology.tp_size
            for layer in layers if "buffer_names" in self.models[mp] else []:
                trained = {
                    rest for (name, _), shapes in self.listed[mp].items() if name == layer.name for rest in shapes
                }
                names = map(split_name, self.models[mp]["buffer_names"])
                buffers = {parts[2] for parts in names if parts and parts[0] == layer.name}
                for number in range(layer.num_experts):
                    for tp, path in enumerate(self._weight_files(pp, layer, number)):
                        for key, value in self.cache.load(path).items():
                            rest = split_name(key.lstrip("."))[2]
                            if rest in trained | buffers or not is_weight(value):
                                continue
                            expert = _Expert(layer, number, rest, pp, None)
                            expert = experts.setdefault(layer.parameter(number, rest), expert)
                            expert.shards.append(tuple(value.shape))
                            expert.fragments.append(ExpertFragment(tp, 0, value.numel(), 0, {"fp32": (path, (key,))}))
        return experts

    def _expert_layouts(self, experts: Mapping[str, _Expert]) -> dict[str, Layout]:
        """Experts that tensor parallelism does not cut are whole, whatever patterns are meant for dense layers."""
        whole = {name for name, e in experts.items() if len(e.shards) < self.topology.tp_size}
        cut = self.dense.layouts({name: {e.pp: e.shards} for name, e in experts.items() if name not in whole})
        return {name: cut[name] if name in cut else Layout.unique(e.shards[0]) for name, e in experts.items()}

    def _info(self, expert: _Expert, layout: Layout) -> ParameterInfo:
        if expert.group is None:
            return ParameterInfo(layout, pp_stages=(expert.pp,), is_trainable=False)
        file, _ = expert.fragments[0].locations["fp32"]
        state = OptimizerFile.open(self.cache, file, self.save.zero_stage).state(expert.group)
        names = self.group_names[expert.pp * self.topology.tp_size]
        return ParameterInfo(
            layout=layout,
            group=names[expert.group] if names else str(expert.group),
            states=("fp32", *(key for key, value in state.items() if _is_cut(value))),
            step=None if state.get(STEP) is None else float(state[STEP]),
            scalars=numbers_in(state),
            pp_stages=(expert.pp,),
        )

    def _check_expert_weights(self, experts: Mapping[str, _Expert]) -> None:
        faults = []
        for pp, layers in self.layers.items():
            for layer in layers:
                masters: dict[int, dict[str, list[ExpertFragment]]] = {}
                weights: dict[int, dict[tuple[str, int], tuple[Path, str]]] = {}
                for expert in experts.values():
                    if expert.layer is layer and expert.group is not None:
                        masters.setdefault(expert.number, {})[expert.rest] = expert.fragments
                for number in masters:
                    files = enumerate(self._weight_files(pp, layer, number))
                    weights[number] = {
                        (split_name(key.lstrip("."))[2], tp): (path, key)
                        for tp, path in files
                        for key in self.cache.load(path)
                    }
                faults += weight_faults(self.cache, layer, masters, weights)
        if faults:
            raise SourceError(
                "the weights of experts are not those of the optimizer's states",
                found=faults,
                where=self.folder,
                do="bring together the files of one save of one run, under the names that they had",
            )


def _listed_experts(content: Mapping[str, Any]) -> dict[tuple[str, int], dict[str, tuple[int, ...]]]:
    """(layer's name, number within the rank) -> shapes by name inside, of all that is trained."""
    found: dict[tuple[str, int], dict[str, tuple[int, ...]]] = {}
    for table in content["param_shapes"]:
        for name, shape in table.items():
            if parts := split_name(name):
                found.setdefault(parts[:2], {})[parts[2]] = tuple(shape)
    return found


def _partition_counts_of_dense(content: Mapping[str, Any], optimizer: OptimizerFile) -> list[int] | int:
    """Groups of experts are cut over fewer ranks than those of dense parameters or, with tensor parallelism, over
    more. Raises UnsupportedCheckpointError."""
    if optimizer.is_stage3:
        raise UnsupportedCheckpointError(
            "ZeRO-3 with files of experts is AutoEP's, and only experts of deepspeed.moe.layer.MoE are read",
            where=optimizer.path.parent,
            do="convert it with DeepSpeed's own ds_to_universal",
        )
    tables, counts = content.get("param_shapes"), optimizer.partition_counts()
    if not tables or not isinstance(counts, (list, tuple)) or len(counts) != len(tables):
        raise UnsupportedCheckpointError(
            "files of experts, but no partition_count for each group of param_shapes",
            found=f"{len(tables or ())} group(s), partition_count {counts}",
            where=optimizer.path.parent,
            do="DeepSpeed under ZeRO-0 with bf16 writes no param_shapes: save again under ZeRO-1",
        )
    dense = [n for n, table in zip(counts, tables, strict=True) if any(not split_name(name) for name in table)]
    return dense or int(content["dp_world_size"])


def _own_fragments(files: Sequence[OptimizerFile], group: int) -> dict[str, list[Fragment]]:
    """From the tables of the files, the partitions of one group in order."""
    found: dict[str, list[Fragment]] = {}
    for file in files:
        for name, (offset, numel) in file.tables[group].items():
            append_fragment(found.setdefault(name, []), file.path, group, offset, numel)
    return found


def _expert_fragment(tp: int, fragment: Fragment, file: OptimizerFile) -> ExpertFragment:
    states = file.state(fragment.group).items()
    names = ["fp32", *(name for name, value in states if _is_cut(value) or name == STEP)]
    locations = {name: (file.path, file.key(fragment.group, name)) for name in names}
    return ExpertFragment(tp, fragment.start, fragment.stop, fragment.offset, locations)


def _is_cut(value: Any) -> bool:
    return is_tensor(value) and value.dim() > 0
