"""The parameter groups of the optimizer that a DeepSpeed save holds, of one tensor- and pipeline-parallel rank.

DeepSpeed's files keep states by number, so whoever writes them anew needs what is in each group, in the
optimizer's own order, with everything the optimizer keeps beside its tensors as it keeps it.

    for group in optimizer_groups(source):          # a DeepSpeedSource of tp 1, pp 1
        group.values["lr"], group.names, group.states, group.numbers["final_norm.weight"]["step"]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.ucp.errors import CorruptFileError, UnsupportedCheckpointError
from megatron.ucp.sources.deepspeed import DeepSpeedSource
from megatron.ucp.stored import is_tensor


@dataclass(frozen=True)
class OptimizerGroup:
    values: Mapping[str, Any]
    """torch's param_group, its `params` apart."""
    names: Sequence[str]
    """Parameters in the optimizer's order."""
    states: Sequence[str]
    """Tensors that the optimizer keeps of each of them: "exp_avg", ..."""
    numbers: Mapping[str, Mapping[str, Any]]
    """Parameter -> what it keeps of it beside tensors, as it keeps it (a step is an int or a tensor)."""


def optimizer_groups(source: DeepSpeedSource) -> list[OptimizerGroup]:
    """Raises UnsupportedCheckpointError where the files do not say it, CorruptFileError where they cannot be right."""
    content = source.model_states(0)
    if source.manifest.is_partitioned:
        values, names, numbers = _partitioned(source, content)
    else:
        values, names, numbers = _whole(source, content)
    listed = [name for of_group in names for name in of_group]
    trained = [name for name, info in source.manifest.parameters.items() if info.is_trainable]
    if sorted(listed) != sorted(trained):
        raise CorruptFileError(
            "the optimizer's groups are not of the parameters that are trained",
            found=sorted(set(listed) ^ set(trained)) or "a parameter in two groups",
            where=source.folder,
            do="use another checkpoint",
        )
    return [
        OptimizerGroup(
            values={key: value for key, value in of_group.items() if key != "params"},
            names=held,
            states=_states(source, held),
            numbers={name: numbers[name] for name in held},
        )
        for of_group, held in zip(values, names, strict=True)
    ]


def _states(source: DeepSpeedSource, names: Sequence[str]) -> tuple[str, ...]:
    """Of all that any of them has, in the order of the first that has all."""
    parameters = source.manifest.parameters
    return max((parameters[name].states[1:] for name in names), key=len, default=())


def _partitioned(source: DeepSpeedSource, content: Mapping[str, Any]) -> tuple[list, list[list[str]], dict]:
    file = source.optimizer_file(0)
    values = file.param_groups()
    if not values and file.states():
        raise UnsupportedCheckpointError(
            "the optimizer's groups are not in files saved with elastic_checkpoint",
            where=source.folder,
            do="convert it to a universal folder, or load it with megatron.ucp_deepspeed installed",
        )
    tables = [list(table) for table in content["param_shapes"]]
    names: list[list[str]] = [[] for _ in values]
    numbers: dict[str, dict[str, Any]] = {}
    for flat, (group, held) in enumerate(zip(file.flat_groups(len(tables)), tables, strict=True)):
        if group >= len(names):
            raise CorruptFileError("the optimizer has fewer groups than the model states list", where=file.path)
        names[group] += held
        numbers |= dict.fromkeys(held, _numbers(file.state(flat)))
    if is_round_robin(content, source.manifest.zero_stage) and not file.is_of_bf16_optimizer:
        names = [undo_round_robin(held, source.manifest.topology.zero_size) for held in names]
    return values, names, numbers


def _whole(source: DeepSpeedSource, content: Mapping[str, Any]) -> tuple[list, list[list[str]], dict]:
    values, state = content["optimizer"]["param_groups"], content["optimizer"]["state"]
    order = source.manifest.zero0_order[0]
    names = [[order[index] for index in group["params"]] for group in values]
    return values, names, {name: _numbers(state.get(index, {})) for index, name in enumerate(order)}


def _numbers(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not (is_tensor(value) and value.dim() > 0)}


# -- the order of round_robin_gradients ------------------------------------------------------------------------------


def is_round_robin(content: Mapping[str, Any], zero_stage: int) -> bool:
    """Whether ZeRO-1 and 2 deal parameters to ranks by turns, as far as the model states say."""
    config = content.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, Mapping) else None
    return zero_stage in (1, 2) and isinstance(zero, Mapping) and bool(zero.get("round_robin_gradients"))


def round_robin(names: Sequence[str], num_ranks: int) -> list[str]:
    """The parameters of the first rank, then those of the next (stage_1_and_2.py, _round_robin_reorder)."""
    return [name for rank in range(num_ranks) for name in names[rank::num_ranks]]


def undo_round_robin(names: Sequence[str], num_ranks: int) -> list[str]:
    places = [place for rank in range(num_ranks) for place in range(len(names))[rank::num_ranks]]
    return [name for _, name in sorted(zip(places, names, strict=True))]
