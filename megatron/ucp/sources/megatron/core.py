"""Source: a `torch_dist` checkpoint of Megatron-Core under our names: weights, masters, moments, steps, counters,
schedule.

source = open_core("checkpoints/iter_0001000")
source.pieces("layers.0.attention.query_key_value.weight", "exp_avg")

The optimizer's states may be the parameters' (`fully_reshardable`, a plain optimizer) or lie in flat buckets
(`dp_reshardable`). Where there are masters, they must round to the weights: megatron-core 0.16.1 can write shifted ones
(the ends of several buckets are padded), and then the moments are another parameter's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron.ucp.errors import CorruptFileError, UnsupportedCheckpointError
from megatron.ucp.execute import gather
from megatron.ucp.json_checks import number, passes
from megatron.ucp.sources.dcp.metadata import Metadata, read_metadata
from megatron.ucp.sources.megatron.arguments import describe, schedule_of
from megatron.ucp.sources.megatron.buckets import find_in_buckets
from megatron.ucp.sources.megatron.common_file import read_common
from megatron.ucp.sources.megatron.groups import group_of, optimizer_of
from megatron.ucp.sources.megatron.names import CORE
from megatron.ucp.sources.megatron.tensors import MASTER, CoreTensors
from megatron.ucp.sources.renamed import RenamedSource
from megatron.ucp.stored import DTYPES, is_tensor

log = logging.getLogger(__name__)
_SHARDING = ("fully_reshardable", "fully_sharded_model_space", "dp_reshardable")
_SHARDING_KEY = "param_state_sharding_type"
_STRETCH = 256
"""Elements at a parameter's beginning, middle and end at which masters and weights are compared when it is opened."""


def open_core(folder: str | Path, vocab_size: int | None = None) -> RenamedSource:
    """`vocab_size`: of the vocabulary without its padding, where `args` do not say it. Raises CorruptFileError,
    UnsafePickleError or UnsupportedCheckpointError with all that is wrong; no tensor is read but at a few places."""
    folder = Path(folder)
    common = read_common(folder)
    args = vars(common["args"])
    # Megatron-Core's models do not look at --openai-gelu, which those before it did (its mlp.py).
    described = describe({**args, "openai_gelu": None}, vocab_size)
    if described.model is None:
        raise UnsupportedCheckpointError(
            f"a model that is not known here: {len(described.faults)} reason(s)",
            found=list(described.faults),
            where=folder,
        )
    for note in described.notes:
        log.warning("warning: %s: %s", folder, note)
    metadata, model = read_metadata(folder), described.model
    tensors = CoreTensors.of(folder, metadata, vocab_size=model.vocab_size, num_layers=model.num_layers)
    groups = _groups(common, tensors, metadata)
    if _sharding(common, folder) == "dp_reshardable" and common.get("optimizer") is not None:
        tensors = tensors.with_states(find_in_buckets(tensors, model, args))
    _require_masters_fit(tensors)
    step, optimizer = _step(groups, tensors), optimizer_of(groups, model)
    names = {
        name: group_of(name, len(info.layout.shape), model, optimizer.groups)
        for name, info in tensors.manifest.parameters.items()
    }
    source = RenamedSource.of(tensors.with_optimizer(optimizer, names, step), CORE, model, described.settings)
    source.manifest.common.update(described.progress)
    if passes(number(0), common.get("iteration")):
        source.manifest.common["iteration"] = int(common["iteration"])
    if (schedule := schedule_of(common.get("opt_param_scheduler"), args)) is not None:
        source.manifest.common["schedule"] = schedule
    source.manifest.require_sound(folder)
    return source


def _sharding(common: Mapping[str, Any], folder: Path) -> str | None:
    """None where the optimizer is a plain one, or is not there."""
    content = common.get("content_metadata")
    told = content.get("distrib_optim_sharding_type") if isinstance(content, Mapping) else None
    told = told or next((value for key, value in _walk(common.get("optimizer")) if key == _SHARDING_KEY), None)
    if told is not None and told not in _SHARDING:
        raise UnsupportedCheckpointError(
            "optimizer states in a form that is not read here",
            found=str(told)[:100],
            expected=_SHARDING,
            where=folder,
            do="save once with --dist-ckpt-optim-fully-reshardable",
        )
    return told


def _walk(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Keys and values of nested dicts and lists, as deep as chained optimizers go."""
    if depth > 5 or not isinstance(value, (Mapping, list)):
        return
    for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield key, inner
        yield from _walk(inner, depth + 1)


def _groups(common: Mapping[str, Any], tensors: CoreTensors, metadata: Metadata) -> list[Mapping[str, Any]]:
    """The optimizer's parameter groups without their parameters, with the step count that they or it keep."""
    kept = [common.get("optimizer")]
    kept += [
        tensors.files.value(place)
        for name, place in metadata.values.items()
        if name.startswith(("optimizer.distributed.", "chained_")) and ".optimizer/shard_" in name
    ]
    found, steps = list[Mapping[str, Any]](), list[Any]()
    for key, value in _walk(kept):
        if key == "param_groups" and isinstance(value, list):
            found += [group for group in value if isinstance(group, Mapping)]
        elif key == "common_step":
            steps.append(value)
    return [{"step": steps[0], **group} for group in found] if steps else found


def _step(groups: list[Mapping[str, Any]], tensors: CoreTensors) -> float | None:
    told = {float(g["step"]) for g in groups if is_tensor(g.get("step")) or passes(number(0), g.get("step"))}
    if len(told) > 1 or (not told and any(len(info.states) > 1 for info in tensors.manifest.parameters.values())):
        raise UnsupportedCheckpointError(
            "how many steps the optimizer took is not one number",
            found=sorted(told) or "no step in its parameter groups",
            where=tensors.folder,
        )
    return told.pop() if told else None


def _require_masters_fit(tensors: CoreTensors) -> None:
    if not tensors.has_masters():
        return
    wrong = [name for name in tensors.manifest.parameters if not _fits(tensors, name)]
    if wrong:
        raise CorruptFileError(
            f"the optimizer's masters of {len(wrong)} parameter(s) are not those of the weights; their moments would "
            "not be either",
            found=wrong,
            where=tensors.folder,
            do="megatron-core 0.16.1 writes such states as fully_reshardable where several buckets are padded: save "
            "again without --dist-ckpt-optim-fully-reshardable",
        )


def _fits(tensors: CoreTensors, name: str) -> bool:
    info = tensors.manifest.parameters[name]
    numel = info.layout.numel
    for start in {0, max(0, numel // 2 - _STRETCH // 2), max(0, numel - _STRETCH)}:
        runs = np.array([[start, 0, min(_STRETCH, numel - start)]], dtype=np.int64)
        master, weight = (np.empty(int(runs[0, 2]), dtype=np.float32) for _ in range(2))
        gather(tensors, name, MASTER, tensors.pieces(name, MASTER), runs, master)
        gather(tensors, name, MASTER, tensors.weights(name), runs, weight)
        if not np.array_equal(_rounded(master, info.dtype), weight, equal_nan=True):
            return False
    return True


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    if DTYPES[dtype].itemsize >= 4:
        return values
    import torch

    return torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
