"""The table of all flags, from the same metadata as the parser.

python -m megatron.config > docs/flags.md
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.config.arguments import SECTIONS
from megatron.config.flag import FlagField, flag_fields
from megatron.config.presets import PRESETS
from megatron.config.upstream_flags import ACCEPTED, REFUSED, UpstreamFlag

_HEAD = """# Flags of pretrain_gpt.py

Made by `python -m megatron.config > docs/flags.md`. Names and defaults are Megatron-DeepSpeed's.
An unknown flag is an error that names the nearest known ones.
"""

_PRESET_RULES = """A preset sets fields of the model section, which a note lists; a flag that is given replaces that
field's value. What a preset does not state is derived from what holds then: the MLP of `gpt-125m` follows
`--hidden-size`, that of `llama-3.1-8b` is stated and stays. Switches that a preset sets cannot be switched off.
The vocabulary is the published one (of a tiny preset the tokenizer's) unless `--vocab-size` is given, and must
have room for the tokenizer's. `--seq-length` may be changed freely; a learned position table stays as long as
the preset says. Dropout is 0; only the GPTs of the paper state none, so that upstream's default holds.
The name is no part of what a checkpoint must agree on: the same values by flags are the same model.
"HF x/y" is `config.json` of that model on Hugging Face.
"""


def flag_table() -> str:
    """Markdown: flags that set something by section, then those accepted and those refused, with reasons."""
    parts = [_HEAD]
    for section, owner in SECTIONS.items():
        rows = [_row(spec) for spec in flag_fields(owner)]
        parts.append(_table(section.capitalize(), ("flag", "meaning", "unit", "default"), rows))
    parts.append(_table("Presets", ("--model-preset", "family", "parameters", "source", "differs"), _presets()))
    parts.append(_PRESET_RULES)
    accepted = _reasons(ACCEPTED)
    parts.append(_table("Accepted, without effect (said in a note)", ("flag", "why"), accepted))
    parts.append(_table("Refused", ("flag", "why"), _reasons(REFUSED)))
    return "\n".join(parts)


def _row(spec: FlagField) -> tuple[str, ...]:
    names = " ".join(f"`{name}`" for name in spec.all_names)
    meaning = spec.flag.help
    if spec.flag.choices:
        meaning += ": " + ", ".join(f"`{choice}`" for choice in spec.flag.choices)
    if spec.is_required:
        default = "required"
    elif spec.type is bool:
        default = "off"
    elif spec.default in (None, ()):
        default = ""
    else:
        value = spec.default
        default = f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"
    return names, meaning, spec.flag.unit, default


def _presets() -> list[tuple[str, ...]]:
    return [
        (
            f"`{name}`",
            preset.family,
            f"{preset.num_parameters:,}" if preset.num_parameters else "",
            preset.source,
            preset.differs,
        )
        for name, preset in PRESETS.items()
    ]


def _reasons(table: dict[str, UpstreamFlag]) -> list[tuple[str, str]]:
    rows = []
    for name, upstream in table.items():
        but = f" (except `{'`, `'.join(upstream.harmless)}`)" if upstream.harmless else ""
        rows.append((f"`{name}`", upstream.reason + but))
    return sorted(rows, key=lambda row: row[0].lower())


def _table(title: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
