"""The command line: flags to a Config, through a parser that is generated from the fields' metadata.

Parsing collects every mistake (unknown, refused, missing, mistyped) and raises once; what was
accepted without effect comes back as notes, for the caller to log.

    result = parse(["--num-layers", "2", ...])     # ConfigError, or
    result.config, result.notes                    # a Config (not yet validated) and the lines to log
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.config.checkpoint import CheckpointConfig
from megatron.config.config import Config
from megatron.config.data import DataConfig
from megatron.config.errors import ConfigError, Problem
from megatron.config.estimate import EstimateConfig
from megatron.config.flag import FlagField, flag_fields
from megatron.config.implied_flags import fill_in_implied
from megatron.config.model import ModelConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.presets import apply_preset
from megatron.config.run import RunConfig
from megatron.config.upstream_flags import ACCEPTED, REFUSED

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "optimizer": OptimizerConfig,
    "data": DataConfig,
    "checkpoint": CheckpointConfig,
    "run": RunConfig,
    "estimate": EstimateConfig,
}


@dataclass(frozen=True)
class ParseResult:
    config: Config
    notes: tuple[str, ...]
    """What was accepted but has no effect, or means something slightly else: one line each."""


def parse(argv: Sequence[str]) -> ParseResult:
    """Read Megatron-DeepSpeed's command line. Raises ConfigError with every problem of the flags themselves;
    what depends on the number of ranks or on files is `Config.validate`'s. `--help` prints and exits."""
    parser = build_parser()
    namespace, rest = parser.parse_known_args(list(argv))
    given: list[_Occurrence] = namespace.given or []
    problems = [*_unknown(rest), *_refused(given)]
    notes = list(_accepted(given))

    sections: dict[str, Any] = {}
    for section, owner in SECTIONS.items():
        values: dict[str, Any] = {}
        for spec in flag_fields(owner):
            found = [occurrence for occurrence in given if occurrence.name in spec.all_names]
            if found:
                value, found_problems = _value(spec, found)
                values[spec.name] = value
                problems += found_problems
        sections[section] = (owner, values)
    try:
        notes += _from_checkpoint(sections)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    for owner, values in sections.values():
        notes += apply_preset(values)
        problems += _missing(owner, values)
    if problems:
        raise ConfigError(problems)

    names = {occurrence.name for occurrence in given}
    notes += fill_in_implied({section: values for section, (_, values) in sections.items()}, names)
    config = Config(**{section: owner(**values) for section, (owner, values) in sections.items()})
    return ParseResult(config, tuple(notes))


def _from_checkpoint(sections: dict[str, Any]) -> list[str]:
    (_, model), (_, checkpoint) = sections["model"], sections["checkpoint"]
    if not checkpoint.get("use_checkpoint_args"):
        return []
    from megatron.config.checkpoint_args import fill_in_from_checkpoint  # late: it loads the checkpoint library

    return fill_in_from_checkpoint(model, checkpoint)


def build_parser() -> argparse.ArgumentParser:
    """Every value is kept as text here and converted later, so that one mistyped value does not hide the next."""
    parser = _Parser(
        prog="pretrain_gpt.py",
        allow_abbrev=False,
        argument_default=None,
        description="Train a GPT under any parallelism; resume it under any other.",
    )
    parser.set_defaults(given=None)
    for section, owner in SECTIONS.items():
        group = parser.add_argument_group(section)
        for spec in flag_fields(owner):
            if spec.names:
                nargs = 0 if spec.type is bool else ("*" if spec.is_list else 1)
                metavar = None if spec.type is bool else spec.type.__name__.upper()
                group.add_argument(
                    *spec.names, action=_Record, nargs=nargs, metavar=metavar, help=describe(spec).replace("%", "%%")
                )
            for name, constant in spec.flag.switches.items():
                group.add_argument(name, action=_Record, nargs=0, help=f"{spec.flag.help}: {constant}")
    for table in (ACCEPTED, REFUSED):
        for name, upstream in table.items():
            parser.add_argument(name, action=_Record, nargs=upstream.nargs, help=argparse.SUPPRESS)
    return parser


def describe(spec: FlagField) -> str:
    """Help, choices, unit and default of one field in a line."""
    parts = [spec.flag.help]
    if spec.flag.choices:
        parts.append("one of " + ", ".join(str(choice) for choice in spec.flag.choices))
    if spec.flag.unit:
        parts.append(f"[{spec.flag.unit}]")
    if spec.is_required:
        parts.append("(required)")
    elif spec.default not in (None, ()) and spec.type is not bool:
        parts.append(f"(default {_show(spec.default)})")
    return " ".join(parts)


def known_flags() -> list[str]:
    """Every flag that is understood: set, accepted or refused."""
    names = [name for owner in SECTIONS.values() for spec in flag_fields(owner) for name in spec.all_names]
    return [*names, *ACCEPTED, *REFUSED]


@dataclass(frozen=True)
class _Occurrence:
    """One flag as it was given."""

    name: str
    values: list[str] = field(default_factory=list)


class _Record(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str, **keywords: Any) -> None:
        super().__init__(option_strings, "given", **keywords)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        occurrence = _Occurrence(option_string or "", list(values or []))
        namespace.given = [*(namespace.given or []), occurrence]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(Problem("the command line cannot be read", found=message, fix="see --help"))


def _value(spec: FlagField, found: list[_Occurrence]) -> tuple[Any, list[Problem]]:
    """The value of a field. A flag given again under the same name replaces the earlier one, as everywhere;
    two names of one field must agree."""
    last: dict[str, Any] = {}
    problems: list[Problem] = []
    for occurrence in found:
        try:
            last[occurrence.name] = _convert(spec, occurrence)
        except ValueError as error:
            problems.append(
                Problem(
                    f"{occurrence.name} has a value that is not {_expected(spec)}",
                    found=" ".join(occurrence.values) or "nothing",
                    expected=str(error),
                    flags=(occurrence.name,),
                )
            )
    values = list(last.values())
    if any(value != values[0] for value in values[1:]):
        problems.append(
            Problem(
                f"flags contradict each other: {' and '.join(last)}",
                found=", ".join(f"{name} gives {value}" for name, value in last.items()),
                expected="one of them",
                flags=tuple(last),
                fix="drop all but one",
            )
        )
    return (values[-1] if values else None), problems


def _convert(spec: FlagField, occurrence: _Occurrence) -> Any:
    if occurrence.name in spec.flag.switches:
        return spec.flag.switches[occurrence.name]
    if spec.type is bool:
        return spec.flag.stores
    values = tuple(_scalar(spec, text) for text in occurrence.values)
    if spec.is_list:
        if not values and not spec.flag.may_be_bare:
            raise ValueError("one or more values")
        return values
    return values[0]


def _scalar(spec: FlagField, text: str) -> Any:
    try:
        if spec.type is int:
            value: Any = _whole(text)
        else:
            value = spec.type(text)
    except ValueError:
        raise ValueError(_expected(spec)) from None
    if spec.flag.choices and value not in spec.flag.choices:
        known = "one of " + ", ".join(str(choice) for choice in spec.flag.choices)
        instead = spec.flag.instead(value) if spec.flag.instead else None
        raise ValueError(f"{known}: {instead}" if instead else known)
    return value


def _whole(text: str) -> int:
    """`200`, and `2e2` or `1.0` where it is whole: upstream's scripts compute numbers in bash and bc."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if number != int(number):
            raise ValueError(text) from None
        return int(number)


def _expected(spec: FlagField) -> str:
    return {int: "a whole number", float: "a number", str: "a value"}[spec.type] if not spec.flag.choices else "known"


def _missing(owner: type, values: dict[str, Any]) -> Iterator[Problem]:
    if "model_preset" in values and values["model_preset"] is None:
        return  # Not a known one, which is said already: nobody knows what it would have set.
    for spec in flag_fields(owner):
        if spec.is_required and spec.name not in values:
            yield Problem(f"{spec.names[0]} is missing", flags=spec.names[:1], fix=f"give {_synopsis(spec)}")


def _unknown(rest: Sequence[str]) -> Iterator[Problem]:
    known = [name for name in known_flags() if name not in REFUSED]
    owner = ""
    for word in rest:
        if word.startswith("--") or (word.startswith("-") and not _is_number(word)):
            owner = name = word.split("=", 1)[0]
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            fix = f"did you mean {' or '.join(near)}?" if near else "see --help or docs/flags.md"
            yield Problem(f"unknown flag {name}", found=word, flags=(name,), fix=fix)
        elif not owner:
            yield Problem(
                "a value belongs to no flag", found=word, fix="quote values with spaces; each flag takes one value"
            )


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _refused(given: Sequence[_Occurrence]) -> Iterator[Problem]:
    for occurrence in given:
        upstream = REFUSED.get(occurrence.name)
        if upstream is None or (occurrence.values and all(v in upstream.harmless for v in occurrence.values)):
            continue
        yield Problem(
            f"{occurrence.name} is refused: {upstream.reason}",
            found=" ".join([occurrence.name, *occurrence.values]),
            flags=(occurrence.name,),
        )


def _accepted(given: Sequence[_Occurrence]) -> Iterator[str]:
    for occurrence in given:
        if occurrence.name in ACCEPTED:
            shown = " ".join([occurrence.name, *occurrence.values])
            yield f"{shown} has no effect: {ACCEPTED[occurrence.name].reason}"


def _synopsis(spec: FlagField) -> str:
    return f"{spec.names[0]} {spec.type.__name__.upper()} ({spec.flag.help})"


def _show(value: Any) -> str:
    return " ".join(str(part) for part in value) if isinstance(value, tuple) else str(value)
