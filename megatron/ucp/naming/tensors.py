"""Where the elements of their tensors lie in ours: names, shapes and runs, the same in both directions.

for pair in pairs(names, model):
    pair.name, pair.shape                  # "model.layers.0.self_attn.k_proj.weight", (64, 576)
    pair.ours, pair.runs                   # "layers.0.attention.query_key_value.weight", [[atomic, theirs, length]]

A run counts elements of the flattened tensors. Of a transposed one it counts those of their tensor as [out, in].
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron.ucp.naming.adapters import KINDS, PEFT, chosen_parts
from megatron.ucp.naming.gpt_model import GptModel, layouts
from megatron.ucp.naming.names import BY_GROUP, BY_RANK, TRANSPOSED, Names, Theirs
from megatron.ucp.runs import Runs, whole_runs

_BLOCK = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True, eq=False)
class Pair:
    name: str
    shape: tuple[int, ...]
    """On the disk."""
    ours: str
    runs: Runs
    """By ascending places in our parameter."""
    is_transposed: bool = False


def pairs(names: Names, model: GptModel, *, has_whole_experts: bool = False) -> list[Pair]:
    """Of all tensors of a folder, in our parameters' order. `has_whole_experts`: a block's experts are one tensor."""
    return [
        pair
        for name, layout in layouts(model).items()
        for pair in _pairs_of(names, model, name, layout.shape, has_whole_experts)
    ]


def _pairs_of(names: Names, model: GptModel, name: str, shape: tuple[int, ...], whole: bool) -> Iterator[Pair]:
    match = _BLOCK.fullmatch(name)
    path = match[2] if match else name
    module, dot, kind = path.rpartition(".")
    if match and kind in KINDS:
        prefix = f"{PEFT}{names.prefix}{names.layers.format(match[1])}"
        yield from _of_adapter(names.block[module], model, prefix, module, kind, name, shape)
        return
    if kind not in ("weight", "bias"):
        module, dot, kind = path, ".", "weight"
    if not match:
        theirs = names.lm_head if module == "lm_head" else names.prefix + names.top[module]
        yield Pair(f"{theirs}{dot}{kind}", shape, name, whole_runs(math.prod(shape)))
        return
    prefix = names.prefix + names.layers.format(match[1])
    if whole and module in names.whole_experts:
        suffix = "" if module.startswith("mlp.experts.") else ".weight"
        yield Pair(f"{prefix}{names.whole_experts[module]}{suffix}", shape, name, whole_runs(math.prod(shape)))
        return
    entry = names.block[module]
    if module.startswith("mlp.experts."):
        yield from _of_experts(entry, model, f"{prefix}{{}}.{kind}", name, shape)
        return
    for part, runs, rows in _rows(entry, model, shape):
        theirs_shape = (rows, *shape[1:])
        is_transposed = entry.form == TRANSPOSED and len(shape) == 2
        yield Pair(
            f"{prefix}{part}.{kind}", theirs_shape[::-1] if is_transposed else theirs_shape, name, runs, is_transposed
        )


def _of_adapter(
    entry: Theirs, model: GptModel, prefix: str, module: str, kind: str, name: str, shape: tuple[int, ...]
) -> Iterator[Pair]:
    """As PEFT saves them: of each of their matrices [rank, in] and [rows, rank], of a transposed one too."""
    suffix = "lora_A.weight" if kind == "lora_a" else "lora_B.weight"
    if len(entry.modules) == 1:
        runs = next(_rows(entry, model, shape))[1] if kind == "lora_b" else whole_runs(math.prod(shape))
        yield Pair(f"{prefix}{entry.modules[0]}.{suffix}", shape, name, runs)
        return
    chosen = chosen_parts(module, model.lora_projections, model.swiglu)
    q, kv = (count * model.kv_channels for count in (model.num_attention_heads, model.num_key_value_heads))
    sizes = (q, kv, kv) if len(entry.modules) == 3 else (model.ffn_hidden_size,) * 2
    start, columns = 0, shape[1]
    for part, size, is_chosen in zip(entry.modules, sizes, chosen, strict=True):
        if is_chosen:
            rows = model.lora_rank if kind == "lora_a" else size
            runs = np.array([[start * columns, 0, rows * columns]], dtype=np.int64)
            yield Pair(f"{prefix}{part}.{suffix}", (rows, columns), name, runs)
            start += rows


def _rows(entry: Theirs, model: GptModel, shape: tuple[int, ...]) -> Iterator[tuple[str, Runs, int]]:
    """(module, runs, rows) of each part of ours, [rows, ...]."""
    row = math.prod(shape[1:])
    if entry.form == BY_GROUP:
        shared = model.num_attention_heads // model.num_key_value_heads
        yield entry.modules[0], _by_group(model.num_key_value_heads, shared, 1, model.kv_channels * row), shape[0]
        return
    if entry.form == BY_RANK:
        of_rank = (model.num_attention_heads // entry.ranks, model.num_key_value_heads // entry.ranks)
        yield entry.modules[0], _by_group(entry.ranks, *of_rank, model.kv_channels * row), shape[0]
        return
    start = 0
    for module, rows in zip(entry.modules, _part_sizes(entry, model, shape[0]), strict=True):
        yield module, np.array([[start * row, 0, rows * row]], dtype=np.int64), rows
        start += rows


@lru_cache(maxsize=8)
def _by_group(groups: int, queries: int, keys: int, length: int) -> Runs:
    """Theirs [groups, its queries|keys|values, head], ours [q|k|v, heads, head], a head of `length` elements. The same
    for all blocks."""
    group = np.arange(groups, dtype=np.int64)
    start = group * (queries + 2 * keys) * length

    def part(heads: int, ours: int, before: int) -> Runs:
        own = (ours + group * heads) * length
        return np.stack([own, start + before * length, np.full(groups, heads * length)], axis=1)

    first_key, first_value = groups * queries, groups * (queries + keys)
    parts = part(queries, 0, 0), part(keys, first_key, queries), part(keys, first_value, queries + keys)
    return np.concatenate(parts)


def _of_experts(entry: Theirs, model: GptModel, name: str, ours: str, shape: tuple[int, ...]) -> Iterator[Pair]:
    """Ours: [experts, rows, ...]; theirs one by one."""
    row, of_expert = math.prod(shape[2:]), math.prod(shape[1:])
    for expert in range(shape[0]):
        start = expert * of_expert
        for module, rows in zip(entry.modules, _part_sizes(entry, model, shape[1]), strict=True):
            runs = np.array([[start, 0, rows * row]], dtype=np.int64)
            yield Pair(name.format(module.format(expert)), (rows, *shape[2:]), ours, runs)
            start += rows * row


def _part_sizes(entry: Theirs, model: GptModel, rows: int) -> tuple[int, ...]:
    if len(entry.modules) == 3:
        kv = model.num_key_value_heads * model.kv_channels
        return rows - 2 * kv, kv, kv
    return (rows // len(entry.modules),) * len(entry.modules)
