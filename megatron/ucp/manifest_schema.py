"""What ucp.json has to be before anything in it is believed: types, ranges, names, and one part against another.

The one idea: a manifest is a stranger's. Every field is checked where it stands, all faults are told at once, each with
its place in the file; what passes can be used without a second look.

    faults = manifest_faults(json_object)          # ["parameters.w.step: -3 is below 0", ...]

FORMAT.md, section 3, is the specification.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from megatron.ucp.digest import Digest
from megatron.ucp.errors import UcpError
from megatron.ucp.layout import PATTERNS, Layout
from megatron.ucp.safe_paths import part_fault, path_fault
from megatron.ucp.topology import Topology

MAX_DEGREE = 1 << 20
"""Of a parallel degree: a million ranks along one axis."""
MAX_DIMS = 16
MAX_ELEMENTS = 1 << 48
"""Of one parameter: a petabyte as float32."""
MAX_PARTS = 4096
"""Of one cut."""
MAX_STATES = 64
MAX_DEPTH = 24
"""Of the values that users put into `model`, `common` and hyper-parameters."""
MAX_COUNT = 1 << 62
"""Of samples, tokens, bytes: what an int64 holds, with room to add."""

FIELDS = (
    "format_version",
    "checksum",
    "kind",
    "saved_by",
    "topology",
    "zero_stage",
    "is_pipelined",
    "parameters",
    "optimizer",
    "model",
    "common",
    "digests",
    "expert_digests",
    "files",
    "zero0_order",
    "zero3_order",
    "fragments",
    "pipeline_layers",
    "source",
    "unverified",
)
"""Of version 2, all of them required."""
REQUIRED_IN_VERSION_1 = (
    "format_version", "kind", "topology", "parameters", "zero_stage", "is_pipelined", "optimizer", "common", "digests",
    "files",
)  # fmt: skip

Add = Callable[[str, str], None]
"""Takes a fault: its place and what is wrong there."""
_HEX = re.compile(r"[0-9a-f]*")
_SHOWN = 60


def manifest_faults(data: Mapping[str, Any]) -> list[str]:
    """One line for each fault; empty for a manifest that can be used. `data`: the JSON object."""
    faults: list[str] = []

    def add(place: str, what: str) -> None:
        faults.append(f"{place[:200]}: {what}")

    version = data.get("format_version")
    missing = [name for name in (FIELDS if version != 1 else REQUIRED_IN_VERSION_1) if name not in data]
    faults += [f"{name}: is missing" for name in missing]
    for name, check in _CHECKS.items():
        if name in data:
            check(add, name, data[name])
    if not faults:  # one part against another, each sound in itself
        _check_together(add, data, is_strict=version != 1)
    return faults


# -- kinds of values ---------------------------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _whole(low: int = 0, high: int = MAX_COUNT, optional: bool = False):
    def check(add: Add, place: str, value: Any) -> bool:
        if optional and value is None:
            return True
        if isinstance(value, bool) or not isinstance(value, int):
            add(place, f"{_shown(value)} is no whole number")
        elif not low <= value <= high:
            add(place, f"{_shown(value)} is not from {low} to {high}")
        else:
            return True
        return False

    return check


def _number(low: float = -math.inf, high: float = math.inf, optional: bool = False):
    def check(add: Add, place: str, value: Any) -> None:
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            add(place, f"{_shown(value)} is no number")
        elif abs(value) > 1e300 or value != value:
            add(place, f"{_shown(value)} is not finite")
        elif not low <= value <= high:
            add(place, f"{_shown(value)} is not from {low} to {high}")

    return check


def _flag(add: Add, place: str, value: Any) -> None:
    if not isinstance(value, bool):
        add(place, f"{_shown(value)} is neither true nor false")


def _one_of(*allowed: Any):
    def check(add: Add, place: str, value: Any) -> None:
        if type(value) not in {type(a) for a in allowed} or value not in allowed:
            add(place, f"{_shown(value)} is none of {', '.join(map(str, allowed))}")

    return check


def _text(add: Add, place: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) > 65536:
        add(place, f"{_shown(value)} is no text, or too long")


def _hex(digits: int):
    def check(add: Add, place: str, value: Any) -> None:
        if not isinstance(value, str) or len(value) != digits or not _HEX.fullmatch(value):
            add(place, f"{_shown(value)} is not {digits} lower-case hexadecimal digits")

    return check


def _name(add: Add, place: str, value: Any) -> None:
    if fault := part_fault(value):
        add(place, f"the name {_shown(value)} {fault}")


def _plain(add: Add, place: str, value: Any, depth: int = 0) -> None:
    """JSON values of any kind, not too deep."""
    if depth > MAX_DEPTH:
        add(place, f"is nested more than {MAX_DEPTH} deep")
    elif isinstance(value, dict):
        for key, entry in value.items():
            _plain(add, place, entry, depth + 1)
            if len(key) > 4096:
                add(place, "has a key of more than 4096 characters")
    elif isinstance(value, list):
        for entry in value:
            _plain(add, place, entry, depth + 1)


def _mapping(check: Callable[..., Any], name: Callable[..., Any] | None = None, optional: bool = False):
    """An object whose values all pass `check`, and its keys `name`."""

    def check_all(add: Add, place: str, value: Any) -> None:
        if optional and value is None:
            return
        if not isinstance(value, dict):
            add(place, f"{_shown(value)} is no object")
            return
        for key, entry in value.items():
            if name is not None:
                name(add, place, key)
            check(add, f"{place}.{key}", entry)

    return check_all


def _list(check: Callable[..., Any], low: int = 0, high: int = MAX_COUNT):
    def check_all(add: Add, place: str, value: Any) -> None:
        if not isinstance(value, list):
            add(place, f"{_shown(value)} is no list")
        elif not low <= len(value) <= high:
            add(place, f"has {len(value)} entries, not {low} to {high}")
        else:
            for index, entry in enumerate(value):
                check(add, f"{place}[{index}]", entry)

    return check_all


def _record(fields: Mapping[str, Callable[..., Any]], required: tuple[str, ...] = (), is_open: bool = False):
    """An object with these fields and, unless it `is_open`, no others."""

    def check_all(add: Add, place: str, value: Any) -> None:
        if not isinstance(value, dict):
            add(place, f"{_shown(value)} is no object")
            return
        for key in required:
            if key not in value:
                add(f"{place}.{key}", "is missing")
        for key, entry in value.items():
            if key in fields:
                fields[key](add, f"{place}.{key}", entry)
            elif is_open:
                _plain(add, f"{place}.{key}", entry)
            else:
                add(f"{place}.{key}", "is not known")

    return check_all


# -- the fields --------------------------------------------------------------------------------------------------------

_SHAPE = _list(_whole(0, MAX_ELEMENTS), high=MAX_DIMS)


def _part(add: Add, place: str, value: Any) -> None:
    if not isinstance(value, list) or len(value) != 3:
        add(place, f"{_shown(value)} is not [size, unit, replicate_when_fewer]")
        return
    _whole(0, MAX_ELEMENTS)(add, place, value[0])
    _whole(1, MAX_ELEMENTS)(add, place, value[1])
    _flag(add, place, value[2])


_CUT = _record(
    {
        "dim": _whole(0, MAX_DIMS),
        "axis": _one_of("tp", "ep"),
        "padded": _whole(0, MAX_ELEMENTS, optional=True),
        "parts": _list(_part, low=1, high=MAX_PARTS),
    },
    required=("dim", "axis", "padded", "parts"),
)
_LAYOUT_FIELDS = _record(
    {"pattern": _one_of(*PATTERNS), "shape": _SHAPE, "cuts": _list(_CUT, high=MAX_DIMS)},
    required=("pattern", "shape", "cuts"),
)


def _quiet(check: Callable[..., Any], value: Any) -> bool:
    found: list[str] = []
    check(lambda place, what: found.append(what), "", value)
    return not found


def _layout(add: Add, place: str, value: Any) -> None:
    _LAYOUT_FIELDS(add, place, value)
    if not _quiet(_LAYOUT_FIELDS, value):
        return
    if math.prod(value["shape"]) > MAX_ELEMENTS:
        add(f"{place}.shape", f"{_shown(value['shape'])} has more than {MAX_ELEMENTS} elements")
    try:
        Layout.from_json(value)
    except UcpError as error:
        add(place, " ".join(str(error).split()))


_PARAMETER = _record(
    {
        "layout": _layout,
        "group": _text,
        "states": _list(_name, low=1, high=MAX_STATES),
        "step": _number(0, 2.0**62, optional=True),
        "scalars": _mapping(_number(), _name),
        "shapes": _mapping(_SHAPE, _name),
        "pp_stages": _list(_whole(0, MAX_DEGREE), low=1, high=MAX_DEGREE),
        "is_trainable": _flag,
        "dtype": _text,
    },
    required=("layout", "states", "pp_stages"),
)
_DEGREES = ("dp_size", "tp_size", "pp_size", "sp_size", "ep_size")
_TOPOLOGY = _record({axis: _whole(1, MAX_DEGREE) for axis in _DEGREES}, required=_DEGREES)


def _topology(add: Add, place: str, value: Any) -> None:
    _TOPOLOGY(add, place, value)
    if _quiet(_TOPOLOGY, value):
        try:
            Topology(**value)
        except UcpError as error:
            add(place, " ".join(str(error).split()))


def _betas(add: Add, place: str, value: Any) -> None:
    _list(_number(0, 1), low=1, high=8)(add, place, value)


_GROUP = _record(
    {
        "lr": _number(),
        "initial_lr": _number(),
        "eps": _plain,
        "weight_decay": _number(0),
        "momentum": _number(0, 1),
        "betas": _betas,
    },
    is_open=True,
)


def _file_path(add: Add, place: str, value: Any) -> None:
    if fault := path_fault(value):
        add(place, f"the path {_shown(value)} {fault}")


_COMMON = _record(
    {
        "iteration": _whole(optional=True),
        "global_steps": _whole(),
        "global_samples": _whole(),
        "consumed_train_samples": _whole(optional=True),
        "consumed_valid_samples": _whole(optional=True),
        "consumed_train_tokens": _whole(optional=True),
        "skipped_iterations": _whole(optional=True),
        "skipped_steps": _whole(),
        "global_batch_size": _whole(1),
        "schedule": _mapping(_plain, optional=True),
        "loss_scaler": _mapping(_plain, optional=True),
        "train_order": _mapping(_plain, optional=True),
        "rng": _record(
            {"file": _file_path, "world_size": _whole(1, MAX_DEGREE)}, required=("file", "world_size"), is_open=True
        ),
        "engine": _record({"global_samples": _whole(), "skipped_steps": _whole()}, is_open=True),
    },
    is_open=True,
)
_SOURCE_FIELDS = {
    "folder": _text,
    "kind": _one_of("native", "universal"),
    "topology": _topology,
    "zero_stage": _whole(0, 3),
    "is_pipelined": _flag,
}


def _source(add: Add, place: str, value: Any) -> None:
    if value is not None:
        _record(_SOURCE_FIELDS, required=tuple(_SOURCE_FIELDS))(add, place, value)


def _layer_prefix(add: Add, place: str, value: Any) -> None:
    if value is not None:
        _text(add, place, value)


_CHECKS: dict[str, Callable[..., Any]] = {
    "format_version": _one_of(1, 2),
    "checksum": _hex(64),
    "kind": _one_of("native", "universal"),
    "saved_by": _mapping(_text),
    "topology": _topology,
    "zero_stage": _whole(0, 3),
    "is_pipelined": _flag,
    "parameters": _mapping(_PARAMETER, _name),
    "optimizer": _record({"kind": _text, "wrapper": _text, "groups": _mapping(_GROUP)}),
    "model": _mapping(_plain),
    "common": _COMMON,
    "digests": _mapping(_mapping(_hex(32), _name), _name),
    "expert_digests": _mapping(_mapping(_list(_hex(32)), _name), _name),
    "files": _mapping(_record({"bytes": _whole(), "crc32": _hex(8)}, required=("bytes", "crc32")), _file_path),
    "zero0_order": _list(_list(_name)),
    "zero3_order": _list(_list(_list(_name))),
    "fragments": _mapping(_list(_list(_whole(), 5, 5)), _name),
    "pipeline_layers": _list(_layer_prefix),
    "source": _source,
    "unverified": _text,
}


# -- one part against another ------------------------------------------------------------------------------------------


def _check_together(add: Add, data: Mapping[str, Any], is_strict: bool) -> None:
    topology, parameters = Topology(**data["topology"]), data["parameters"]
    is_native = data["kind"] == "native"
    for name, info in parameters.items():
        _check_parameter(add, f"parameters.{name}", info, topology.pp_size)
    _check_digests(add, data)
    if is_strict and not data["unverified"]:
        for table in ("digests", "files"):
            if parameters and not data[table]:
                add(table, "is empty, and `unverified` gives no reason for it")
    num_mp = topology.pp_size * topology.tp_size
    if not is_native:
        _check_universal(add, data, topology, is_strict)
        return
    for table in ("zero0_order", "zero3_order"):
        order = data.get(table) or []
        if order and len(order) != num_mp:
            add(table, f"has {len(order)} entries for {num_mp} mp_ranks")
        for mp_rank, entry in enumerate(order):
            names = entry if table == "zero0_order" else [name for group in entry for name in group]
            if unknown := sorted(set(names) - set(parameters)):
                add(f"{table}[{mp_rank}]", f"{_shown(unknown[0])} is no parameter")
            if len(set(names)) != len(names):
                add(f"{table}[{mp_rank}]", "names a parameter twice")
    for name, parts in (data.get("fragments") or {}).items():
        if name not in parameters:
            add(f"fragments.{name}", "is no parameter")
        elif any(part[0] >= num_mp or part[1] >= topology.zero_size for part in parts):
            add(f"fragments.{name}", f"names a rank that {topology} does not have")
    rng = data["common"].get("rng")
    if is_strict and rng and data["files"] and rng["file"] not in data["files"]:
        add("files", f"{rng['file']}, which common.rng names, is missing")


def _check_parameter(add: Add, place: str, info: Mapping[str, Any], pp_size: int) -> None:
    states, stages = info["states"], info["pp_stages"]
    if states[0] != "fp32" or len(set(states)) != len(states) or "step" in states:
        add(f"{place}.states", f'{_shown(states)} is not "fp32" and then other names, each once')
    if not info.get("is_trainable", True) and states != ["fp32"]:
        add(f"{place}.states", "a frozen parameter has states of an optimizer")
    if sorted(set(stages)) != stages or stages[-1] >= pp_size:
        add(f"{place}.pp_stages", f"{_shown(stages)} are not ascending stages of {pp_size}")
    if unknown := sorted(set(info.get("shapes", {})) - set(states[1:])):
        add(f"{place}.shapes", f"{unknown[0]} is none of the optimizer's states of the parameter")
    for state, shape in info.get("shapes", {}).items():
        if math.prod(shape) > MAX_ELEMENTS:
            add(f"{place}.shapes.{state}", f"has more than {MAX_ELEMENTS} elements")


def _check_digests(add: Add, data: Mapping[str, Any]) -> None:
    parameters, digests = data["parameters"], data["digests"]
    if digests:
        for name in sorted(set(parameters) - set(digests)):
            add(f"digests.{name}", "is missing")
        for name, found in digests.items():
            if name not in parameters:
                add(f"digests.{name}", "is no parameter")
                continue
            expected = set(parameters[name]["states"])
            for state in sorted(expected ^ set(found)):
                add(f"digests.{name}.{state}", "is missing" if state in expected else "is no state of it")
    for name, by_state in (data.get("expert_digests") or {}).items():
        for state, experts in by_state.items():
            place = f"expert_digests.{name}.{state}"
            whole = digests.get(name, {}).get(state)
            if name not in parameters or (digests and whole is None):
                add(place, "is no state of a parameter")
            elif whole is not None and sum(map(Digest.from_hex, experts), Digest()).hex() != whole:
                add(place, "do not add up to the parameter's digest")


def _check_universal(add: Add, data: Mapping[str, Any], topology: Topology, is_strict: bool) -> None:
    if topology != Topology() or data["zero_stage"] or data["is_pipelined"]:
        add("topology", "a universal folder is of no topology: every degree 1, zero_stage 0, not pipelined")
    for table in ("zero0_order", "zero3_order", "fragments", "pipeline_layers"):
        if data.get(table):
            add(table, "is not empty in a universal folder")
    if is_strict and data["source"] is None and not data["unverified"]:
        add("source", "is null in a universal folder, and `unverified` gives no reason for it")
    if data["files"]:
        for name, info in data["parameters"].items():
            for state in info["states"]:
                if f"zero/{name}/{state}.pt" not in data["files"]:
                    add("files", f"zero/{name}/{state}.pt is missing")
