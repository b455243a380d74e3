"""Layouts, runs and topologies: against plain index arithmetic, over random shapes and up to 130 ranks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.ucp.errors import LayoutError, ReplicaMismatchError, UcpError
from megatron.ucp.layout import Cut, Layout, Part, ShardRank
from megatron.ucp.runs import clip_atomic, intersect, shard_runs, tiling_faults, whole_runs
from megatron.ucp.topology import RankCoords, Topology

quick = settings(max_examples=50, deadline=None, derandomize=True)


@st.composite
def cut_layouts(draw):
    """(layout, tp_size) of every pattern, uneven cuts, padding and shared heads included."""
    tp_size = draw(st.sampled_from([1, 2, 3, 4, 7, 12, 130]))
    rest = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
    kind = draw(st.sampled_from(["replicate", "unique", "shard_v", "shard_h", "vocabulary", "shard_nc", "shard_hy"]))
    extent = tp_size + draw(st.integers(0, 2 * tp_size))
    if kind in ("replicate", "unique"):
        return getattr(Layout, kind)((extent, *rest)), tp_size
    if kind == "shard_v":
        unit = draw(st.integers(1, 3))
        return Layout.shard_v((extent * unit, *rest), unit=unit), tp_size
    if kind == "shard_h":
        return Layout.shard_h((2, extent, *rest)), tp_size
    if kind == "vocabulary":
        padded = tp_size * draw(st.integers(1, 4))
        # Whole ranks may hold nothing but padding.
        return Layout.shard_v((draw(st.integers(1, padded)), *rest), padded=padded), tp_size
    if kind == "shard_nc":
        unit = draw(st.integers(1, 3))
        kv = draw(st.sampled_from([n for n in range(1, tp_size + 1) if tp_size % n == 0]))
        parts = (Part(extent * unit, unit), Part(kv * unit, unit, True), Part(kv * unit, unit, True))
        dim = draw(st.integers(0, len(rest)))
        shape = [*rest]
        shape.insert(dim, sum(p.size for p in parts))
        return Layout.shard_nc(tuple(shape), dim, parts), tp_size
    cuts = (Cut(0, (Part(3),), "ep"), Cut(1, (Part(extent),), "tp"))
    return Layout.shard_hy((3, extent, *rest), cuts), tp_size


def ranks_of(layout: Layout, tp_size: int) -> list[ShardRank]:
    ep_size = 3 if layout.is_cut_over("ep") else 1
    return [ShardRank(t, tp_size, e, ep_size) for e in range(ep_size) for t in range(tp_size)]


def label_of(shape) -> torch.Tensor:
    """Every element its own index plus one, so that zero is padding."""
    return torch.arange(1, math.prod(shape) + 1).reshape(shape)


@quick
@given(cut_layouts())
def test_split_then_merge_gives_the_atomic_parameter(case):
    layout, tp_size = case
    atomic = label_of(layout.shape)
    shards = {rank: layout.split(atomic, rank) for rank in ranks_of(layout, tp_size)}
    assert all(tuple(shard.shape) == layout.shard_shape(rank) for rank, shard in shards.items())
    assert torch.equal(layout.merge(shards), atomic)


@quick
@given(cut_layouts(), st.data())
def test_runs_say_where_every_element_of_a_flat_interval_lies(case, data):
    layout, tp_size = case
    rank = data.draw(st.sampled_from(ranks_of(layout, tp_size)))
    shard = layout.split(label_of(layout.shape), rank).flatten()
    start = data.draw(st.integers(0, len(shard)))
    stop = data.draw(st.integers(start, len(shard)))
    runs = shard_runs(layout, rank, start, stop)
    seen = np.zeros(stop - start, dtype=np.int64)
    for atomic_start, local_start, length in runs:
        seen[local_start : local_start + length] = np.arange(atomic_start, atomic_start + length) + 1
    assert np.array_equal(seen, shard[start:stop].numpy())
    assert np.all(np.diff(runs[:, 0]) > 0) and np.all(runs[:, 2] > 0)


@quick
@given(cut_layouts())
def test_owned_runs_of_all_ranks_count_every_element_once(case):
    layout, tp_size = case
    ranks = ranks_of(layout, tp_size)
    owned = [shard_runs(layout, rank, owned=True) for rank in ranks]
    # A dense parameter is not copied over ep, so only one expert rank's worth of it is asked.
    assert tiling_faults(whole_runs(layout.numel), owned) == ([], [])
    copies = [shard_runs(layout, rank, owned=False) for rank in ranks]
    held = sum(int(shard_runs(layout, rank)[:, 2].sum()) for rank in ranks)
    assert held == layout.numel + sum(int(c[:, 2].sum()) for c in copies)


@st.composite
def run_sets(draw):
    position, local, rows = 0, 0, []
    for _ in range(draw(st.integers(0, 8))):
        position += draw(st.integers(0, 4))
        local += draw(st.integers(0, 4))
        length = draw(st.integers(1, 6))
        rows.append((position, local, length))
        position, local = position + length, local + length
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def by_element(runs) -> dict[int, int]:
    return {int(a) + i: int(b) + i for a, b, n in runs for i in range(n)}


@quick
@given(run_sets(), run_sets())
def test_intersection_equals_the_one_by_element(target, source):
    wanted, have = by_element(target), by_element(source)
    expected = [(wanted[i], have[i]) for i in sorted(wanted) if i in have]
    found = [(int(t) + i, int(s) + i) for t, s, n in intersect(target, source) for i in range(n)]
    assert found == expected


@quick
@given(run_sets(), st.lists(run_sets(), max_size=3), st.integers(0, 20), st.integers(0, 20))
def test_faults_and_clips_equal_those_by_element(target, sources, a, b):
    count = [sum(i in by_element(s) for s in sources) for i in range(80)]
    wanted = by_element(target)
    missing, doubled = tiling_faults(target, sources)

    def elements(pairs):
        return {i for start, stop in pairs for i in range(start, stop)}

    assert elements(missing) == {i for i in wanted if count[i] == 0}
    assert elements(doubled) == {i for i in wanted if count[i] > 1}
    low, high = min(a, b), max(a, b)
    assert by_element(clip_atomic(target, low, high)) == {i: v for i, v in wanted.items() if low <= i < high}


def test_merge_refuses_differing_replicas_gaps_and_wrong_shapes():
    layout = Layout.replicate((4,))
    shards = {ShardRank(t, 2): torch.ones(4) for t in range(2)}
    shards[ShardRank(1, 2)] = torch.tensor([1.0, 1, 2, 1])
    with pytest.raises(ReplicaMismatchError):
        layout.merge(shards)
    cut = Layout.shard_v((4,))
    with pytest.raises(LayoutError, match="gap"):
        cut.merge({ShardRank(0, 2): torch.ones(2)})
    with pytest.raises(LayoutError, match="shape"):
        cut.merge({ShardRank(0, 2): torch.ones(3)})


def test_partial_is_the_mean():
    layout = Layout.partial((2,))
    shards = {ShardRank(t, 2): torch.tensor([1.0 + t, 4.0]) for t in range(2)}
    assert torch.equal(layout.merge(shards), torch.tensor([1.5, 4.0]))


def test_fused_qkv_with_more_ranks_than_key_heads_has_the_shards_one_can_see():
    kv = Part(1, 1, True)
    layout = Layout.shard_nc((6, 1), 0, (Part(4), kv, kv))
    shards = [layout.split(torch.arange(6.0).reshape(6, 1), ShardRank(t, 4)).flatten().tolist() for t in range(4)]
    assert shards == [[0, 4, 5], [1, 4, 5], [2, 4, 5], [3, 4, 5]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Layout.shard_v((3,)).shard_shape(ShardRank(0, 4)),
        lambda: Layout.shard_nc((5,), 0, (Part(2), Part(2))),
        lambda: Layout.shard_v((5,), padded=4),
        lambda: Layout.shard_v((5,), unit=2),
        lambda: Layout.shard_h((5,)),
        lambda: Layout("diagonal", (5,)),
        lambda: Layout.shard_nc((3,), 0, (Part(3, 1, True),)).shard_shape(ShardRank(0, 4)),
        lambda: Layout.shard_hy((4, 4), (Cut(0, (Part(4),)), Cut(1, (Part(4),)))),
    ],
)
def test_what_cannot_be_cut_is_refused(make):
    with pytest.raises((LayoutError, IndexError)):
        make()


@quick
@given(cut_layouts())
def test_layouts_survive_json(case):
    layout, _ = case
    assert Layout.from_json(layout.to_json()) == layout
    unpadded = layout.without_padding()
    assert unpadded.shape == layout.shape and all(cut.padded is None for cut in unpadded.cuts)


def test_ranks_count_through_pp_dp_sp_tp():
    topology = Topology(dp_size=2, tp_size=2, pp_size=2)
    assert topology.coords(5) == RankCoords(pp=1, dp=0, sp=0, tp=1)
    assert topology.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert topology.groups("dp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert topology.groups("pp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert str(topology) == "tp2 pp2 dp2"


@quick
@given(*[st.integers(1, 4)] * 4)
def test_every_rank_has_its_own_coordinates(dp, tp, pp, sp):
    topology = Topology(dp, tp, pp, sp)
    coords = [topology.coords(rank) for rank in range(topology.world_size)]
    assert len(set(coords)) == dp * tp * pp * sp
    assert [topology.rank_of(pp=c.pp, dp=c.dp, sp=c.sp, tp=c.tp) for c in coords] == list(range(len(coords)))
    for axis in ("pp", "dp", "sp", "tp"):
        assert sorted(sum(topology.groups(axis), [])) == list(range(topology.world_size))
    assert Topology.from_json(topology.to_json()) == topology


@pytest.mark.parametrize("sizes", [{"dp_size": 0}, {"tp_size": 1.5}, {"dp_size": 4, "ep_size": 3}])
def test_impossible_topologies_are_refused(sizes):
    with pytest.raises(UcpError, match="parallel degree|ep_size must divide"):
        Topology(**sizes)
