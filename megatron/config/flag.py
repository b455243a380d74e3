"""The flag of a dataclass field: its names, help and unit, kept in the field's own metadata.

`flag(...)` is `dataclasses.field(...)` plus what a command line needs to know, so a field is
declared once.

    num_layers: int = flag(help="transformer blocks", unit="blocks")
    add_bias_linear: bool = flag(True, "--disable-bias-linear", help="biases in linear layers", stores=False)
    precision: str = flag("fp32", help="...", switches={"--bf16": "bf16", "--fp16": "fp16"})
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

KEY = "flag"
REQUIRED: Any = object()
"""As the default of a flag that must be given."""


@dataclass(frozen=True)
class Flag:
    """How one field is written on the command line."""

    names: tuple[str, ...]
    help: str
    unit: str = ""
    choices: tuple[Any, ...] = ()
    stores: bool = True
    """For a bool field: the value that giving the flag stores."""
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Flags without a value, each storing its own constant in this one field."""
    instead: Callable[[Any], str | None] | None = None
    """Of a value that is none of the choices: what to do instead, where that is known."""
    may_be_bare: bool = False
    """Of a list: the flag may be given without a value."""


def flag(
    default: Any = REQUIRED,
    *names: str,
    help: str,
    unit: str = "",
    choices: tuple[Any, ...] = (),
    stores: bool = True,
    switches: Mapping[str, Any] | None = None,
    instead: Callable[[Any], str | None] | None = None,
    may_be_bare: bool = False,
) -> Any:
    """A dataclass field with its flag. No names: `--` and the field's name with dashes.
    No default: the flag is required. With `switches` and no names the field has only the switches."""
    spec = Flag(names, help, unit, choices, stores, dict(switches or {}), instead, may_be_bare)
    if default is REQUIRED:
        return dataclasses.field(metadata={KEY: spec})
    return dataclasses.field(default=default, metadata={KEY: spec})


@dataclass(frozen=True)
class FlagField:
    """A field of a configuration class, resolved: what the parser and the documentation read."""

    owner: type
    name: str
    type: type
    """The scalar type (int, float, str, bool), without `| None` or `tuple[...]`."""
    is_list: bool
    default: Any
    is_required: bool
    flag: Flag

    @property
    def names(self) -> tuple[str, ...]:
        """The flags that take this field's value (none when there are only switches)."""
        if self.flag.names or self.flag.switches:
            return self.flag.names
        return ("--" + self.name.replace("_", "-"),)

    @property
    def all_names(self) -> tuple[str, ...]:
        return self.names + tuple(self.flag.switches)


def flag_fields(owner: type) -> Iterator[FlagField]:
    """The fields of a configuration dataclass that have a flag, in the order they are declared."""
    hints = typing.get_type_hints(owner)
    for field in dataclasses.fields(owner):
        spec = field.metadata.get(KEY)
        if spec is None:
            continue
        hint, is_list = _scalar(hints[field.name])
        is_required = field.default is dataclasses.MISSING
        default = None if is_required else field.default
        yield FlagField(owner, field.name, hint, is_list, default, is_required, spec)


def _scalar(hint: Any) -> tuple[type, bool]:
    """`int | None` -> (int, False); `tuple[str, ...]` -> (str, True)."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False
