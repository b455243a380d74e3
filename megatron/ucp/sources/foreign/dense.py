"""Source: DeepSpeed's files without a ucp.json, understood from what they say about themselves. ZeRO-1 to 3; ZeRO-0
is read by zero0.py.

The model states list every parameter in the order in which it lies in the flat tensors (`param_shapes`),
so that names, shapes, groups and places follow; how tensor-parallel shards fit together is said by DeepSpeed's
patterns. What the files leave open is refused with the reason, never guessed. Of saves with experts moe.py has the
dense parameters read here.

    source = open_dense(Path("megatron_deepspeed/global_step100"), column_parallel=(r".*h_to_4h.*",))

Sources of these conventions: deepspeed/runtime/engine.py (_get_zero_param_shapes, _get_zero_frozen_param_attributes),
runtime/zero/stage3.py (_create_fp16_partitions_with_defragmentation, _rigid_state_dict), stage_1_and_2.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.ucp.affine_maps import AffineMaps
from megatron.ucp.deepspeed_compat import layout_from_patterns, refused_by_patterns
from megatron.ucp.errors import MissingFileError, SourceError, UnsupportedCheckpointError, listed
from megatron.ucp.layout import Layout, ShardRank
from megatron.ucp.manifest import Manifest, OptimizerInfo, ParameterInfo
from megatron.ucp.sources.deepspeed import DeepSpeedSource
from megatron.ucp.sources.flat_states import Fragment, Fragments
from megatron.ucp.sources.foreign.flat_order import flat_fragments, sub_groups
from megatron.ucp.sources.foreign.layer_files import Shapes, frozen_in_layers, is_weight
from megatron.ucp.sources.foreign.param_groups import group_values, names_or_numbers
from megatron.ucp.sources.foreign.save import NO_MANIFEST, ForeignSave, common_from_model_states, open_save
from megatron.ucp.sources.optimizer_file import OptimizerFile, numbers_in
from megatron.ucp.stored import as_stored, is_rounded, is_tensor, place_of

_NUM_COMPARED = 16


def open_dense(folder: Path, column_parallel: tuple[str, ...] = ()) -> DeepSpeedSource:
    """Opens every file. Raises, before any tensor is read, MissingFileError, CorruptFileError, SourceError (the files
    contradict each other) or UnsupportedCheckpointError."""
    save = open_save(folder)
    save.require_complete()
    models = {mp: save.model(mp) for mp in save.mp_ranks}
    if experts := {mp: content["num_experts"] for mp, content in models.items() if content.get("num_experts")}:
        raise MissingFileError(  # they have files of their own
            "no file of an expert (layer_*_expert_*_mp_rank_*_model_states.pt)",
            expected=[f"mp_rank {mp}: {numbers} experts" for mp, numbers in experts.items()],
            where=folder,
            do="bring the files of every node into this folder",
        )
    return checked_source(DenseReader(save, models, column_parallel))


def checked_source(reader: DenseReader) -> DeepSpeedSource:
    """Raises SourceError where the optimizer's states do not lie as its masters do."""
    source = reader.source(reader.manifest())
    if reader.save.zero_stage < 3:  # _sub_groups has checked those of ZeRO-3
        source.flat_states.check({name: info.states for name, info in source.manifest.parameters.items()})
    return source


class DenseReader:
    """Each method answers one question about a save. `models`: model states by mp_rank, of dense parameters only.
    `group_names`: of the optimizer's groups, by mp_rank, where they are not the names in the files. `experts`: layouts
    of what is cut over ep."""

    def __init__(
        self,
        save: ForeignSave,
        models: Mapping[int, Mapping[str, Any]],
        column_parallel: tuple[str, ...],
        group_names: Mapping[int, list[str]] | None = None,
        experts: Mapping[str, Layout] | None = None,
    ):
        self.experts = experts or {}
        self.save, self.models, self.column_parallel = save, models, column_parallel
        self.info = models[0].get("universal_checkpoint_info") or {}
        self.maps = AffineMaps.of(self.info)
        self.group_names = group_names or {mp: names_or_numbers(self._first(mp).param_groups()) for mp in models}

    def source(self, manifest: Manifest) -> DeepSpeedSource:
        """Raises SourceError where weights are not those of the masters."""
        corrections = {} if self.save.zero_stage == 3 else self._corrections()
        source = DeepSpeedSource(self.save.folder, manifest, corrections, self.save.cache)
        self._check_weights(source.fragments())
        return source

    def manifest(self) -> Manifest:
        trainable = self._by_stage(self._trainable_shapes())
        frozen = self._by_stage({mp: self._frozen_shapes(mp, trainable) for mp in self.models})
        frozen |= self._frozen_in_layers(trainable)
        layouts = self.layouts({**trainable, **frozen})
        order = {mp: self._flat_order(mp) for mp in self.models}
        parameters = self._parameters(layouts, trainable, order)
        for name, stages in frozen.items():
            parameters[name] = ParameterInfo(layouts[name], pp_stages=tuple(sorted(stages)), is_trainable=False)
        groups = [group for mp in self.models for group in self._groups(mp).items()]
        layers = self.save.files.layers
        layer_numbers = range(max((layer for layer, _ in layers), default=-1) + 1)
        return Manifest(
            kind="native",
            topology=self.save.topology,
            parameters=parameters,
            zero_stage=self.save.zero_stage,
            is_pipelined=self.save.is_pipelined,
            optimizer=OptimizerInfo(kind="", groups=dict(groups)),
            common=common_from_model_states(self.save.model(0)),
            zero3_order=[order[mp] for mp in self.models] if self.save.zero_stage == 3 else [],
            pipeline_layers=[str(i) if (i, 0) in layers else None for i in layer_numbers],
            saved_by={"deepspeed": str(self.models[0].get("ds_version", ""))},
            unverified=NO_MANIFEST,
        )

    def _check_weights(self, fragments: Fragments) -> None:
        """ZeRO-1 and 2 save the weights beside the masters they were rounded from: that shows a file of another step or
        run that agrees with the rest in all it says. The smallest parameters will do."""
        faults = set()
        for mp, content in self.models.items():
            module = content.get("module")
            if self.save.zero_stage == 3 or not isinstance(module, Mapping):
                continue
            masters = {file.path: file.masters() for file in self.save.optimizers(mp)}
            names = sorted(_trainable_shapes(content).items(), key=lambda item: math.prod(item[1]))[:_NUM_COMPARED]
            for name, shape in names:
                weight = module.get(name)
                if not is_weight(weight) or tuple(weight.shape) != shape:
                    continue
                for fragment in fragments[name, mp]:
                    end = fragment.offset + fragment.stop - fragment.start
                    master = as_stored(masters[fragment.file][fragment.group]).part(fragment.offset, end)
                    held = as_stored(weight).part(fragment.start, fragment.stop)
                    if not is_rounded(master, held):
                        faults.add(f"{self.save.files.model(mp).name} and {fragment.file.name}")
        if faults:
            raise SourceError(
                "the weights in one file are not those of the optimizer's states in another",
                found=faults,
                where=self.save.folder,
                do="bring together the files of one save of one run",
            )

    # -- parameters ---------------------------------------------------------------------------------------------

    def _by_stage(self, shapes: Mapping[int, Mapping[str, tuple[int, ...]]]) -> Shapes:
        by_stage: Shapes = {}
        for mp, table in shapes.items():
            for name, shape in table.items():
                by_stage.setdefault(name, {}).setdefault(mp // self.save.topology.tp_size, []).append(shape)
        return by_stage

    def _trainable_shapes(self) -> dict[int, dict[str, tuple[int, ...]]]:
        """By mp rank; with the empty shards of what other ranks train."""
        shapes = {mp: _trainable_shapes(content) for mp, content in self.models.items()}
        trained = {name for table in shapes.values() for name in table}
        for mp, table in shapes.items():
            empty = self.maps.empty_shards(mp % self.save.topology.tp_size)
            table |= {name: shape for name, shape in empty.items() if name in trained and name not in table}
        return shapes

    def _frozen_shapes(self, mp: int, trainable: Shapes) -> dict[str, tuple[int, ...]]:
        """DeepSpeed lists a rank's empty shards among its frozen parameters; they are not meant."""
        content, first = self.models[mp], self.models[0]
        if content.get("frozen_param_shapes") is not None:
            return {n: tuple(shape) for n, shape in content["frozen_param_shapes"].items() if n not in trainable}
        module = content.get("module")
        if self.save.zero_stage != 1 or not isinstance(module, Mapping) or "shared_params" not in first:
            return {}
        # ZeRO-1 has no list of them: they are what is in "module" and neither trained, a buffer nor another's alias, of
        # which DeepSpeed lists not all (one module under two names of the same parent).
        known = {*trainable, *content["buffer_names"], *first["shared_params"]}
        places = {place_of(module[name]) for name in trainable if is_weight(module.get(name))}
        return {
            name: tuple(value.shape)
            for name, value in module.items()
            if name not in known and is_weight(value) and not (value.numel() and place_of(value) in places)
        }

    def _frozen_in_layers(self, trainable: Shapes) -> Shapes:
        if any("buffer_names" not in content for content in self.models.values()):
            return {}
        buffers = {name for content in self.models.values() for name in content["buffer_names"]}
        layers = {key: self.save.cache.load(path) for key, path in self.save.files.layers.items()}
        return frozen_in_layers(layers, trainable, buffers)

    def layouts(self, shapes: Shapes) -> dict[str, Layout]:
        layouts = {
            name: self.experts.get(name)
            or self.maps.layout(name, stages[min(stages)])
            or layout_from_patterns(name, stages[min(stages)], self.info, self.column_parallel)
            for name, stages in shapes.items()
        }
        if refused := {name: why for name in shapes if (why := refused_by_patterns(name, self.info))}:
            raise UnsupportedCheckpointError(
                "DeepSpeed itself does not know how parameters are cut",
                found=[f"{name}: {why}" for name, why in refused.items()],
                where=self.save.folder,
            )
        if unnamed := [name for name, layout in layouts.items() if layout is None]:
            raise UnsupportedCheckpointError(
                f"{len(unnamed)} tensor-parallel parameter(s) match no pattern in universal_checkpoint_info",
                found=unnamed,
                where=self.save.folder,
                do="say which are cut along dimension 0: --column_parallel REGEX (repeatable; '.*' is DeepSpeed's "
                "default)",
            )
        wrong = []
        for name, stages in shapes.items():
            for shards in stages.values():
                for tp, found in enumerate(shards):
                    ep_size = self.save.topology.ep_size if name in self.experts else 1
                    expected = layouts[name].shard_shape(ShardRank(tp, len(shards), 0, ep_size))
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
            file = self._first(mp)
            group_of = file.flat_groups(len(tables))
            names_of_groups = self.group_names[mp] or [str(index) for index in range(len(tables))]
            for flat, names in enumerate(tables):
                state = file.state(flat)
                tensors = tuple(k for k, v in state.items() if is_tensor(v) and v.dim() > 0)
                for name in names:
                    parameters.setdefault(
                        name,
                        ParameterInfo(
                            layout=layouts[name],
                            group=names_of_groups[group_of[flat]],
                            states=("fp32", *tensors),
                            step=None if state.get("step") is None else float(state["step"]),
                            scalars=numbers_in(state),
                            pp_stages=tuple(sorted(trainable[name])),
                        ),
                    )
        return {name: parameters[name] for name in trainable}

    def _groups(self, mp: int) -> dict[str, dict[str, Any]]:
        """Hyper-parameters by the groups' names."""
        groups = self._first(mp).param_groups()
        return {name: group_values(group) for name, group in zip(self.group_names[mp], groups, strict=True)}

    def _first(self, mp: int) -> OptimizerFile:
        return self.save.optimizer(0, mp)

    # -- places in the flat tensors -----------------------------------------------------------------------------

    def _flat_order(self, mp: int) -> list[list[str]]:
        """The parameters of each flat tensor, in order."""
        return self._sub_groups(mp) if self.save.zero_stage == 3 else [list(t) for t in self.models[mp]["param_shapes"]]

    def _sub_groups(self, mp: int) -> list[list[str]]:
        """ZeRO-3 closes a flat tensor once it has `sub_group_size` elements, and at the end of a parameter group."""
        zero_size, ep_size = self.save.topology.zero_size, self.save.topology.ep_size
        lengths = {
            name: -(-math.prod(shape) // (zero_size // ep_size if name in self.experts else zero_size))
            for name, shape in _trainable_shapes(self.models[mp]).items()
        }
        order, faults = None, []
        for file in self.save.optimizers(mp):
            sizes = [flat.numel() for flat in file.masters()]
            order = sub_groups(lengths, sizes)
            if order is None or (file.has_partitions_of_its_own and not self.experts):
                faults.append(f"{file.path.name}: flat tensors of {sizes} elements")
                continue
            odd = _odd_states(file, sizes)
            if odd:
                faults.append(
                    f"{file.path.name}: the optimizer's states of flat tensors {odd} are missing or of another size"
                )
        if faults:
            raise UnsupportedCheckpointError(
                "the listed parameters do not fill ZeRO-3's flat tensors",
                found=faults,
                expected=f"{len(lengths)} parameters, {sum(lengths.values())} elements on each of {zero_size} ranks",
                where=self.save.folder,
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
            files = list(self.save.optimizers(mp))
            for group, shapes in enumerate(content["param_shapes"]):
                if shapes:
                    found = self.reordered(mp, group, shapes, files, faults)
                    corrections.update({(name, mp): fragments for name, fragments in found.items()})
        self.refuse_not_held(faults)
        return corrections

    def reordered(
        self, mp: int, group: int, shapes: Mapping[str, Any], files: Sequence[OptimizerFile], faults: list[str]
    ) -> dict[str, list[Fragment]]:
        """The places of a group's parameters in these files, its partitions; empty where their own tables are right."""
        lengths = {name: math.prod(shape) for name, shape in shapes.items()}
        tables = [file.tables[group] for file in files]
        order = list(dict.fromkeys(name for table in tables for name in sorted(table, key=table.__getitem__)))
        if order == list(lengths):
            return {}
        faults += [
            f"{file.path.name} holds {listed(set(table) - set(lengths))}"
            for file, table in zip(files, tables, strict=True)
            if not set(table) <= set(lengths)
        ]
        if missing := set(lengths) - set(order):
            faults.append(f"no file of mp_rank {mp} holds {listed(missing)} of {self.save.files.model(mp).name}")
        if not _may_be_reordered(self.models[mp]) and not faults:
            faults.append(f"mp_rank {mp}, group {group}: the parameters are in another order than listed")
        if faults:
            return {}
        first = files[0]
        paddings = first.alignment_paddings(group, len(lengths))
        partition = first.masters()[group].numel() + first.padding(group)
        return flat_fragments(lengths, paddings, partition, [file.path for file in files], group)

    def refuse_not_held(self, faults: list[str]) -> None:
        if faults:
            raise SourceError(
                "the optimizer states do not hold the parameters that the model states list",
                found=faults,
                where=self.save.folder,
                do="bring together the files of one save of one run",
            )


def _trainable_shapes(content: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """In the order of the flat tensors."""
    return {name: tuple(shape) for table in content["param_shapes"] for name, shape in table.items()}


def _odd_states(file: OptimizerFile, sizes: Sequence[int]) -> list[int]:
    """Flat tensors of ZeRO-3 whose optimizer states are of another size, or not those that the others have. Muon has
    groups of its own, with other states than the groups that it leaves to Adam."""
    is_muon = [file.is_muon(group) for group in file.flat_groups(len(sizes))]
    names = [set(file.state(flat)) for flat in range(len(sizes))]
    usual = {muon: names[is_muon.index(muon)] for muon in set(is_muon)}
    return [
        flat
        for flat, size in enumerate(sizes)
        if any(v.numel() != size for v in file.state(flat).values() if is_tensor(v) and v.dim() > 0)
        or names[flat] != usual[is_muon[flat]]
    ]


def _may_be_reordered(content: Mapping[str, Any]) -> bool:
    """DeepSpeed's configuration, where the file has it, says whether gradients went round robin."""
    config = content.get("ds_config")
    zero = config.get("zero_optimization", {}) if isinstance(config, Mapping) else {"round_robin_gradients": True}
    return bool(zero.get("round_robin_gradients"))
