"""Rotary positions of a config.json of Hugging Face's in our words, and back.

values, faults = read_rotary(config, family)      # GptModel's fields, as far as they are sound
rotary_config(family, model)                      # keys of a config.json
rotary_mismatches(family, model)                  # why they cannot be written so; empty where they can

Sources: transformers 5.23, modeling_rope_utils.py (rope_parameters, and the keys before them; what has a default, what
goes before what) and models/phimoe (short_mscale, long_mscale).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron.ucp.huggingface.families import Family
from megatron.ucp.json_checks import shown
from megatron.ucp.naming.gpt_model import GptModel

_OF_ALL = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_ORIGINAL = "original_max_position_embeddings"
_KEYS = {
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_max_position_embeddings": _ORIGINAL,
    "rope_short_factors": "short_factor",
    "rope_long_factors": "long_factor",
}
"""GptModel's field -> key of rope_parameters."""
_FIELDS = {
    "linear": ("rope_scaling_factor",),
    "llama3": (
        "rope_scaling_factor",
        "rope_low_freq_factor",
        "rope_high_freq_factor",
        "rope_original_max_position_embeddings",
    ),
    "longrope": ("rope_original_max_position_embeddings", "rope_short_factors", "rope_long_factors"),
}
"""rope_type -> what it must say."""
_MSCALES = ("short_mscale", "long_mscale")
"""PhiMoE's: what cos and sin are multiplied by up to the original length, and beyond it."""
_SCALES = {"factor", "attention_factor"}
"""The others': longrope's factor is worked out from them, and from the lengths."""


def read_rotary(config: Mapping[str, Any], family: Family) -> tuple[dict[str, Any], list[str]]:
    """(GptModel's fields, faults)."""
    rope, of_family = config.get("rope_parameters"), family.defaults.get("partial_rotary_factor")
    if rope is None:
        scaling = config.get("rope_scaling") or {}
        theta = config.get("rotary_emb_base", config.get("rope_theta", family.defaults.get("rope_theta")))
        part = config.get("rotary_pct", config.get("partial_rotary_factor", of_family))
        rope = {**scaling, "rope_theta": theta} if isinstance(scaling, Mapping) else scaling
        if part is not None and isinstance(rope, dict):
            rope["partial_rotary_factor"] = part
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        return {}, [f"rotary positions {shown(rope)}: one set of values for all layers is computed here"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    values = {
        "rope_theta": rope.get("rope_theta", family.defaults["rope_theta"]),
        "rotary_percent": rope.get("partial_rotary_factor", 1.0 if of_family is None else of_family),
        "rope_scaling_type": None,
    }
    if kind in ("default", None):
        return values, []
    if not isinstance(kind, str) or kind not in _FIELDS:
        return {}, [f"rope scaling {shown(kind)}: known are default, {', '.join(_FIELDS)}"]
    if config.get(_ORIGINAL) is not None:
        rope = {**rope, _ORIGINAL: config[_ORIGINAL]}
    needed = {_KEYS[name] for name in _FIELDS[kind]}
    of_scale: set[str] = set()
    if kind == "longrope":
        needed |= set(_MSCALES) if family.has_mscales else set()
        of_scale = _SCALES
    if missing := sorted(needed - set(rope)):
        return {}, [f"rope scaling {kind} without {', '.join(missing)}"]
    faults = []
    if unknown := sorted(map(str, set(rope) - needed - of_scale - _OF_ALL)):
        faults.append(f"rope scaling {kind} with {', '.join(unknown)}, which is not computed here")
    values |= {"rope_scaling_type": kind, **{name: rope[_KEYS[name]] for name in _FIELDS[kind]}}
    if kind == "longrope":
        scales, fault = _long_scales(config, rope, family)
        values |= scales
        faults += [fault] if fault else []
    return values, faults


def _long_scales(config: Mapping[str, Any], rope: Mapping[str, Any], family: Family) -> tuple[dict[str, Any], str]:
    """longrope's factors of cos and sin, and a fault. Where none is said, one that grows with the stretch."""
    if family.has_mscales:
        return dict(zip(("rope_short_mscale", "rope_long_mscale"), (rope[key] for key in _MSCALES))), ""
    scale = rope.get("attention_factor")
    if scale is None:
        original, factor = rope[_ORIGINAL], rope.get("factor")
        length = config.get("max_position_embeddings", family.defaults.get("max_position_embeddings"))
        numbers = (original, length if factor is None else factor)
        if any(isinstance(n, bool) or not isinstance(n, (int, float)) or not 1 <= n < 1e18 for n in numbers):
            return {}, f"rope scaling longrope of {shown(original)} positions, stretched to {shown(numbers[1])}"
        factor = length / original if factor is None else factor
        if factor > 1 and original < 2:
            return {}, f"rope scaling longrope of {shown(original)} positions"
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {"rope_short_mscale": scale, "rope_long_mscale": scale}, ""


def rotary_mismatches(family: Family, model: GptModel) -> list[str]:
    """Why the model's positions cannot be said by the family's config.json."""
    found, kind = [], model.rope_scaling_type
    if model.rotary_percent != 1.0 and "partial_rotary_factor" not in family.defaults:
        found.append(f"{model.rotary_percent:g} of a head is rotated, not all")
    if kind is not None and (kind not in _FIELDS or (family.has_mscales and kind != "longrope")):
        found.append(f"rope scaling {kind} has no name there")
    if kind == "longrope" and not family.has_mscales and model.rope_short_mscale != model.rope_long_mscale:
        found.append("longrope multiplies by one factor up to the original length and by another beyond it")
    return found


def rotary_config(family: Family, model: GptModel) -> dict[str, Any]:
    """Of a model without mismatches."""
    if "partial_rotary_factor" in family.defaults:  # GPT-NeoX's own words
        names = {"rotary_emb_base": model.rope_theta, "rotary_pct": model.rotary_percent}
    else:
        names = {"rope_theta": model.rope_theta}
    kind = model.rope_scaling_type
    if kind is None:
        return names
    said = {_KEYS[name]: getattr(model, name) for name in _FIELDS[kind]}
    scaling = {"rope_type": kind, **{key: list(v) if isinstance(v, tuple) else v for key, v in said.items()}}
    if kind == "longrope" and family.has_mscales:
        scaling |= dict(zip(_MSCALES, (model.rope_short_mscale, model.rope_long_mscale)))
    elif kind == "longrope":
        scaling["attention_factor"] = model.rope_short_mscale
    return {**names, "rope_scaling": scaling}
