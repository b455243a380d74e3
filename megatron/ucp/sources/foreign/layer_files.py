"""Frozen parameters of a foreign pipeline: what its layer files hold beside what is trained.

PipelineModule names a parameter by the number of its layer, `2.weight`, and the file of layer 2 has it
as `weight`. The file of a tied layer holds a copy of `tied_modules.<key>.weight` and does not say so; it is known by
having just the names and shapes of one.

    frozen = frozen_in_layers({(2, 0): {"weight": ..., "bias": ...}}, trainable, buffers=set())

Source of these names: deepspeed/runtime/pipe/module.py (_build, save_state_dict).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.ucp.errors import UnsupportedCheckpointError
from megatron.ucp.stored import are_equal, is_tensor

Shapes = dict[str, dict[int, list[tuple[int, ...]]]]
"""name -> pp stage -> shard shape by tp rank."""

Layers = Mapping[tuple[int, int], Mapping[str, Any]]
"""(layer, tp rank) -> the content of its file."""

_TIED = "tied_modules."


def frozen_in_layers(layers: Layers, trainable: Shapes, buffers: set[str]) -> Shapes:
    """Empty where the parameters have other names than PipelineModule's own. Raises UnsupportedCheckpointError where a
    frozen layer and a tied one cannot be told apart."""
    stages = {int(name.split(".")[0]): min(by) for name, by in trainable.items() if name.split(".")[0].isdigit()}
    if not stages:
        return {}
    tied = _tied_layers({key: content for key, content in layers.items() if key[0] not in stages}, trainable)
    frozen: Shapes = {}
    for (layer, _), content in sorted(layers.items()):
        stage = max((stage for number, stage in stages.items() if number <= layer), default=0)
        for key, value in content.items():
            name = f"{layer}.{key}"
            if is_weight(value) and layer not in tied and name not in trainable and name not in buffers:
                frozen.setdefault(name, {}).setdefault(stage, []).append(tuple(value.shape))
    return frozen


def is_weight(value: Any) -> bool:
    return is_tensor(value) and value.is_floating_point()


def _tied_layers(layers: Layers, trainable: Shapes) -> set[int]:
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, by_stage in trainable.items():
        if name.startswith(_TIED):
            module, key = name.removeprefix(_TIED).split(".", 1)
            modules.setdefault(module, {})[key] = by_stage[min(by_stage)][0]
    found: set[int] = set()
    for module, shapes in modules.items():
        copies = {
            layer: content
            for (layer, tp), content in layers.items()
            if tp == 0 and shapes == {key: tuple(value.shape) for key, value in content.items() if is_weight(value)}
        }
        first = next(iter(copies.values()), {})
        if not all(are_equal(first[key], content[key]) for content in copies.values() for key in shapes):
            raise UnsupportedCheckpointError(
                "frozen layers have the names and shapes of a tied one, and nothing tells them apart",
                found=[f"layer {layer}" for layer in copies],
                expected=f"equal copies of {_TIED}{module}",
            )
        found |= set(copies)
    return found
