"""Layouts <-> the pattern lists of DeepSpeed's `universal_checkpoint_info`.

DeepSpeed says how a parameter is cut by matching its name against lists of regular expressions; layouts
say it exactly. Ours to theirs lets DeepSpeed's own converter read our saves. Theirs to ours reads checkpoints of other
frameworks; there a tensor-parallel parameter that no list names is refused, because DeepSpeed would concatenate it
along dimension 0 whatever it is (replicated norms included).

    engine.module.universal_checkpoint_info = universal_checkpoint_info(layouts, tp_size=2)
    layout = layout_from_patterns(name, [(8, 4), (8, 4)], info, column_parallel=(r".*h_to_4h.*",))

Names of keys: deepspeed/checkpoint/constants.py; meaning: deepspeed/checkpoint/ds_to_universal.py, merge_tp_slices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from megatron.ucp.errors import LayoutError
from megatron.ucp.layout import Cut, Layout, Part, ShardRank

REPLICATED = "tp_replicated_parameter_patterns"
AVERAGED = "parameter_to_average_patterns"
ROW = "parameter_with_row_parallelism_patterns"
VOCABULARY = "vocabulary_parameter_patterns"
TIED = "pipeline_replicated_parameter_patterns"
TWO_PARTS = "parameter_with_2_sub_params_cat_dim_0"
PARTS = "parameter_with_sub_params"
WIDTHS = "sub_param_shard_widths"
REFUSED = "autotp_unsupported_parameter_patterns"
"""Pattern -> why DeepSpeed's converter is to stop."""
COLUMN = "parameter_with_column_parallelism_patterns"
"""Ours: DeepSpeed has no list for what it concatenates along dimension 0, and ignores this one."""


def universal_checkpoint_info(
    layouts: Mapping[str, Layout],
    *,
    tp_size: int | None = None,
    ep_size: int = 1,
    padded_vocab_size: int | None = None,
    tied: Iterable[str] = (),
) -> dict[str, Any]:
    """What DeepSpeed's ds_to_universal needs to merge a save with these layouts.

    Experts that are dealt to several ep ranks it is told to refuse: it would take them for parts of one shard.

    `tied` names the parameters that several pipeline stages hold. Without `tp_size` the widths of fused parts are left
    out and DeepSpeed assumes equal ones, which it checks. Uneven cuts of plain parameters need nothing; parts with
    `replicate_when_fewer` in force have no form in these lists, and DeepSpeed then refuses loudly.
    """
    lists: dict[str, list[str]] = {REPLICATED: [], AVERAGED: [], ROW: [], COLUMN: [], VOCABULARY: []}
    sub_params: list[dict[str, Any]] = []
    widths: dict[str, list[list[int]]] = {}
    vocabulary = None
    for pattern, layout in _patterns(layouts).items():
        if layout.is_averaged:
            lists[AVERAGED].append(pattern)
        elif not layout.is_cut_over("tp"):
            lists[REPLICATED].append(pattern)
        else:
            cut = next(cut for cut in layout.cuts if cut.axis == "tp")
            if len(cut.parts) > 1 or cut.dim > 1:
                shape = [n if d != cut.dim else tuple(p.size for p in cut.parts) for d, n in enumerate(layout.shape)]
                sub_params.append({"patterns": [pattern], "shape": tuple(shape), "partition_dim": cut.dim})
                if tp_size is not None:
                    widths[pattern] = [_widths(part, tp_size) for part in cut.parts]
            elif cut.dim == 1:
                lists[ROW].append(pattern)
            else:
                lists[COLUMN].append(pattern)
            if cut.padded is not None:
                lists[VOCABULARY].append(pattern)
                vocabulary = layout.shape[0], cut.padded
    info: dict[str, Any] = {
        # From 0.4 on the widths are required; before, an even split is assumed and checked.
        "universal_checkpoint_version": 0.4 if tp_size is not None else 0.3,
        **lists,
        PARTS: sub_params,
        TIED: [f"{re.escape(name)}$" for name in sorted(tied)],
    }
    if tp_size is not None:
        info[WIDTHS] = widths
    dealt = [pattern for pattern, layout in _patterns(layouts).items() if layout.is_cut_over("ep")]
    if ep_size > 1 and dealt:
        info[REFUSED] = dict.fromkeys(
            dealt, f"experts of {ep_size} expert-parallel ranks; convert with tools/ds_to_universal.py"
        )
    if vocabulary is not None:
        info["original_vocab_size"], info["padded_vocab_size"] = vocabulary[0], padded_vocab_size or vocabulary[1]
    return info


def layout_from_patterns(
    name: str, shards: list[tuple[int, ...]], info: Mapping[str, Any], column_parallel: tuple[str, ...] = ()
) -> Layout | None:
    """The layout of a parameter from its shards' shapes, by tp rank; None where no pattern says how it is cut.

    `column_parallel`: regular expressions of what is cut along dimension 0, which DeepSpeed has no list for."""
    shape = shards[0]
    tp_size = len(shards)
    is_vocabulary = _matches(info.get(VOCABULARY, []), name)
    if _matches(info.get(REPLICATED, []), name):
        return Layout.replicate(shape)
    if _matches(info.get(AVERAGED, []), name):
        return Layout.partial(shape)

    def joined(dim: int) -> tuple[int, ...]:
        return (*shape[:dim], sum(shard[dim] for shard in shards), *shape[dim + 1 :])

    if is_vocabulary:
        padded = joined(0)
        return Layout.shard_v((int(info["original_vocab_size"]), *padded[1:]), padded=padded[0])
    if _matches(info.get(TWO_PARTS, []), name):
        whole = joined(0)
        return Layout.shard_nc(whole, 0, (Part(whole[0] // 2), Part(whole[0] // 2)))
    for entry in info.get(PARTS, []):
        if _matches(entry["patterns"], name):
            dim = int(entry["partition_dim"])
            whole, sizes = joined(dim), entry["shape"][dim]
            if not isinstance(sizes, (tuple, list)):
                sizes = (whole[dim] // sizes,) * sizes
            return _cut_parts(whole, dim, [int(size) for size in sizes], _recorded_widths(info, name))
    if _matches(info.get(ROW, []), name) and len(shape) > 1:
        return Layout.shard_h(joined(1))
    if _matches((*info.get(COLUMN, []), *column_parallel), name):
        return Layout.shard_v(joined(0))
    return Layout.unique(shape) if tp_size == 1 else None


def _recorded_widths(info: Mapping[str, Any], name: str) -> list[list[int]] | None:
    """By part, what each rank has of it; None where they are not recorded (before version 0.4) and so even."""
    held = info.get(WIDTHS) or {}
    return next((widths for pattern, widths in held.items() if re.match(pattern, name)), None)


def _cut_parts(whole: tuple[int, ...], dim: int, sizes: list[int], widths: list[list[int]] | None) -> Layout:
    """Raises LayoutError where the widths are not those of the parts."""
    plain = Layout.shard_nc(whole, dim, tuple(map(Part, sizes)))
    if widths is None or _is_so_cut(plain, widths):
        return plain
    if [sum(of_part) for of_part in widths] != sizes or len({len(of_part) for of_part in widths}) != 1:
        raise LayoutError("widths of other parts than the parameter has", found=widths, expected=f"parts of {sizes}")
    spans: list[list[tuple[int, int]]] = [[] for _ in widths[0]]
    start = 0
    for of_part in widths:
        for held, width in zip(spans, of_part):
            if width:
                held.append((start, start + width))
            start += width
    cut = Cut(dim, (Part(whole[dim]),), spans=tuple(map(tuple, spans)))
    return Layout("shard_nc", whole, (cut,))


def _is_so_cut(layout: Layout, widths: list[list[int]]) -> bool:
    try:
        return [_widths(part, len(widths[0])) for part in layout.cuts[0].parts] == widths
    except LayoutError:  # fewer elements than ranks
        return False


def refused_by_patterns(name: str, info: Mapping[str, Any]) -> str | None:
    """Why DeepSpeed's converter is to refuse the parameter, where it is."""
    return next((str(why) for pattern, why in (info.get(REFUSED) or {}).items() if re.match(pattern, name)), None)


def _patterns(layouts: Mapping[str, Layout]) -> dict[str, Layout]:
    """Regular expressions, one for all layers where they agree, else one per name."""
    general: dict[str, list[str]] = {}
    for name in layouts:
        general.setdefault(re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) + "$", []).append(name)
    patterns: dict[str, Layout] = {}
    for pattern, names in general.items():
        if len({layouts[name] for name in names}) == 1:
            patterns[pattern] = layouts[names[0]]
        else:
            patterns.update({f"{re.escape(name)}$": layouts[name] for name in names})
    return patterns


def _widths(part: Part, tp_size: int) -> list[int]:
    whole = Layout.shard_nc((part.size,), 0, (part,))
    return [whole.shard_shape(ShardRank(tp, tp_size))[0] for tp in range(tp_size)]


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)
