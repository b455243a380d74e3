"""What ucp.json has to be before anything in it is believed: types, ranges, names, and one part against another.

A manifest is a stranger's. Every field is checked where it stands, all faults are told at once, each with
its place in the file; what passes can be used without a second look.

    faults = manifest_faults(json_object)          # ["parameters.w.step: -3 is below 0", ...]

FORMAT.md, section 3, is the specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron.ucp.digest import Digest
from megatron.ucp.errors import UcpError
from megatron.ucp.json_checks import (
    Add,
    flag,
    hexadecimal,
    list_of,
    mapping,
    number,
    one_of,
    passes,
    plain,
    record,
    shown,
    text,
    whole,
)
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
MAX_GROUP_NAME = 1000
DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Of weights in forward and backward."""

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
    "format_version",
    "kind",
    "topology",
    "parameters",
    "zero_stage",
    "is_pipelined",
    "optimizer",
    "common",
    "digests",
    "files",
)


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


# -- the fields --------------------------------------------------------------------------------------------------------


def _name(add: Add, place: str, value: Any) -> None:
    if fault := part_fault(value):
        add(place, f"the name {shown(value)} {fault}")


_SHAPE = list_of(whole(0, MAX_ELEMENTS), high=MAX_DIMS)


def _part(add: Add, place: str, value: Any) -> None:
    if not isinstance(value, list) or len(value) != 3:
        add(place, f"{shown(value)} is not [size, unit, replicate_when_fewer]")
        return
    whole(0, MAX_ELEMENTS)(add, place, value[0])
    whole(1, MAX_ELEMENTS)(add, place, value[1])
    flag(add, place, value[2])


_CUT = record(
    {
        "dim": whole(0, MAX_DIMS),
        "axis": one_of("tp", "ep"),
        "padded": whole(0, MAX_ELEMENTS, optional=True),
        "parts": list_of(_part, low=1, high=MAX_PARTS),
        "spans": list_of(list_of(list_of(whole(0, MAX_ELEMENTS), 2, 2), high=MAX_PARTS)),
    },
    required=("dim", "axis", "padded", "parts"),
)
_LAYOUT_FIELDS = record(
    {"pattern": one_of(*PATTERNS), "shape": _SHAPE, "cuts": list_of(_CUT, high=MAX_DIMS)},
    required=("pattern", "shape", "cuts"),
)


def _layout(add: Add, place: str, value: Any) -> None:
    _LAYOUT_FIELDS(add, place, value)
    if not passes(_LAYOUT_FIELDS, value):
        return
    if math.prod(value["shape"]) > MAX_ELEMENTS:
        add(f"{place}.shape", f"{shown(value['shape'])} has more than {MAX_ELEMENTS} elements")
    try:
        Layout.from_json(value)
    except UcpError as error:
        add(place, " ".join(str(error).split()))


_PARAMETER_FIELDS = {
    "layout": _layout,
    "group": text,
    "states": list_of(_name, low=1, high=MAX_STATES),
    "step": number(0, 2.0**62, optional=True),
    "scalars": mapping(number(), _name),
    "shapes": mapping(_SHAPE, _name),
    "pp_stages": list_of(whole(0, MAX_DEGREE), low=1, high=MAX_DEGREE),
    "is_trainable": flag,
    "dtype": one_of(*DTYPES),
}
_PARAMETER = record(_PARAMETER_FIELDS, required=("layout", "states", "pp_stages"))
_DEGREES = ("dp_size", "tp_size", "pp_size", "sp_size", "ep_size")
_TOPOLOGY = record({axis: whole(1, MAX_DEGREE) for axis in _DEGREES}, required=_DEGREES)


def _topology(add: Add, place: str, value: Any) -> None:
    _TOPOLOGY(add, place, value)
    if passes(_TOPOLOGY, value):
        try:
            Topology(**value)
        except UcpError as error:
            add(place, " ".join(str(error).split()))


def _one_or_more(check: Callable[..., Any]):
    """A number, or a list of them (Adafactor has two eps)."""
    several = list_of(check, low=1, high=8)

    def check_either(add: Add, place: str, value: Any) -> None:
        (several if isinstance(value, list) else check)(add, place, value)

    return check_either


_GROUP = record(
    {
        "lr": number(optional=True),
        "initial_lr": number(optional=True),
        "eps": _one_or_more(number(0, optional=True)),
        "weight_decay": number(0, optional=True),
        "momentum": number(0, 1, optional=True),
        "betas": _one_or_more(number(0, 1, optional=True)),
    },
    is_open=True,
)


def _file_path(add: Add, place: str, value: Any) -> None:
    if fault := path_fault(value):
        add(place, f"the path {shown(value)} {fault}")


_COMMON = record(
    {
        "iteration": whole(optional=True),
        "global_steps": whole(),
        "global_samples": whole(),
        "consumed_train_samples": whole(optional=True),
        "consumed_valid_samples": whole(optional=True),
        "consumed_train_tokens": whole(optional=True),
        "skipped_iterations": whole(optional=True),
        "skipped_steps": whole(),
        "global_batch_size": whole(1),
        "schedule": mapping(plain, optional=True),
        "loss_scaler": mapping(plain, optional=True),
        "train_order": mapping(plain, optional=True),
        "model_settings": mapping(plain, optional=True),
        "left_out": record(
            {"digest": hexadecimal(32), "dtype": one_of("float32", "bfloat16", "float16"), "parameters": whole(1)},
            required=("digest",),
        ),
        "rng": record(
            {"file": _file_path, "world_size": whole(1, MAX_DEGREE)}, required=("file", "world_size"), is_open=True
        ),
        "engine": record({"global_samples": whole(), "skipped_steps": whole()}, is_open=True),
    },
    is_open=True,
)


def _group_name(add: Add, place: str, value: str) -> None:
    if len(value) > MAX_GROUP_NAME:
        add(place, f"the name {shown(value)} is longer than {MAX_GROUP_NAME} characters")


_OPTIMIZER_FIELDS = {"kind": text, "wrapper": text, "groups": mapping(_GROUP, _group_name)}
_SOURCE_FIELDS = {
    "folder": text,
    "kind": one_of("native", "universal"),
    "topology": _topology,
    "zero_stage": whole(0, 3),
    "is_pipelined": flag,
}


def _source(add: Add, place: str, value: Any) -> None:
    if value is not None:
        record(_SOURCE_FIELDS, required=tuple(_SOURCE_FIELDS))(add, place, value)


def _layer_prefix(add: Add, place: str, value: Any) -> None:
    if value is not None:
        text(add, place, value)


_CHECKS: dict[str, Callable[..., Any]] = {
    "format_version": one_of(1, 2),
    "checksum": hexadecimal(64),
    "kind": one_of("native", "universal"),
    "saved_by": mapping(text),
    "topology": _topology,
    "zero_stage": whole(0, 3),
    "is_pipelined": flag,
    "parameters": mapping(_PARAMETER, _name),
    "optimizer": record(_OPTIMIZER_FIELDS),
    "model": mapping(plain),
    "common": _COMMON,
    "digests": mapping(mapping(hexadecimal(32), _name), _name),
    "expert_digests": mapping(mapping(list_of(hexadecimal(32)), _name), _name),
    "files": mapping(record({"bytes": whole(), "crc32": hexadecimal(8)}, required=("bytes", "crc32")), _file_path),
    "zero0_order": list_of(list_of(_name)),
    "zero3_order": list_of(list_of(list_of(_name))),
    "fragments": mapping(list_of(list_of(whole(), 5, 5)), _name),
    "pipeline_layers": list_of(_layer_prefix),
    "source": _source,
    "unverified": text,
}


# -- one part against another ------------------------------------------------------------------------------------------


def _check_together(add: Add, data: Mapping[str, Any], is_strict: bool) -> None:
    topology, parameters = Topology(**data["topology"]), data["parameters"]
    is_native = data["kind"] == "native"
    if is_strict:
        _check_complete(add, data)
    for name, info in parameters.items():
        _check_parameter(add, f"parameters.{name}", info, topology.pp_size)
    groups = data["optimizer"].get("groups", {})
    for name, info in parameters.items():
        if is_strict and groups and (group := info.get("group")) and group not in groups:
            add(f"parameters.{name}.group", f"{shown(group)} is none of optimizer.groups")
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
                add(f"{table}[{mp_rank}]", f"{shown(unknown[0])} is no parameter")
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


def _check_complete(add: Add, data: Mapping[str, Any]) -> None:
    """Version 2: what is nested is there too."""
    for name, info in data["parameters"].items():
        for key in _PARAMETER_FIELDS:
            if key not in info:
                add(f"parameters.{name}.{key}", "is missing")
    for key in _OPTIMIZER_FIELDS:
        if key not in data["optimizer"]:
            add(f"optimizer.{key}", "is missing")


def _check_parameter(add: Add, place: str, info: Mapping[str, Any], pp_size: int) -> None:
    states, stages = info["states"], info["pp_stages"]
    if states[0] != "fp32" or len(set(states)) != len(states) or "step" in states:
        add(f"{place}.states", f'{shown(states)} is not "fp32" and then other names, each once')
    if not info.get("is_trainable", True) and states != ["fp32"]:
        add(f"{place}.states", "a frozen parameter has states of an optimizer")
    if sorted(set(stages)) != stages or stages[-1] >= pp_size:
        add(f"{place}.pp_stages", f"{shown(stages)} are not ascending stages of {pp_size}")
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
