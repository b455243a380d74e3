"""Source: stock ZeRO-0 saves without a ucp.json, fp32 on one tensor- and pipeline-parallel rank.

ZeRO-0 keeps the optimizer's state by index, and the weights by name in the model's own order. A parameter
group takes parameters in that order too, so the shapes of the states say which group takes which parameter; it is
believed where they leave exactly one way, and the checkpoint stays marked as unverified. Where they leave several, the
program that saved it can say the order: `client_state={"ucp_parameter_names": [...]}`, by index of the optimizer.

    source = open_zero0(Path("run/global_step100"))

Source of these conventions: torch/optim/optimizer.py (state_dict), deepspeed/runtime/engine.py (_save_checkpoint).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron.ucp.errors import SourceError, UnsupportedCheckpointError
from megatron.ucp.layout import Layout
from megatron.ucp.manifest import Manifest, OptimizerInfo, ParameterInfo
from megatron.ucp.sources.deepspeed import DeepSpeedSource
from megatron.ucp.sources.deepspeed_files import list_files
from megatron.ucp.sources.foreign.layer_files import is_weight
from megatron.ucp.sources.foreign.param_groups import group_values, names_or_numbers
from megatron.ucp.sources.foreign.save import NO_MANIFEST, common_from_model_states
from megatron.ucp.sources.optimizer_file import numbers_in
from megatron.ucp.sources.source import FileCache, Source
from megatron.ucp.stored import is_tensor, place_of
from megatron.ucp.topology import Topology

NAMES_KEY = "ucp_parameter_names"
_MAX_DEPTH = 8
"""Of dicts in a state dict."""
_MAX_WAYS = 100_000
"""Of dividing parameters among groups that are followed at once."""
_SAVE_AGAIN = (
    "load it with the program that saved it and save once more with "
    f'engine.save_checkpoint(..., client_state={{"{NAMES_KEY}": [name of each parameter, in the optimizer\'s order]}})'
)

Shape = tuple[int, ...]


def open_zero0(folder: Path, order: Sequence[str] = ()) -> Source:
    """Opens the file. `order`: names of the optimizer's parameters, from a program that has the same optimizer. Raises
    CorruptFileError, SourceError or UnsupportedCheckpointError."""
    found, cache = list_files(folder), FileCache()
    if set(found.models) != {(0, 0)} or found.layers:
        _refuse(
            folder,
            "ZeRO-0 without ucp.json is read of one tensor- and pipeline-parallel rank",
            [path.name for path in (*found.models.values(), *found.layers.values())],
            "train on under ZeRO-1 from its weights, or save it with a ucp.json",
        )
    content = cache.load(found.models[0, 0])
    if isinstance(content.get("module"), Mapping):
        content["module"] = dict(_named(content["module"]))  # in the cache, where a piece's tensor is looked up by name
    weights, optimizer = _weights(folder, content), _optimizer(folder, content)
    groups, state = optimizer["param_groups"], optimizer["state"]
    owner = {index: number for number, group in enumerate(groups) for index in group["params"]}
    names = _names(folder, content, weights, groups, state, order)
    names_of_groups = names_or_numbers(groups)
    parameters = {}
    for index, name in enumerate(names):
        of_param = state.get(index, {})
        step = of_param.get("step", groups[owner[index]].get("step"))
        parameters[name] = ParameterInfo(
            layout=Layout.unique(tuple(weights[name].shape)),
            group=names_of_groups[owner[index]],
            states=("fp32", *(key for key, value in of_param.items() if is_tensor(value) and value.dim() > 0)),
            step=None if step is None else float(step),
            scalars=numbers_in(of_param),
        )
    frozen = {name: weight for name, weight in weights.items() if name not in parameters}
    for name, weight in frozen.items():
        parameters[name] = ParameterInfo(Layout.unique(tuple(weight.shape)), is_trainable=False)
    manifest = Manifest(
        kind="native",
        topology=Topology(dp_size=int(content.get("dp_world_size", 1))),
        parameters={name: parameters[name] for name in weights},
        optimizer=OptimizerInfo(kind="", groups=dict(zip(names_of_groups, map(group_values, groups)))),
        common=common_from_model_states(content),
        zero0_order=[names],
        saved_by={"deepspeed": str(content.get("ds_version", ""))},
        unverified=f"{NO_MANIFEST}; the optimizer's states belong to the parameters in the order of the model",
    )
    return DeepSpeedSource(folder, manifest, cache=cache)


def _weights(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """In the model's order, a weight of two names under the first."""
    module = content.get("module")
    if not isinstance(module, Mapping):
        _refuse(folder, "the weights are not kept by name", type(module).__name__, "use another checkpoint")
    buffers = content.get("buffer_names") or ()
    weights: dict[str, Any] = {}
    seen = set()
    for name, value in module.items():
        if name in buffers or not is_weight(value):
            continue
        place = place_of(value)
        if place not in seen or not value.numel():
            seen.add(place)
            weights[name] = value
    if low := sorted({str(value.dtype) for value in weights.values()} - {"torch.float32"}):
        _refuse(
            folder, "only ZeRO-0 in fp32 keeps the state by parameter", low, "train on under ZeRO-1 from its weights"
        )
    return weights


def _named(module: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Also of nested dicts, as Megatron's state dicts are."""
    for name, value in module.items():
        if isinstance(value, Mapping) and depth < _MAX_DEPTH:
            yield from _named(value, f"{prefix}{name}.", depth + 1)
        else:
            yield f"{prefix}{name}", value


def _optimizer(folder: Path, content: Mapping[str, Any]) -> Mapping[str, Any]:
    optimizer = content.get("optimizer")
    if not isinstance(optimizer, Mapping) or not {"state", "param_groups"} <= set(optimizer):
        found = sorted(map(str, optimizer)) if isinstance(optimizer, Mapping) else type(optimizer).__name__
        _refuse(
            folder, "only ZeRO-0 in fp32 keeps the state by parameter", found, "train on under ZeRO-1 from its weights"
        )
    indices = [index for group in optimizer["param_groups"] for index in group["params"]]
    if sorted(indices) != list(range(len(indices))) or not set(optimizer["state"]) <= set(indices):
        raise SourceError(
            "the optimizer's groups do not number their parameters from 0 on",
            found=f"groups {indices[:20]}, states {sorted(optimizer['state'])[:20]}",
            where=folder,
            do="use another checkpoint",
        )
    return optimizer


def _names(
    folder: Path,
    content: Mapping[str, Any],
    weights: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[int, Mapping[str, Any]],
    order: Sequence[str],
) -> list[str]:
    """By index of the optimizer."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    wanted = [[_shape(state.get(index, {})) for index in group["params"]] for group in groups]
    said = content.get(NAMES_KEY) or [name for group in groups for name in group.get("param_names", ())]
    ways = [] if said else _ways(list(shapes.values()), wanted)
    if not said and len(ways) != 1:  # what the shapes say beyond doubt nobody need say
        said = order
    if said:
        names = list(said)
        expected = [shape for group in wanted for shape in group]
        if len(names) != len(expected) or len(set(names)) != len(names) or not set(names) <= set(shapes):
            raise SourceError(
                "the names of the optimizer's parameters are not those of its weights",
                found=names,
                expected=f"{len(expected)} of {list(shapes)[:20]}",
                where=folder,
            )
        odd = [name for name, shape in zip(names, expected) if shape is not None and shape != shapes[name]]
        if odd:
            raise SourceError(
                "states of the optimizer have not the shape of the weights they are named for", found=odd, where=folder
            )
        return names
    if len(ways) != 1:
        _refuse(
            folder,
            "ZeRO-0 keeps the optimizer's state by index, and the shapes leave open which parameter is which"
            if ways
            else "the optimizer's states have not the shapes of the weights, in the model's order",
            f"{len(shapes)} weights, groups of {[len(group) for group in wanted]}",
            _SAVE_AGAIN,
        )
    taken: list[list[str]] = [[] for _ in groups]
    for name, group in zip(shapes, ways[0]):
        if group is not None:
            taken[group].append(name)
    return [name for group in taken for name in group]


def _shape(of_param: Mapping[str, Any]) -> Shape | None:
    """Of the weight that these states belong to; None where none says."""
    tensors = [value for value in of_param.values() if is_tensor(value) and value.dim() > 0]
    return tuple(tensors[0].shape) if tensors else None


def _ways(shapes: Sequence[Shape], groups: Sequence[Sequence[Shape | None]]) -> list[tuple[int | None, ...]]:
    """How the parameters, in order, can be dealt to groups that take them in order; the others are frozen (None). At
    most two ways: the second says that there are several."""
    num_frozen = len(shapes) - sum(len(group) for group in groups)
    # How far each group has come -> the ways there. Kept as linked lists, so that a step costs nothing.
    Way = tuple[Any, int | None] | None
    reached: dict[tuple[int, ...], list[Way]] = {(0,) * len(groups): [None]}
    for place, shape in enumerate(shapes):
        further: dict[tuple[int, ...], list[Way]] = {}
        for positions, ways in reached.items():
            steps: list[tuple[tuple[int, ...], int | None]] = [
                ((*positions[:number], position + 1, *positions[number + 1 :]), number)
                for number, position in enumerate(positions)
                if position < len(groups[number]) and groups[number][position] in (None, shape)
            ]
            if place - sum(positions) < num_frozen:
                steps.append((positions, None))
            for after, taker in steps:
                known = further.setdefault(after, [])
                known += [(way, taker) for way in ways][: 2 - len(known)]
        if len(further) > _MAX_WAYS:
            return [(), ()]
        reached = further
    found = []
    for way in reached.get(tuple(len(group) for group in groups), []):
        takers: list[int | None] = []
        while way is not None:
            way, taker = way
            takers.append(taker)
        found.append(tuple(reversed(takers)))
    return found


def _refuse(folder: Path, why: str, found: Any, do: str) -> NoReturn:
    raise UnsupportedCheckpointError(why, found=found, where=folder, do=do)
