"""Source: DeepSpeed's files without a ucp.json, understood from what they say about themselves. ZeRO-1 to 3; ZeRO-0
is read by foreign_zero0.py.

The model states list every parameter in the order in which it lies in the flat tensors (`param_shapes`),
so that names, shapes, groups and places follow; how tensor-parallel shards fit together is said by DeepSpeed's
patterns. What the files leave open is refused with the reason, never guessed. Saves with experts are read by
deepspeed_moe.py, which builds on this.

    source = open_foreign("megatron_deepspeed/global_step100", column_parallel=(r".*h_to_4h.*",))

Sources of these conventions: deepspeed/runtime/engine.py (_get_zero_param_shapes, _get_zero_frozen_param_attributes),
runtime/zero/stage3.py (_create_fp16_partitions_with_defragmentation, _rigid_state_dict), stage_1_and_2.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.ucp.deepspeed_compat import layout_from_patterns
from megatron.ucp.errors import CorruptFileError, MissingFileError, SourceError, UnsupportedCheckpointError, listed
from megatron.ucp.layout import Layout, ShardRank
from megatron.ucp.manifest import Manifest, OptimizerInfo, ParameterInfo
from megatron.ucp.sources.deepspeed import DeepSpeedSource
from megatron.ucp.sources.deepspeed_files import Files, find_files, list_files
from megatron.ucp.sources.flat_order import flat_fragments, sub_groups
from megatron.ucp.sources.flat_states import Fragment, Fragments
from megatron.ucp.sources.foreign_zero0 import open_zero0
from megatron.ucp.sources.layer_files import Shapes, frozen_in_layers, is_weight
from megatron.ucp.sources.one_save import require_one_save
from megatron.ucp.sources.param_groups import group_values, names_or_numbers
from megatron.ucp.sources.source import FileCache, Source
from megatron.ucp.sources.universal import NO_MANIFEST, common_from_model_states
from megatron.ucp.topology import Topology

_NUM_COMPARED = 16


def open_foreign(folder: str | Path, column_parallel: tuple[str, ...] = ()) -> Source:
    """Opens every file. Raises, before any tensor is read, MissingFileError, CorruptFileError, SourceError (the files
    contradict each other) or UnsupportedCheckpointError."""
    found = list_files(Path(folder))
    if found.models and not found.zeros:
        return open_zero0(Path(folder))
    return ForeignReader(Path(folder), column_parallel).source()


class ForeignReader:
    """One folder, all of its files opened; each method answers one question about it."""

    def __init__(self, folder: Path, column_parallel: tuple[str, ...]):
        self.folder, self.column_parallel, self.cache = folder, column_parallel, FileCache()
        found = list_files(Path(folder))
        self._check_kind(found)
        self._open_all((*found.zeros.values(), *found.models.values(), *found.layers.values()))
        first = self.cache.load(found.zeros[min(found.zeros)])["optimizer_state_dict"]
        self.stage = int(first.get("zero_stage", 1))
        self.topology = self._topology(found, first)
        require_one_save(folder, self.cache, found, self.topology.tp_size)
        self.files = self._complete(found)
        self.models = {mp: self.cache.load(self.files.model(mp)) for mp in range(self.num_mp)}
        self.is_pipelined = bool(self.files.layers)
        self._check_experts_are_there()

    @property
    def num_mp(self) -> int:
        return self.topology.pp_size * self.topology.tp_size

    def source(self) -> Source:
        manifest = self.manifest()
        source = DeepSpeedSource(self.folder, manifest, {} if self.stage == 3 else self._corrections(), self.cache)
        self._check_weights(source.fragments())
        if self.stage < 3:  # _sub_groups has checked those of ZeRO-3
            source.flat_states.check({name: info.states for name, info in manifest.parameters.items()})
        return source

    def manifest(self) -> Manifest:
        trainable = self._by_stage({mp: _trainable_shapes(content) for mp, content in self.models.items()})
        frozen = self._by_stage({mp: self._frozen_shapes(mp) for mp in self.models}) | self._frozen_in_layers(trainable)
        layouts = self._layouts({**trainable, **frozen})
        order = {mp: self._flat_order(mp) for mp in self.models}
        parameters = self._parameters(layouts, trainable, order)
        for name, stages in frozen.items():
            parameters[name] = ParameterInfo(layouts[name], pp_stages=tuple(sorted(stages)), is_trainable=False)
        groups = [group for mp in self.models for group in self._groups(mp).items()]
        layer_numbers = range(max((layer for layer, _ in self.files.layers), default=-1) + 1)
        return Manifest(
            kind="native",
            topology=self.topology,
            parameters=parameters,
            zero_stage=self.stage,
            is_pipelined=self.is_pipelined,
            optimizer=OptimizerInfo(kind="", groups=dict(groups)),
            common=common_from_model_states([self.files.model(0)]),
            zero3_order=[order[mp] for mp in self.models] if self.stage == 3 else [],
            pipeline_layers=[str(i) if (i, 0) in self.files.layers else None for i in layer_numbers],
            saved_by={"deepspeed": str(self.models[0].get("ds_version", ""))},
            unverified=NO_MANIFEST,
        )

    # -- are these the files of one save? -----------------------------------------------------------------------

    def _check_kind(self, found: Files) -> None:
        if not found.models:
            raise MissingFileError("no model states (*mp_rank_*_model_states.pt)", where=self.folder)

    def _complete(self, found: Files) -> Files:
        return find_files(self.folder, Manifest("native", self.topology, {}, zero_stage=self.stage))

    def _check_experts_are_there(self) -> None:
        """They have files of their own, by which open_source would have known them."""
        if experts := {mp: content["num_experts"] for mp, content in self.models.items() if content.get("num_experts")}:
            raise MissingFileError(
                "no file of an expert (layer_*_expert_*_mp_rank_*_model_states.pt)",
                expected=[f"mp_rank {mp}: {numbers} experts" for mp, numbers in experts.items()],
                where=self.folder,
                do="bring the files of every node into this folder",
            )

    def _open_all(self, paths: Iterable[Path]) -> None:
        unreadable = {}
        for path in paths:
            try:
                self.cache.load(path)
            except CorruptFileError as error:
                unreadable[path.name] = error
        if unreadable:
            raise CorruptFileError(
                f"{len(unreadable)} file(s) cannot be read ({min(unreadable.items())[1].what})",
                found=list(unreadable),
                where=self.folder,
                do="copy them again from where they were saved",
            )

    def _topology(self, found: Files, first: Mapping[str, Any]) -> Topology:
        content = self.cache.load(found.models[min(found.models)])
        sizes = content.get("checkpoint_parallel_dimensions") or {}
        num_mp = max(mp for _, mp in (*found.models, *found.zeros)) + 1
        tp_size = int(sizes.get("tp_degree") or content.get("mp_world_size") or num_mp)
        count = first.get("partition_count") or max(z for z, _ in found.zeros) + 1
        return Topology(
            tp_size=tp_size,
            pp_size=int(sizes.get("pp_degree") or -(-num_mp // tp_size)),
            dp_size=max(count) if isinstance(count, (list, tuple)) else int(count),
        )

    def _check_weights(self, fragments: Fragments) -> None:
        """ZeRO-1 and 2 save the weights beside the masters they were rounded from: that shows a file of another step or
        run that agrees with the rest in all it says. The smallest parameters will do."""
        faults = set()
        for mp, content in self.models.items():
            module = content.get("module")
            if self.stage == 3 or not isinstance(module, Mapping):
                continue
            names = sorted(_trainable_shapes(content).items(), key=lambda item: math.prod(item[1]))[:_NUM_COMPARED]
            for name, shape in names:
                weight = module.get(name)
                if not is_weight(weight) or tuple(weight.shape) != shape:
                    continue
                for part in fragments[name, mp]:
                    flats = self.cache.load(part.file)["optimizer_state_dict"]["single_partition_of_fp32_groups"]
                    master = flats[part.group].flatten()[part.offset : part.offset + part.stop - part.start]
                    held = weight.flatten()[part.start : part.stop]
                    if not torch.equal(master.to(held.dtype).nan_to_num(), held.nan_to_num()):
                        faults.add(f"{self.files.model(mp).name} and {part.file.name}")
        if faults:
            raise SourceError(
                "the weights in one file are not those of the optimizer's states in another",
                found=faults,
                where=self.folder,
                do="bring together the files of one save of one run",
            )

    # -- parameters ---------------------------------------------------------------------------------------------

    def _by_stage(self, shapes: Mapping[int, Mapping[str, tuple[int, ...]]]) -> Shapes:
        by_stage: Shapes = {}
        for mp, table in shapes.items():
            for name, shape in table.items():
                by_stage.setdefault(name, {}).setdefault(mp // self.topology.tp_size, []).append(shape)
        return by_stage

    def _frozen_shapes(self, mp: int) -> dict[str, tuple[int, ...]]:
        content, first = self.models[mp], self.models[0]
        if content.get("frozen_param_shapes") is not None:
            return {name: tuple(shape) for name, shape in content["frozen_param_shapes"].items()}
        module = content.get("module")
        if self.stage != 1 or not isinstance(module, Mapping) or "shared_params" not in first:
            return {}
        # ZeRO-1 has no list of them: they are what is in "module" and neither trained, a buffer nor another's alias.
        known = {*_trainable_shapes(content), *content["buffer_names"], *first["shared_params"]}
        return {name: tuple(value.shape) for name, value in module.items() if name not in known and is_weight(value)}

    def _frozen_in_layers(self, trainable: Shapes) -> Shapes:
        if any("buffer_names" not in content for content in self.models.values()):
            return {}
        buffers = {name for content in self.models.values() for name in content["buffer_names"]}
        layers = {key: self.cache.load(path) for key, path in self.files.layers.items()}
        return frozen_in_layers(layers, trainable, buffers)

    def _layouts(self, shapes: Shapes) -> dict[str, Layout]:
        info = self.models[0].get("universal_checkpoint_info") or {}
        layouts = {
            name: layout_from_patterns(name, stages[min(stages)], info, self.column_parallel)
            for name, stages in shapes.items()
        }
        if unnamed := [name for name, layout in layouts.items() if layout is None]:
            raise UnsupportedCheckpointError(
                f"{len(unnamed)} tensor-parallel parameter(s) match no pattern in universal_checkpoint_info",
                found=unnamed,
                where=self.folder,
                do="say which are cut along dimension 0: --column_parallel REGEX (repeatable; '.*' is DeepSpeed's "
                "default)",
            )
        wrong = []
        for name, stages in shapes.items():
            for shards in stages.values():
                for tp, found in enumerate(shards):
                    expected = layouts[name].shard_shape(ShardRank(tp, len(shards)))
                    if found != expected:
                        wrong.append(f"{name}: tp rank {tp} holds {found}, the patterns say {expected}")
        if wrong:
            raise UnsupportedCheckpointError("shards do not have the shapes that their patterns call for", found=wrong)
        return layouts

    def _parameters(
        self, layouts: Mapping[str, Layout], trainable: Shapes, order: Mapping[int, list[list[str]]]
    ) -> dict[str, ParameterInfo]:
        parameters: dict[str, ParameterInfo] = {}
        for mp, tables in order.items():
            base = self._base_state(self.files.zeros[0, mp])
            group_of = _flat_to_group(base, len(tables))
            names_of_groups = self._group_names(mp) or [str(index) for index in range(len(tables))]
            for flat, names in enumerate(tables):
                state = base[flat] if isinstance(base, list) else base["state"].get(flat, {})
                tensors = tuple(k for k, v in state.items() if torch.is_tensor(v) and v.dim() > 0)
                for name in names:
                    parameters.setdefault(
                        name,
                        ParameterInfo(
                            layout=layouts[name],
                            group=names_of_groups[group_of[flat]],
                            states=("fp32", *tensors),
                            step=None if state.get("step") is None else float(state["step"]),
                            pp_stages=tuple(sorted(trainable[name])),
                        ),
                    )
        return {name: parameters[name] for name in trainable}

    def _groups(self, mp: int) -> dict[str, dict[str, Any]]:
        """Hyper-parameters by the groups' names."""
        return {
            name: group_values(group) for name, group in zip(self._group_names(mp), self._param_groups(mp), strict=True)
        }

    def _group_names(self, mp: int) -> list[str]:
        """Experts' groups are named otherwise: deepspeed_moe.py."""
        return names_or_numbers(self._param_groups(mp))

    def _param_groups(self, mp: int) -> list[dict[str, Any]]:
        base = self._base_state(self.files.zeros[0, mp])
        return [] if isinstance(base, list) else base["param_groups"]

    def _base_state(self, file: Path) -> Any:
        optimizer = self.cache.load(file)["optimizer_state_dict"]
        return optimizer["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]

    # -- places in the flat tensors -----------------------------------------------------------------------------

    def _flat_order(self, mp: int) -> list[list[str]]:
        """The parameters of each flat tensor, in order."""
        return self._sub_groups(mp) if self.stage == 3 else [list(t) for t in self.models[mp]["param_shapes"]]

    def _optimizers(self, mp: int) -> Iterator[tuple[Path, Mapping[str, Any]]]:
        for (_, number), file in self.files.zeros.items():
            if number == mp:
                yield file, self.cache.load(file)["optimizer_state_dict"]

    def _sub_groups(self, mp: int) -> list[list[str]]:
        """ZeRO-3 closes a flat tensor once it has `sub_group_size` elements, and at the end of a parameter group."""
        zero_size = self.topology.zero_size
        lengths = {n: -(-math.prod(shape) // zero_size) for n, shape in _trainable_shapes(self.models[mp]).items()}
        order, faults = None, []
        for file, optimizer in self._optimizers(mp):
            sizes = [flat.numel() for flat in optimizer["fp32_flat_groups"]]
            order = sub_groups(lengths, sizes)
            if order is None or optimizer.get("ds_zero_partition_groups"):
                faults.append(f"{file.name}: flat tensors of {sizes} elements")
                continue
            odd = _odd_states(optimizer["optimizer_state_dict"], sizes)
            if odd:
                faults.append(
                    f"{file.name}: the optimizer's states of flat tensors {odd} are missing or of another size"
                )
        if faults:
            raise UnsupportedCheckpointError(
                "the listed parameters do not fill ZeRO-3's flat tensors",
                found=faults,
                expected=f"{len(lengths)} parameters, {sum(lengths.values())} elements on each of {zero_size} ranks",
                where=self.folder,
                do="states kept on NVMe or in a second optimizer (partial offload) and ranks that share a partition "
                "(MiCS, AutoEP) are not in these files: save again without them",
            )
        return order

    def _corrections(self) -> Fragments:
        """What to believe instead of the files' own tables, which are wrong where the order of the parameters in them
        is not that of the flat tensors."""
        corrections: Fragments = {}
        faults: list[str] = []
        for mp, content in self.models.items():
            files = [file for file, _ in self._optimizers(mp)]
            for group, shapes in enumerate(content["param_shapes"]):
                if shapes:
                    found = self._reordered(mp, group, shapes, files, faults)
                    corrections.update({(name, mp): fragments for name, fragments in found.items()})
        self._refuse_not_held(faults)
        return corrections

    def _reordered(
        self, mp: int, group: int, shapes: Mapping[str, Any], files: Sequence[Path], faults: list[str]
    ) -> dict[str, list[Fragment]]:
        """The places of a group's parameters in these files, its partitions; empty where their own tables are right."""
        lengths = {name: math.prod(shape) for name, shape in shapes.items()}
        optimizers = [self.cache.load(file)["optimizer_state_dict"] for file in files]
        tables = [optimizer["param_slice_mappings"][group] for optimizer in optimizers]
        order = dict.fromkeys(n for t in tables for n in sorted(t, key=lambda name, t=t: t[name].start))  # type: ignore[misc]
        if list(order) == list(lengths):
            return {}
        faults += [
            f"{file.name} holds {listed(set(table) - set(lengths))}"
            for file, table in zip(files, tables, strict=True)
            if not set(table) <= set(lengths)
        ]
        if missing := set(lengths) - set(order):
            faults.append(f"no file of mp_rank {mp} holds {listed(missing)} of {self.files.model(mp).name}")
        if not _may_be_reordered(self.models[mp]) and not faults:
            faults.append(f"mp_rank {mp}, group {group}: the parameters are in another order than listed")
        if faults:
            return {}
        paddings = optimizers[0].get("param_alignment_paddings", {group: [0] * len(lengths)})[group]
        flat = optimizers[0]["single_partition_of_fp32_groups"][group]
        partition = flat.numel() + int(optimizers[0]["group_paddings"][group])
        return flat_fragments(lengths, paddings, partition, files, group)

    def _refuse_not_held(self, faults: list[str]) -> None:
        if faults:
            raise SourceError(
                "the optimizer states do not hold the parameters that the model states list",
                found=faults,
                where=self.folder,
                do="bring together the files of one save of one run",
            )


def _trainable_shapes(content: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """In the order of the flat tensors."""
    return {name: tuple(shape) for table in content["param_shapes"] for name, shape in table.items()}


def _flat_to_group(base: Any, num_flats: int) -> list[int]:
    """The parameter group of each flat tensor: ZeRO-3 has several to a group, ZeRO-1 and 2 one."""
    groups = [] if isinstance(base, list) else base["param_groups"]
    owner = {flat: index for index, group in enumerate(groups) for flat in group["params"]}
    return [owner.get(flat, flat) for flat in range(num_flats)]


def _odd_states(base: Mapping[str, Any], sizes: Sequence[int]) -> list[int]:
    """Flat tensors of ZeRO-3 whose optimizer states are of another size, or not those that the others have. Muon has
    groups of its own, with other states than the groups that it leaves to Adam."""
    states, groups = base["state"], base["param_groups"]
    is_muon = [bool(groups[i].get("use_muon")) if i < len(groups) else False for i in _flat_to_group(base, len(sizes))]
    names = [set(states.get(flat, {})) for flat in range(len(sizes))]
    usual = {kind: names[is_muon.index(kind)] for kind in set(is_muon)}
    return [
        flat
        for flat, size in enumerate(sizes)
        if any(v.numel() != size for v in states.get(flat, {}).values() if torch.is_tensor(v) and v.dim() > 0)
        or names[flat] != usual[is_muon[flat]]
    ]


def _may_be_reordered(content: Mapping[str, Any]) -> bool:
    """DeepSpeed's configuration, where the file has it, says whether gradients went round robin."""
    config = content.get("ds_config")
    zero = config.get("zero_optimization", {}) if isinstance(config, Mapping) else {"round_robin_gradients": True}
    return bool(zero.get("round_robin_gradients"))
