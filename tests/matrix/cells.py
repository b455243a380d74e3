"""The cells of the matrix: topologies and ZeRO stages that the spine supports, by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: int = 0
    sp: int = 1
    """Ulysses: ranks that share a sequence."""
    cut: bool = False
    """Megatron's --sequence-parallel: activations cut along the sequence over tp."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp * self.sp

    @property
    def name(self) -> str:
        sequence = (f"sp{self.sp}" if self.sp > 1 else "") + ("-cut" if self.cut else "")
        return f"tp{self.tp}pp{self.pp}dp{self.dp}{sequence}-zero{self.zero}"

    @property
    def flags(self) -> dict[str, int]:
        sequence = {"ds_sequence_parallel_size": self.sp} if self.sp > 1 else {}
        if self.cut:
            sequence["sequence_parallel"] = True
        return {"tp": self.tp, "pp": self.pp, "zero": self.zero, **sequence}


TOPOLOGIES = ({}, {"dp": 2}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}, {"tp": 2, "dp": 2})
CELLS = tuple(
    Cell(**degrees, zero=zero)
    for degrees in TOPOLOGIES
    for zero in (0, 1, 2, 3)
    if not (degrees.get("pp", 1) > 1 and zero > 1)  # DeepSpeed's pipeline engine takes ZeRO-0 and 1 only
)
MIN_CELLS = 20
