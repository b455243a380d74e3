"""Which rank sits where: the arithmetic of ranks and parallel degrees, and nothing else.

Ranks count through (pp, dp, sp, tp), slowest first, which is DeepSpeed's own order
(`deepspeed/runtime/pipe/topology.py`, PipeModelDataParallelTopology); experts are dealt to consecutive dp ranks.

    topology = Topology(tp_size=2, pp_size=2, dp_size=2)
    topology.coords(5)             # RankCoords(pp=1, dp=0, sp=0, tp=1)
    topology.groups("tp")          # [[0, 1], [2, 3], [4, 5], [6, 7]]
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from megatron.ucp.errors import UcpError

_AXES = {
    "pp": ("dp", "sp", "tp"),
    "dp": ("pp", "sp", "tp"),
    "sp": ("pp", "dp", "tp"),
    "tp": ("pp", "dp", "sp"),
    "zero": ("pp", "tp"),
    "ep": ("pp", "edp", "tp"),
    "edp": ("pp", "ep", "tp"),
    "ep_tp": ("pp", "edp"),
}
"""By axis, what the ranks of one group have in common."""


@dataclass(frozen=True)
class RankCoords:
    pp: int
    dp: int
    sp: int
    tp: int


@dataclass(frozen=True)
class Topology:
    dp_size: int = 1
    tp_size: int = 1
    pp_size: int = 1
    sp_size: int = 1
    """Ulysses sequence parallelism; ZeRO partitions over dp x sp."""
    ep_size: int = 1
    """Expert parallelism lies inside dp (x sp): it adds no ranks."""

    def __post_init__(self) -> None:
        bad = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if not isinstance(getattr(self, f.name), int) or getattr(self, f.name) < 1
        }
        if bad:
            raise UcpError("a parallel degree must be a whole number of at least 1", found=bad)
        if self.zero_size % self.ep_size:
            raise UcpError(
                "ep_size must divide dp_size x sp_size", found=f"ep_size {self.ep_size}", expected=self.zero_size
            )

    @property
    def world_size(self) -> int:
        return self.pp_size * self.dp_size * self.sp_size * self.tp_size

    @property
    def zero_size(self) -> int:
        """Ranks over which ZeRO partitions one (pp, tp) shard."""
        return self.dp_size * self.sp_size

    def coords(self, rank: int) -> RankCoords:
        if not 0 <= rank < self.world_size:
            raise UcpError("no such rank", found=rank, expected=f"0..{self.world_size - 1}", where=str(self))
        rank, tp = divmod(rank, self.tp_size)
        rank, sp = divmod(rank, self.sp_size)
        pp, dp = divmod(rank, self.dp_size)
        return RankCoords(pp=pp, dp=dp, sp=sp, tp=tp)

    def rank_of(self, *, pp: int = 0, dp: int = 0, sp: int = 0, tp: int = 0) -> int:
        return ((pp * self.dp_size + dp) * self.sp_size + sp) * self.tp_size + tp

    def zero_rank(self, coords: RankCoords) -> int:
        """Index among the ranks that share a (pp, tp) shard: the number in ZeRO's file names."""
        return coords.dp * self.sp_size + coords.sp

    @property
    def edp_size(self) -> int:
        """Ranks over which ZeRO partitions the experts of one (pp, tp, ep) shard."""
        return self.zero_size // self.ep_size

    def ep_rank(self, coords: RankCoords) -> int:
        return self.zero_rank(coords) % self.ep_size

    def edp_rank(self, coords: RankCoords) -> int:
        """Index among the ranks that hold the same experts."""
        return self.zero_rank(coords) // self.ep_size

    def mp_rank(self, *, pp: int, tp: int) -> int:
        """The number in DeepSpeed's `mp_rank_XX` file names."""
        return pp * self.tp_size + tp

    def groups(self, axis: str) -> list[list[int]]:
        """Ranks that differ only along `axis`, every group sorted, in order of first rank. Axes: "pp", "dp", "sp",
        "tp"; "zero" is dp and sp together, of which "ep" (who share all experts) and "edp" (who hold the same experts)
        are the two factors; "ep_tp" is ep and tp together."""
        if axis not in _AXES:
            raise UcpError("unknown axis", found=axis, expected=list(_AXES))
        groups: dict[tuple, list[int]] = {}
        for rank in range(self.world_size):
            at = self.coords(rank)
            place = {
                "pp": at.pp,
                "dp": at.dp,
                "sp": at.sp,
                "ep": self.ep_rank(at),
                "edp": self.edp_rank(at),
                "tp": at.tp,
            }
            groups.setdefault(tuple(place[name] for name in _AXES[axis]), []).append(rank)
        return list(groups.values())

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> Topology:
        return cls(**data)

    def __str__(self) -> str:
        extra = "".join(f" {label}{size}" for label, size in (("sp", self.sp_size), ("ep", self.ep_size)) if size > 1)
        return f"tp{self.tp_size} pp{self.pp_size} dp{self.dp_size}{extra}"
