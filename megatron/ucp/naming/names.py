"""What a program calls the parameters of a GPT or LLaMA, in the words of ours. One table serves both directions.

names.block["attention.query_key_value"].modules        # ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

ROWS, TRANSPOSED, BY_GROUP, BY_RANK = "rows", "transposed", "by group", "by rank"


@dataclass(frozen=True)
class Theirs:
    """What one of our parameters (without ".weight" or ".bias") is there."""

    modules: tuple[str, ...]
    """Whose rows stand one after the other in ours: q, k, v; or gate, up. "{}" is an expert's number."""
    form: str = ROWS
    """Of a matrix. ROWS: [out, in], as ours. TRANSPOSED: [in, out] (GPT-2's Conv1D). BY_GROUP: its rows are, for each
    key/value head, the query heads that share it, the key, the value; ours are all queries, all keys, all values.
    BY_RANK: for each of `ranks` tensor-parallel ranks, its queries, its keys, its values."""
    ranks: int = 1


def theirs(*modules: str, form: str = ROWS) -> Theirs:
    return Theirs(modules, form)


@dataclass(frozen=True, kw_only=True)
class Names:
    title: str
    """Of the architecture or the program."""
    prefix: str = ""
    """Of the names in front of the output layer; older files leave it out."""
    layers: str
    """Of a block's names, after the prefix."""
    top: Mapping[str, str]
    """Ours -> theirs, after the prefix, but for the output layer."""
    block: Mapping[str, Theirs]
    lm_head: str = "lm_head"
    whole_experts: Mapping[str, str] = field(default_factory=dict)
    """Ours -> theirs where a block's experts are one tensor. The router is called otherwise then, too."""
    ignored: re.Pattern[str] = re.compile(r".*\.rotary_emb\.inv_freq")
    """Names that are no parameters: tables and masks that older versions saved."""
