"""The files that DeepSpeed writes for experts, and the names inside them.

DeepSpeed numbers experts twice. In `layer_{i}_expert_{e}_mp_rank_{mp}_model_states.pt`, in the name and
in the keys, e counts through the whole layer; in everything that lists parameters (`param_shapes`, the optimizer's
tables) experts are numbered within a rank. Here both become (layer's name, number, rest), and files that are missing,
too many or not of the expert that their name says are named together.

    files = list_expert_files(folder)
    files.weights[0, 3, 0]                                     # layer 0, expert 3, mp_rank 0
    split_name("2.moe.deepspeed_moe.experts.deepspeed_experts.1.up.weight")     # ("2.moe", 1, "up.weight")

Source of these conventions: deepspeed/runtime/engine.py (_save_moe_checkpoint, _get_expert_ckpt_name,
_get_optimizer_ckpt_name, _get_non_moe_state_dict), moe/layer.py, moe/experts.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.ucp.errors import MissingFileError, SourceError, UnsupportedCheckpointError
from megatron.ucp.sources.foreign.layer_files import is_weight

EXPERT_FILE = re.compile(r"^layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt$")
OPTIMIZER_FILE = re.compile(r"^expp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
_OLD_FILE = re.compile(r"^expert_(\d+)_mp_rank_(\d+)_model_states\.pt$")
"""An early form: one file for the experts of all layers (_get_expert_ckpt_name with layer_id -1)."""

_INSIDE = "deepspeed_moe.experts.deepspeed_experts."
_NAME = re.compile(rf"^(?:(.*?)\.)?{re.escape(_INSIDE)}(\d+)\.(.+)$")
_GATE = "deepspeed_moe.gate.wg.weight"

Key = tuple[int, int, int]
"""(layer, expert, mp_rank)."""


@dataclass(frozen=True)
class ExpertFiles:
    weights: dict[Key, Path]
    optimizers: dict[tuple[int, int], Path]
    """ZeRO-0 only, by (expert-parallel rank, mp_rank): the whole optimizer of that rank."""


@dataclass(frozen=True)
class MoeLayer:
    """One deepspeed.moe.layer.MoE."""

    number: int
    """In the names of files: counts within a pipeline stage."""
    name: str
    num_experts: int

    def parameter(self, expert: int, rest: str) -> str:
        return f"{self.name}.{_INSIDE}{expert}.{rest}" if self.name else f"{_INSIDE}{expert}.{rest}"

    def title(self, expert: int) -> str:
        return f"expert {expert} of layer {self.number} ({self.name or 'the model'})"


def has_experts(folder: Path) -> bool:
    patterns = EXPERT_FILE, OPTIMIZER_FILE, _OLD_FILE
    return any(pattern.match(path.name) for path in folder.iterdir() for pattern in patterns)


def list_expert_files(folder: Path) -> ExpertFiles:
    """Raises SourceError where two files are of the same expert, UnsupportedCheckpointError for names without the
    number of a layer."""
    found: tuple[dict, dict, dict] = {}, {}, {}
    doubled: list[str] = []
    for path in sorted(folder.iterdir()):
        for pattern, table in zip((EXPERT_FILE, OPTIMIZER_FILE, _OLD_FILE), found, strict=True):
            if match := pattern.match(path.name):
                key = tuple(map(int, match.groups()))
                if key in table:
                    what = (
                        f"expert {key[1]} of layer {key[0]}" if table is found[0] else f"expert-parallel rank {key[0]}"
                    )
                    doubled.append(f"{what}: {table[key].name}, {path.name}")
                table[key] = path
    if doubled:
        raise SourceError(
            "several files are of the same expert",
            found=doubled,
            where=folder,
            do="a folder holds one save: move the files of the others away",
        )
    if found[2]:
        raise UnsupportedCheckpointError(
            "files of experts without the number of a layer (an early DeepSpeed) do not say whose they are",
            found=[path.name for path in found[2].values()],
            where=folder,
            do="load it with the DeepSpeed that saved it and save it with a newer one",
        )
    return ExpertFiles(dict(sorted(found[0].items())), dict(sorted(found[1].items())))


def split_name(name: str) -> tuple[str, int, str] | None:
    """(layer's name, number of the expert, name inside it); None for what belongs to no expert."""
    match = _NAME.match(name)
    return (match[1] or "", int(match[2]), match[3]) if match else None


def without_experts(content: Mapping[str, Any]) -> dict[str, Any]:
    """Model states whose tables list dense parameters only; a group of experts is an empty table."""
    tables = content.get("param_shapes")
    frozen = content.get("frozen_param_shapes")
    return {
        **content,
        "param_shapes": tables and [{n: shape for n, shape in t.items() if not split_name(n)} for t in tables],
        "frozen_param_shapes": frozen and {n: shape for n, shape in frozen.items() if not split_name(n)},
    }


def moe_layers(content: Mapping[str, Any], where: Path) -> list[MoeLayer]:
    """Of model states, in the order of the numbers in file names: the gates stay among the dense weights, in the
    model's own order. Raises UnsupportedCheckpointError where the files do not say which layer is which."""
    if content.get("ds_autoep_layers"):
        raise UnsupportedCheckpointError(
            "AutoEP's fused experts are not read, only those of deepspeed.moe.layer.MoE",
            where=where,
            do="convert it with DeepSpeed's own ds_to_universal",
        )
    module, numbers = content.get("module"), content.get("num_experts")
    gates = [name for name in module if name.endswith(_GATE)] if isinstance(module, Mapping) else []
    if not isinstance(numbers, (list, tuple)) or len(gates) != len(numbers):
        raise UnsupportedCheckpointError(
            "there are files of experts, but the model states do not say which layers they are of",
            found=f"num_experts {numbers}, gates {gates or 'none'}",
            expected="for each MoE layer one number of experts and one gate (deepspeed_moe.gate.wg.weight)",
            where=where,
            do="save without exclude_frozen_parameters, and with no MoE layer used twice",
        )
    names = [name.removesuffix(_GATE).removesuffix(".") for name in gates]
    return [MoeLayer(i, name, int(n)) for i, (name, n) in enumerate(zip(names, numbers, strict=True))]


def require_expert_files(folder: Path, files: ExpertFiles, expected: Mapping[Key, MoeLayer]) -> None:
    """Raises MissingFileError or SourceError naming every expert without a file, or file without an expert."""
    missing = [
        f"{expected[key].title(key[1])}: layer_{key[0]}_expert_{key[1]}_mp_rank_{key[2]:02d}_model_states.pt"
        for key in sorted(set(expected) - set(files.weights))
    ]
    if missing:
        raise MissingFileError(
            f"the files of {len(missing)} expert(s) are missing",
            found=f"missing: {'; '.join(missing[:20])}",
            expected="one file for each expert of each MoE layer",
            where=folder,
            do="bring the files of every node into this folder",
        )
    layers = {layer.number: layer for layer in expected.values()}
    extra = [
        f"expert {e} of layer {i}: {files.weights[i, e, mp].name}"
        + (f"; {layers[i].name} has {layers[i].num_experts} experts" if i in layers else "; no such layer")
        for i, e, mp in sorted(set(files.weights) - set(expected))
    ]
    if extra:
        raise SourceError(
            "files of experts that the model does not have, or not on that rank",
            found=extra,
            where=folder,
            do="a folder holds one save: move the files of the others away",
        )


def content_faults(
    layer: MoeLayer, expert: int, path: Path, content: Any, trained: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What is wrong with the file of an expert: it has to hold that one, whole. `trained`: shapes by name inside."""
    title = layer.title(expert)
    names = [split_name(str(key).lstrip(".")) for key in content] if isinstance(content, Mapping) else []
    if not names or None in names:
        return [f"{title}: {path.name} is not a file of an expert's weights"]
    held = {(name, number) for name, number, _ in names}
    if held != {(layer.name, expert)}:
        others = ", ".join(f"expert {number} of {name}" for name, number in sorted(held))
        return [f"{title}: {path.name} holds {others}"]
    shapes = {rest: tuple(value.shape) for (_, _, rest), value in zip(names, content.values()) if is_weight(value)}
    return [
        f"{title}: {path.name} holds {rest} as {shapes.get(rest, 'nothing')}, expected {shape}"
        for rest, shape in trained.items()
        if shapes.get(rest) != shape
    ]
