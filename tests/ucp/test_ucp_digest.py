"""The digest: plain Python, numpy and C++ agree; it does not depend on the partition and does depend on the state."""

import hashlib
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.ucp import native
from megatron.ucp.digest import _CHUNK, Digest, digest_runs, digest_tensor, total
from megatron.ucp.layout import Layout, Part, ShardRank
from megatron.ucp.runs import shard_runs

M = (1 << 64) - 1


def plain(values, indices, name, state, shape) -> Digest:
    """The definition, element by element."""
    raw = hashlib.blake2b("\0".join((name, state, "float32", shape)).encode(), digest_size=16).digest()
    seed0, seed1 = int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")
    lane0 = lane1 = 0
    for bits, index in zip(np.asarray(values, dtype=np.float32).view(np.uint32).tolist(), indices):
        x = (((index & 0xFFFFFFFF) << 32 | bits) + seed0 + (index >> 32) * 0x9E3779B97F4A7C15) & M
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & M
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & M
        x ^= x >> 31
        k = ((x + seed1) * 0xD6E8FEB86659FD93) & M
        lane0, lane1 = (lane0 + x) & M, (lane1 + (k ^ k >> 32)) & M
    return Digest(lane0, lane1)


def test_where_there_is_a_compiler_there_is_the_kernel():
    """Without it the tests of the kernel are skipped, and a conversion takes three times as long."""
    text = (Path(native.__file__).parent / "kernel.cpp").read_text()
    assert f'm.attr("VERSION") = {native.VERSION};' in text
    assert native.kernel is not None or not shutil.which("g++"), "run make install"


@pytest.mark.parametrize(
    "use_kernel", [pytest.param(True, marks=pytest.mark.skipif(native.kernel is None, reason="not built")), False]
)
@pytest.mark.parametrize("start", [0, 1000, (1 << 32) - 7, (5 << 32) + 3])
def test_equals_the_definition(use_kernel, start):
    values = torch.randn(500, generator=torch.Generator().manual_seed(1))
    runs = np.array([[start, 10, 100], [start + 200, 300, 150], [start + 900, 0, 3]], dtype=np.int64)
    picked = torch.cat([values[b : b + n] for _, b, n in runs])
    indices = [a + i for a, _, n in runs.tolist() for i in range(n)]
    found = digest_runs(values, runs, name="w", state="fp32", shape=(3, 4), use_kernel=use_kernel)
    assert found == plain(picked, indices, "w", "fp32", "3x4")


def test_numpy_and_kernel_agree_across_chunks_and_many_short_runs():
    values = torch.randn(3 * _CHUNK + 17, generator=torch.Generator().manual_seed(2))
    long = np.array([[5, 0, len(values)]])
    short = np.array([[9 * i, 3 * i, 3] for i in range(100_000)])
    for runs in (long, short):
        both = [digest_runs(values, runs, name="w", state="s", shape=(1,), use_kernel=k) for k in (True, False)]
        assert both[0] == both[1]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from([1, 2, 3, 4, 12, 130]), st.integers(1, 9), st.integers(0, 1000))
def test_every_partition_gives_the_digest_of_the_whole(tp_size, dp_size, seed):
    kv = Part(2, 2, True)
    rows = max(2 * tp_size, 4)
    layouts = [
        Layout.replicate((5, 3)),
        Layout.shard_v((11, 2), padded=tp_size * 4 if tp_size * 4 > 11 else tp_size * 11),
        Layout.shard_nc((rows + 4, 3), 0, (Part(rows, 2), kv, kv)),
    ]
    for layout in layouts:
        atomic = torch.randn(layout.shape, generator=torch.Generator().manual_seed(seed))
        parts = []
        for tp in range(tp_size):
            rank = ShardRank(tp, tp_size)
            shard = layout.split(atomic, rank).flatten()
            edges = sorted(random.Random(seed).choices(range(len(shard) + 1), k=dp_size - 1))
            for start, stop in zip([0, *edges], [*edges, len(shard)]):
                runs = shard_runs(layout, rank, start, stop, owned=True)
                parts.append(digest_runs(shard[start:stop], runs, name="n", state="s", shape=layout.shape))
        random.Random(seed).shuffle(parts)
        assert sum(parts, Digest()) == digest_tensor(atomic, name="n", state="s")


def changed(values, index, value):
    values = values.clone()
    values.view(-1)[index] = value
    return values


BASE = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
FAULTS = {
    "one ulp": changed(BASE, 7, np.nextafter(BASE.view(-1)[7].item(), 9, dtype=np.float32).item()),
    "sign": changed(BASE, 7, -BASE.view(-1)[7]),
    "minus zero": changed(changed(BASE, 0, 0.0), 0, -0.0),
    "rolled": BASE.roll(1),
    "two swapped": BASE.view(-1)[torch.tensor([1, 0, *range(2, 24)])].view(4, 6),
    "transposed": BASE.t().contiguous(),
    "reshaped": BASE.view(6, 4),
    "moment by 0.1 percent": BASE * 1.001,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_detects(fault):
    base = changed(BASE, 0, 0.0) if fault == "minus zero" else BASE
    assert digest_tensor(FAULTS[fault], name="w", state="s") != digest_tensor(base, name="w", state="s")


def test_name_and_state_count():
    d = digest_tensor(BASE, name="w", state="s")
    assert len({d, digest_tensor(BASE, name="v", state="s"), digest_tensor(BASE, name="w", state="t")}) == 3


def test_low_precision_counts_as_its_exact_float32_values():
    low = BASE.bfloat16()
    assert digest_tensor(low, name="w", state="s") == digest_tensor(low.float(), name="w", state="s")


def test_signed_pairs_add_up_as_an_all_reduce_would():
    parts = [digest_tensor(BASE * i, name="w", state="s") for i in range(1, 6)]
    summed = torch.tensor([p.to_int64_pair() for p in parts]).sum(0)
    assert Digest.from_int64_pair(summed.tolist()) == sum(parts, Digest())
    assert Digest.from_hex(parts[0].hex()) == parts[0] and parts[0] + parts[1] - parts[1] == parts[0]


def test_total_is_the_sum():
    a, b = digest_tensor(BASE, name="a", state="s"), digest_tensor(BASE, name="b", state="s")
    assert total({"a": {"s": a.hex()}, "b": {"s": b.hex()}}) == (a + b).hex()


@pytest.mark.parametrize("use_kernel", [True, False])
def test_a_run_outside_its_tensor_is_refused(use_kernel):
    with pytest.raises(IndexError):
        digest_runs(torch.zeros(4), np.array([[0, 2, 3]]), name="w", state="s", shape=(4,), use_kernel=use_kernel)
