"""The matrix: one tiny model that every topology here can take, the topologies, and the families of named cases.

    Cell(tp=2, pp=2, dp=2, zero=1).name          # "tp2pp2dp2-z1"
    Cell(dp=4, ep=2, model="moe").name           # "moe-tp1pp1dp4ep2-z0", of matrix/families.py
    sources_of(target)                           # every Source that a family brings to this Target

The model has 12 heads and 5 blocks, so that tensor parallel sizes 1 to 4 divide it and stages are uneven; its
vocabulary of 101 is padded differently by each of them; a global batch of 12 is divided by 1 to 4 ranks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MODEL = {
    "num_layers": 5,
    "hidden_size": 24,
    "num_attention_heads": 12,
    "seq_length": 16,
    "max_position_embeddings": 16,
    "global_batch_size": 12,
}


@dataclass(frozen=True)
class Cell:
    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: int = 0
    sp: int = 1
    """Ulysses: ranks that share a sequence."""
    ep: int = 1
    """Ranks of dp x sp that share the experts."""
    cut: bool = False
    """Megatron's --sequence-parallel: activations cut along the sequence over tp."""
    how: str = ""
    """"uniform" or "parameters": DeepSpeed's way of dealing the model to stages; "plain": at one stage the plain model
    and not a PipelineModule of one stage (which ZeRO-2 and 3 never are)."""
    model: str = ""
    """A model of matrix/families.py; empty for MODEL."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp * self.sp

    @property
    def name(self) -> str:
        extra = (f"sp{self.sp}" if self.sp > 1 else "") + (f"ep{self.ep}" if self.ep > 1 else "")
        extra += ("-cut" if self.cut else "") + (f"-{self.how}" if self.how else "")
        model = f"{self.model}-" if self.model else ""
        return f"{model}tp{self.tp}pp{self.pp}dp{self.dp}{extra}-z{self.zero}"

    @property
    def flags(self) -> dict[str, object]:
        flags: dict[str, object] = {"tp": self.tp, "pp": self.pp, "zero": self.zero}
        if self.sp > 1:
            flags["ds_sequence_parallel_size"] = self.sp
        if self.ep > 1:
            flags["moe_expert_parallel_size"] = self.ep
        if self.cut:
            flags["sequence_parallel"] = True
        if self.how == "plain":
            flags["no_pipeline_parallel"] = True
        elif self.how:
            flags["pp_partition_method"] = self.how
        return flags


def cell(name: str) -> Cell:
    """From its name: "tp2pp2dp2-z1", "tp1pp1dp2sp2-z1", "tp2pp1dp1-cut-z3", "moe-tp1pp4dp2ep2-uniform-z1"."""
    match = re.fullmatch(
        r"(?:(\w+)-)?tp(\d)pp(\d)dp(\d)(?:sp(\d))?(?:ep(\d))?(-cut)?(?:-(uniform|parameters|plain))?-z(\d)", name
    )
    model, tp, pp, dp, sp, ep, cut, how, zero = match.groups()
    return Cell(int(tp), int(pp), int(dp), int(zero), int(sp or 1), int(ep or 1), bool(cut), how or "", model or "")


def cells(names: str) -> tuple[Cell, ...]:
    return tuple(cell(name) for name in names.split())


PAPER = cell("tp2pp2dp2-z1")
FIG_7A = cells(
    "tp1pp1dp1-z1 tp1pp1dp2-z3 tp1pp1dp2sp2-z1 tp1pp1dp4-z2 tp1pp1dp4-z3 tp1pp2dp2-z1 tp2pp1dp1-z1 tp2pp1dp2-z1 "
    "tp2pp1dp2-z2 tp2pp2dp1-z1 tp2pp2dp2-z1"
)
"""Targets of Lian et al. 2025, figure 7a, from PAPER."""
FIG_7B = cells(
    "tp1pp1dp1-z1 tp1pp1dp2-z3 tp1pp1dp2sp2-z1 tp1pp1dp4-z2 tp1pp1dp4-z3 tp1pp2dp2-z1 tp2pp1dp2-z2 tp2pp2dp1-z1"
)
"""Sources of figure 7b, to PAPER."""
FIG_8 = (
    (cell("tp1pp1dp4-z0"), cell("tp1pp1dp2-z0")),  # data parallel degree
    (cell("tp1pp1dp4-z0"), cell("tp1pp1dp4-z2")),  # to ZeRO
    (cell("tp2pp2dp1-z0"), cell("tp4pp1dp1-z0")),  # model parallel degrees
)
"""Pairs of figure 8; its fourth, of experts, is not of this model."""

SQUARES = {
    "ZeRO stages and dp sizes": tuple(Cell(dp=dp, zero=zero) for zero in (0, 1, 2, 3) for dp in (1, 2, 3, 4)),
    "tp sizes, uneven vocabulary": cells(
        "tp1pp1dp1-plain-z0 tp2pp1dp1-plain-z1 tp3pp1dp1-z0 tp3pp1dp1-z1 tp3pp1dp1-z3 tp4pp1dp1-z1 tp4pp1dp1-z2 "
        "tp2pp1dp2-z3"
    ),
    "stages of five blocks": cells(
        "tp1pp1dp1-z0 tp1pp2dp1-z0 tp1pp2dp1-z1 tp1pp4dp1-z0 tp1pp4dp1-z1 tp1pp3dp1-uniform-z1 tp1pp4dp1-parameters-z1"
    ),
    "sequence parallel": cells(
        "tp1pp1dp1-z1 tp1pp1dp1sp2-z0 tp1pp1dp1sp2-z1 tp1pp1dp1sp2-z2 tp1pp1dp1sp2-z3 tp1pp1dp1sp4-z1 tp2pp1dp1-cut-z1 "
        "tp2pp1dp1-cut-z3"
    ),
    "three and four degrees": cells(
        "tp1pp1dp1-z0 tp2pp2dp2-z1 tp2pp2dp1sp2-z1 tp2pp2dp2-cut-z0 tp2pp1dp2sp2-cut-z2 tp2pp1dp2sp2-z3 tp1pp2dp2sp2-z1"
    ),
}
"""Families of which every member is a Source for every other."""

PAIRS: dict[tuple[Cell, Cell], str] = {
    **{(a, b): family for family, cells in SQUARES.items() for a in cells for b in cells},
    **{(PAPER, target): "figure 7a" for target in FIG_7A},
    **{(source, PAPER): "figure 7b" for source in FIG_7B},
    **dict.fromkeys(FIG_8, "figure 8"),
}
"""(Source, Target) -> the family it is there for."""

SOURCES = tuple(dict.fromkeys(source for source, _ in PAIRS))
TARGETS = tuple(dict.fromkeys(target for _, target in PAIRS))


def sources_of(target: Cell) -> tuple[Cell, ...]:
    return tuple(source for source, other in PAIRS if other == target)
