"""The state digest: 128 bits that say whether two training states are the same, whatever they were cut into.

A digest is a sum over elements of a hash of (bit pattern, index in the atomic parameter, parameter name,
state name), so it adds up over any partition: each rank digests the runs it owns, one integer SUM all-reduce ends it,
and the same state has the same digest under every topology, padding and ZeRO stage.

    runs = shard_runs(layout, rank, start, stop, owned=True)
    part = digest_runs(flat, runs, name=name, state="exp_avg", shape=layout.shape)
    whole = sum(parts, Digest())      # or: all_reduce(torch.tensor(part.to_int64_pair())), Digest.from_int64_pair(...)

It guards against accident, not against an adversary. Each element must be counted exactly once: replicas by one owner,
padding by nobody. -0.0 and 0.0 differ; bf16 and fp16 states count as their exact fp32 values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron.ucp import native
from megatron.ucp.runs import Runs

if TYPE_CHECKING:
    import torch

_MASK = (1 << 64) - 1
_CHUNK = 1 << 17
"""Elements; the temporaries of a chunk stay in the cache (measured best of 8k, 32k, 128k)."""
_HIGH_INDEX = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Digest:
    lane0: int = 0
    lane1: int = 0

    def __add__(self, other: Digest) -> Digest:
        return Digest((self.lane0 + other.lane0) & _MASK, (self.lane1 + other.lane1) & _MASK)

    def __sub__(self, other: Digest) -> Digest:
        return Digest((self.lane0 - other.lane0) & _MASK, (self.lane1 - other.lane1) & _MASK)

    def hex(self) -> str:
        return f"{self.lane0:016x}{self.lane1:016x}"

    @classmethod
    def from_hex(cls, text: str) -> Digest:
        if len(text) != 32:
            raise ValueError(f"a digest has 32 hexadecimal digits, found {text!r}")
        return cls(int(text[:16], 16), int(text[16:], 16))

    def to_int64_pair(self) -> tuple[int, int]:
        """As signed integers, for a SUM all-reduce of int64, which wraps as the digest does."""
        first, second = (lane - (1 << 64) if lane >> 63 else lane for lane in (self.lane0, self.lane1))
        return first, second

    @classmethod
    def from_int64_pair(cls, pair: Sequence[int]) -> Digest:
        return cls(int(pair[0]) & _MASK, int(pair[1]) & _MASK)


def seeds(name: str, state: str, shape: Sequence[int]) -> tuple[int, int]:
    """The two lanes' seeds; `shape` is the atomic one, so a transposed parameter is another parameter."""
    text = "\0".join((name, state, "float32", "x".join(str(int(n)) for n in shape)))
    raw = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")


def digest_runs(
    values: torch.Tensor | np.ndarray,
    runs: Runs,
    *,
    name: str,
    state: str,
    shape: Sequence[int],
    use_kernel: bool = True,
) -> Digest:
    """Digest of the elements that `runs` names in the flat `values` (any device; floating point)."""
    bits = _float32_bits(values)
    seed0, seed1 = seeds(name, state, shape)
    runs = np.ascontiguousarray(runs, dtype=np.int64)
    if native.kernel is not None and use_kernel:
        lanes = native.kernel.digest_runs(bits.ctypes.data, bits.size, runs.ctypes.data, len(runs), seed0, seed1)
        return Digest(*lanes)
    return _digest_numpy(bits, runs, seed0, seed1)


def digest_tensor(atomic: torch.Tensor, *, name: str, state: str) -> Digest:
    """Digest of a whole atomic parameter."""
    whole = np.array([[0, 0, atomic.numel()]], dtype=np.int64)
    return digest_runs(atomic.reshape(-1), whole, name=name, state=state, shape=tuple(atomic.shape))


def total(digests: dict[str, dict[str, str]]) -> str:
    """One line for a whole state: the sum over parameters and states, as hex."""
    return sum((Digest.from_hex(h) for states in digests.values() for h in states.values()), Digest()).hex()


def _float32_bits(values: torch.Tensor | np.ndarray) -> np.ndarray:
    if not isinstance(values, np.ndarray):
        import torch

        values = values.detach().to(device="cpu", dtype=torch.float32).contiguous().view(-1).numpy()
    values = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
    return values.view(np.uint32)


def _digest_numpy(bits: np.ndarray, runs: Runs, seed0: int, seed1: int) -> Digest:
    if len(runs) and (runs[:, 1].min() < 0 or (runs[:, 1] + runs[:, 2]).max() > bits.size):
        raise IndexError("a run leaves its tensor")
    lane0 = lane1 = 0
    parts: Iterable[tuple[np.ndarray, np.ndarray]]
    for first, last in _batches(runs[:, 2]):
        batch = runs[first:last]
        if len(batch) == 1:
            start, local, length = (int(n) for n in batch[0])
            blocks = ((start + a, local + a, min(_CHUNK, length - a)) for a in range(0, length, _CHUNK))
            parts = ((np.arange(s, s + n, dtype=np.uint64), bits[b : b + n]) for s, b, n in blocks)
        else:
            within = np.arange(int(batch[:, 2].sum())) - np.repeat(np.cumsum(batch[:, 2]) - batch[:, 2], batch[:, 2])
            index = np.repeat(batch[:, 0], batch[:, 2]) + within
            parts = ((index.astype(np.uint64), bits[np.repeat(batch[:, 1], batch[:, 2]) + within]),)
        for index, words in parts:
            a, b = _mix_sum(index, words, np.uint64(seed0), np.uint64(seed1))
            lane0, lane1 = (lane0 + a) & _MASK, (lane1 + b) & _MASK
    return Digest(lane0, lane1)


def _batches(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Ranges of runs that together fill about a chunk: many short runs must not cost a Python step each."""
    if not len(lengths):
        return []
    number = np.cumsum(lengths) // _CHUNK
    edges = np.flatnonzero(np.diff(number)) + 1
    return list(zip(np.concatenate(([0], edges)), np.concatenate((edges, [len(lengths)]))))


def _mix_sum(index: np.ndarray, words: np.ndarray, seed0: np.uint64, seed1: np.uint64) -> tuple[int, int]:
    u = np.uint64
    with np.errstate(over="ignore"):
        x = (index << u(32)) | words
        x += seed0 + (index >> u(32)) * u(_HIGH_INDEX)
        x ^= x >> u(30)
        x *= u(0xBF58476D1CE4E5B9)
        x ^= x >> u(27)
        x *= u(0x94D049BB133111EB)
        x ^= x >> u(31)
        first = int(x.sum(dtype=np.uint64))
        x += seed1
        x *= u(0xD6E8FEB86659FD93)
        x ^= x >> u(32)
        return first, int(x.sum(dtype=np.uint64))
