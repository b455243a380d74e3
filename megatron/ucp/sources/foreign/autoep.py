"""Source: saves of AutoEP, DeepSpeed's expert parallelism for models that it did not write. ZeRO-1 to 3.

AutoEP keeps the experts of a layer in one tensor, [experts, ...], of which a rank has some, so that they lie
in the flat tensors like any parameter that is cut over ep. How they are dealt out is said by affine maps in the model
states. Masters are read; the weights of experts, in files of their own under ZeRO-1 and 2, were rounded from them.

    source = open_autoep(Path("run/global_step100"), list_files(Path("run/global_step100")))

Sources of these conventions: deepspeed/runtime/engine.py (_save_moe_checkpoint), checkpoint/autoep_affine.py,
runtime/zero/stage3.py (_zero3_partition_group_metadata).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.ucp.affine_maps import layout_from_map
from megatron.ucp.errors import CorruptFileError, SourceError, UcpError, UnsupportedCheckpointError
from megatron.ucp.json_checks import shown
from megatron.ucp.layout import Layout
from megatron.ucp.sources.deepspeed import DEALT, DeepSpeedSource
from megatron.ucp.sources.deepspeed_files import Files
from megatron.ucp.sources.foreign.dense import DenseReader, checked_source
from megatron.ucp.sources.foreign.layer_files import is_weight
from megatron.ucp.sources.foreign.save import ForeignSave, open_save
from megatron.ucp.sources.source import FileCache
from megatron.ucp.stored import are_equal

_DATA_BEFORE_EXPERTS = "use_data_before_expert_parallelism"
_ZERO1 = "save it under ZeRO-1, 2 or 3"


def is_autoep(files: Files) -> bool:
    """Opens one file of model states."""
    content = FileCache().load(files.models[min(files.models)]) if files.models else None
    return isinstance(content, Mapping) and bool(content.get(DEALT))


def open_autoep(folder: Path, files: Files) -> DeepSpeedSource:
    """Opens every rank's files. Raises, before any tensor is read, MissingFileError, CorruptFileError, SourceError (the
    files contradict each other) or UnsupportedCheckpointError."""
    if not files.zeros:
        raise UnsupportedCheckpointError("AutoEP under ZeRO-0 keeps states by number", where=folder, do=_ZERO1)
    save = open_save(folder)
    save.require_complete()
    content = save.model(0)
    layers = content[DEALT]
    if not all(isinstance(layer, Mapping) and {"ep_size", "affine_maps"} <= set(layer) for layer in layers):
        raise CorruptFileError(
            "AutoEP's layers are not described", found=shown(layers), expected="ep_size, affine_maps", where=folder
        )
    ep_size = _ep_size(save, layers)
    experts = _layouts(layers, ep_size, folder)
    listed = {name for table in content["param_shapes"] for name in table}
    if frozen := set(experts) - listed:
        raise UnsupportedCheckpointError(
            "experts that are not trained are not in the optimizer's states", found=frozen, where=folder
        )
    save = replace(save, topology=replace(save.topology, ep_size=ep_size))
    return checked_source(DenseReader(save, {0: _without_second_names(content, listed)}, (), experts=experts))


def _without_second_names(content: Mapping[str, Any], trained: set[str]) -> Mapping[str, Any]:
    """AutoEPMoELayer has its router under the name too that transformers' layer has for it, and a save keeps a copy of
    its weights under each: they are no parameters of their own."""
    module = content["module"]
    routers = {
        (layer.get("module_path"), name.rpartition(".router.")[2]): module.get(name)
        for layer in content[DEALT]
        for name in trained
        if name.startswith(f"{layer.get('module_path')}.router.")
    }

    def is_second(name: str, value: Any) -> bool:
        return name not in trained and any(
            name.startswith(f"{path}.") and name.endswith(f".{rest}") and is_weight(value) and are_equal(value, router)
            for (path, rest), router in routers.items()
            if is_weight(router)
        )

    return {**content, "module": {name: value for name, value in module.items() if not is_second(name, value)}}


def _ep_size(save: ForeignSave, layers: Any) -> int:
    """Raises where ranks hold other experts than their numbers say."""
    sizes = {layer["ep_size"] for layer in layers}
    config = save.model(0).get("ds_config")
    faults = []
    if len(save.mp_ranks) > 1:
        faults.append(f"{save.topology}: AutoEP folded into tensor parallelism")
    if len(sizes) != 1:
        faults.append(f"layers of several sizes of expert parallelism: {sorted(sizes)}")
    if isinstance(config, Mapping) and config.get(_DATA_BEFORE_EXPERTS):
        faults.append(f"{_DATA_BEFORE_EXPERTS} in its configuration")
    if faults:
        raise UnsupportedCheckpointError("this save of AutoEP is not read", found=faults, where=save.folder)
    [ep_size] = sizes
    if isinstance(ep_size, bool) or not isinstance(ep_size, int) or not 0 < ep_size <= save.topology.zero_size:
        raise SourceError("no size of expert parallelism", found=ep_size, expected=f"1 to {save.topology.zero_size}")
    if save.zero_stage == 3:
        odd = {
            save.files.models[zero_rank, mp].name: layer["ep_rank"]
            for zero_rank, mp in save.files.models
            for layer in save.cache.load(save.files.models[zero_rank, mp])[DEALT]
            if layer["ep_rank"] != zero_rank % ep_size
        }
        if odd:
            raise SourceError(
                "files of experts that other ranks hold",
                found=[f"{name}: expert-parallel rank {rank}" for name, rank in odd.items()],
                where=save.folder,
                do="bring together the files of one save of one run",
            )
    return ep_size


def _layouts(layers: Any, ep_size: int, folder: Path) -> dict[str, Layout]:
    layouts: dict[str, Layout] = {}
    for layer in layers:
        maps = layer.get("affine_maps") or {}
        if maps.get("version") != 1 or not maps.get("params"):
            raise UnsupportedCheckpointError(
                "AutoEP's experts without affine maps of version 1",
                found=maps.get("version"),
                where=folder,
                do="load it with the DeepSpeed that saved it, and save it with DeepSpeed 0.19.8 or a later one",
            )
        for name, entry in maps["params"].items():
            try:
                layouts[name] = layout_from_map(entry, "ep", ep_size)
            except UcpError as error:
                raise type(error)(f"{name}: {error.what}", found=error.found, where=folder) from error
    return layouts
