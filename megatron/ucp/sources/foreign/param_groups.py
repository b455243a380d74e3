"""The optimizer's parameter groups out of DeepSpeed's files: names, where it gives one name to several, and values.

DeepSpeed names every group of experts "ep_size_N", whichever of the program's groups it came from, and
divides large ones, on every pipeline stage otherwise. Groups of one name with equal hyper-parameters are one here; a
second set of hyper-parameters under the same name is "ep_size_N.2".

    seen = {}
    group_names([{"name": "ep_size_2", "lr": 0.1}, {"name": "ep_size_2", "lr": 0.2}], seen)
    # ["ep_size_2", "ep_size_2.2"]

Source of the names: deepspeed/moe/utils.py (split_params_into_different_moe_groups_for_optimizer).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron.ucp.stored import is_tensor

Seen = dict[str, list[dict[str, Any]]]
"""Name -> the hyper-parameters found under it, in order; kept from one file to the next."""


def names_or_numbers(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The groups' own names, or their numbers where they have none or the same."""
    names = [_name(group, index) for index, group in enumerate(groups)]
    return names if len(set(names)) == len(names) else [str(index) for index in range(len(names))]


def group_names(groups: Iterable[Mapping[str, Any]], seen: Seen) -> list[str]:
    """By index of the group; a group without a name has its index."""
    names = []
    for index, group in enumerate(groups):
        name, values = _name(group, index), group_values(dict(group))
        known = seen.setdefault(name, [])
        if values not in known:
            known.append(values)
        place = known.index(values)
        names.append(name if place == 0 else f"{name}.{place + 1}")
    return names


def _name(group: Mapping[str, Any], index: int) -> str:
    name = group.get("name")
    return name if isinstance(name, str) else str(index)


def group_values(group: Mapping[str, Any]) -> dict[str, Any]:
    """A torch param_group as JSON values, without its parameters."""
    plain = (bool, int, float, str, type(None))
    values = {key: float(v) if is_tensor(v) and v.numel() == 1 else v for key, v in group.items()}
    values = {
        key: list(v) if isinstance(v, tuple) else v
        for key, v in values.items()
        if key != "params" and isinstance(key, str)
    }
    is_plain = {k: all(isinstance(e, plain) for e in (v if isinstance(v, list) else [v])) for k, v in values.items()}
    return {k: v for k, v in values.items() if is_plain[k]}
