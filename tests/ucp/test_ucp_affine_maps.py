"""Affine maps read as layouts, against DeepSpeed's own arithmetic of them (deepspeed/checkpoint/affine.py)."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from megatron.ucp.affine_maps import AffineMaps, layout_from_map
from megatron.ucp.errors import LayoutError, ReplicaMismatchError, UcpError, UnsupportedCheckpointError
from megatron.ucp.layout import Cut, Layout, Part, ShardRank
from megatron.ucp.runs import shard_runs


def builders():
    from deepspeed.checkpoint import affine

    return {
        "replicated": affine.replicated_map((3, 5), 3),
        "replicated vector": affine.replicated_map((4,), 2),
        "rows": affine.contiguous_split_map((9, 4), [3, 3, 3], 0),
        "rows, uneven": affine.contiguous_split_map((10, 4), [2, 5, 3], 0),
        "columns, uneven": affine.contiguous_split_map((3, 11, 2), [4, 1, 6], 1),
        "a rank with nothing": affine.contiguous_split_map((8, 4), [4, 4, 0], 0),
        "last dimension": affine.contiguous_split_map((2, 3, 7), [3, 4], 2),
        "parts": affine.sub_param_map((12, 3), [6, 3, 3], [[3, 3], [2, 1], [1, 2]], 0),
        "parts of columns": affine.sub_param_map((2, 9), [3, 6], [[1, 2], [4, 2]], 1),
        "one part whole on every rank": affine.segmented_map((10, 3), [(6, False), (4, True)], 0, 2, [[4, 2]]),
        "a part of columns whole": affine.segmented_map((2, 7), [(2, True), (5, False)], 1, 3, [[2, 2, 1]]),
        "chosen blocks": affine.block_gather_map((12, 2), {0: [0, 1, 4], 1: [2, 3, 5]}, 2, 0),
        "blocks held twice": affine.block_gather_map((8, 2), {0: [0, 2], 1: [1, 2, 3]}, 2, 0),
        "blocks in another order": affine.block_gather_map((3, 8), {0: [3, 0], 1: [2, 1]}, 2, 1),
    }


@pytest.mark.parametrize("case", builders())
def test_every_map_that_deepspeed_makes(case: str):
    theirs = builders()[case]
    num_ranks = len(theirs.shard_shapes)
    layout = layout_from_map(theirs.to_dict(), "tp", num_ranks)
    whole = torch.randn(theirs.logical_shape)
    ranks = [ShardRank(tp, num_ranks) for tp in range(num_ranks)]
    shards = {rank: layout.split(whole, rank) for rank in ranks}
    for rank in ranks:
        assert torch.equal(shards[rank], theirs.extract(whole, rank.tp_rank))
        runs = shard_runs(layout, rank)  # what reading goes by
        flat = torch.full((shards[rank].numel(),), torch.nan)
        for atomic, local, length in runs.tolist():
            flat[local : local + length] = whole.flatten()[atomic : atomic + length]
        assert torch.equal(flat.view(shards[rank].shape), shards[rank])
    held = {rank.tp_rank: shard for rank, shard in shards.items()}
    assert torch.equal(layout.merge(shards), whole) and torch.equal(theirs.rebuild(held), whole)
    # Each element is owned once, whoever else has it.
    owned = np.concatenate([shard_runs(layout, rank, owned=True) for rank in ranks])
    counted = np.zeros(whole.numel(), dtype=int)
    for start, _, length in owned.tolist():
        counted[start : start + length] += 1
    assert (counted == 1).all()
    assert Layout.from_json(layout.to_json()) == layout


def test_a_plain_cut_is_of_any_number_of_ranks():
    by_case = {case: layout_from_map(m.to_dict(), "tp", len(m.shard_shapes)) for case, m in builders().items()}
    assert by_case["rows"] == Layout.shard_v((9, 4)) and by_case["replicated"] == Layout.replicate((3, 5))
    assert by_case["rows, uneven"].cuts[0].spans == (((0, 2),), ((2, 7),), ((7, 10),))
    with pytest.raises(LayoutError, match="of 3 ranks alone"):
        by_case["rows, uneven"].shard_shape(ShardRank(0, 2))
    assert by_case["rows, uneven"].without_padding() == Layout.shard_v((10, 4))


def test_pieces_are_placed_by_where_they_lie_not_by_their_order():
    entry = builders()["parts"].to_dict()
    turned = copy.deepcopy(entry)
    for held in turned["ranks"].values():
        held["pieces"].reverse()
    assert layout_from_map(turned, "tp", 2) == layout_from_map(entry, "tp", 2)


def test_copies_that_differ_are_told():
    theirs = builders()["one part whole on every rank"]
    layout = layout_from_map(theirs.to_dict(), "tp", 2)
    whole = torch.randn(theirs.logical_shape)
    shards = {ShardRank(tp, 2): layout.split(whole, ShardRank(tp, 2)) for tp in range(2)}
    shards[ShardRank(1, 2)][-1, 0] += 1
    with pytest.raises(ReplicaMismatchError):
        layout.merge(shards)


def test_a_view_with_the_first_dimension_divided():
    """[experts, out, in] of a matrix [experts * out, in], cut along out."""
    from deepspeed.checkpoint.affine import contiguous_split_map

    theirs = contiguous_split_map((4, 6, 3), [2, 4], 1)
    layout = layout_from_map(theirs.to_dict(), "tp", 2, num_dims=2)
    whole = torch.randn(24, 3)
    for tp in range(2):
        expected = theirs.extract(whole.view(4, 6, 3), tp).reshape(-1, 3)
        assert torch.equal(layout.split(whole, ShardRank(tp, 2)), expected)
    last = layout_from_map(contiguous_split_map((4, 6, 3), [1, 2], 2).to_dict(), "tp", 2, num_dims=2)
    assert last.shape == (24, 3) and last.cuts[0].dim == 1


def _with(case: str, edit) -> dict[str, Any]:
    entry = copy.deepcopy(builders()[case].to_dict())
    edit(entry)
    return entry


def _piece(entry: dict[str, Any], rank: int = 0, index: int = 0) -> dict[str, Any]:
    return entry["ranks"][rank]["pieces"][index]


UNKNOWN, WRONG = UnsupportedCheckpointError, LayoutError
FAULTS: dict[str, tuple[str, Any, type[UcpError], str]] = {
    "a scale": ("rows", lambda e: _piece(e).update(scale=0.5), UNKNOWN, "times a number"),
    "a rank missing": ("rows", lambda e: e["ranks"].pop(2), WRONG, "other ranks"),
    "another rank": ("rows", lambda e: e["ranks"].update({7: e["ranks"].pop(2)}), WRONG, "other ranks"),
    "strides of no box": ("rows", lambda e: _piece(e).update(source=[0, [8, 1]]), UNKNOWN, "no box"),
    "an offset inside a row": ("rows", lambda e: _piece(e).update(source=[2, [4, 1]]), UNKNOWN, "no box"),
    "outside": ("rows", lambda e: _piece(e).update(source=[32, [4, 1]]), WRONG, "lies outside"),
    "below": ("rows", lambda e: _piece(e).update(source=[-4, [4, 1]]), UNKNOWN, "no box"),
    "a gap in the whole": ("rows", lambda e: _piece(e, 1).update(source=[24, [4, 1]]), WRONG, "no rank holds"),
    "a gap in the shard": ("parts", lambda e: e["ranks"][0]["pieces"].pop(1), WRONG, "do not tile"),
    "too short": ("parts", lambda e: e["ranks"][0]["pieces"].pop(), WRONG, "do not fill"),
    "twice the same": ("chosen blocks", lambda e: _piece(e, 1, 1).update(source=[8, [2, 1]]), WRONG, "intervals"),
    "two dimensions": ("rows", lambda e: e["ranks"][0].update(shard_shape=[3, 2]), UNKNOWN, "several"),
    "other dimensions": ("rows", lambda e: e["ranks"][0].update(shard_shape=[12]), WRONG, "dimensions of the whole"),
    "no shape": ("rows", lambda e: e.update(logical_shape=[9, True]), WRONG, "no shape"),
    "a size beyond bounds": ("rows", lambda e: e.update(logical_shape=[1 << 70, 4]), WRONG, "no shape"),
    "too many pieces": ("rows", lambda e: e["ranks"][0].update(pieces=[{}] * 200_000), UNKNOWN, "100000"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_planted_faults_are_refused(case: str):
    kind, edit, error, words = FAULTS[case]
    entry = _with(kind, edit)
    with pytest.raises(error, match=words):
        layout_from_map(entry, "tp", len(builders()[kind].shard_shapes))


def test_maps_are_found_by_name():
    entry = builders()["rows"].to_dict()
    params = {r"^model\.layers\.1\.up\.weight$": entry, r"^model\.layers\.\d\.down\.weight$": entry}
    maps = AffineMaps.of({"affine_map": {"version": 1, "params": params}})
    shards = [(3, 4)] * 3
    assert maps.layout("model.layers.1.up.weight", shards) == maps.layout("model.layers.7.down.weight", shards)
    assert maps.layout("model.layers.11.up.weight", shards) is None and maps.layout("other", shards) is None
    with pytest.raises(UnsupportedCheckpointError, match="unknown version"):
        AffineMaps.of({"affine_map": {"version": 2, "params": params}})
    params[r"^model\.layers\.1\.up\.weight$"] = _with("rows", lambda e: _piece(e).update(scale=2.0))
    with pytest.raises(UcpError, match=r"model\.layers\.1\.up\.weight: the shard holds it times a number"):
        AffineMaps.of({"affine_map": {"version": 1, "params": params}}).layout("model.layers.1.up.weight", shards)


def test_spans_of_a_manifest_are_checked():
    part = (Part(8),)
    for spans in ((((0, 4),), ((5, 8),)), (((0, 4), (2, 8)),), (((0, 9),),), (((4, 4),), ((0, 8),))):
        with pytest.raises(LayoutError):
            Layout("shard_v", (8,), (Cut(0, part, spans=spans),))
    with pytest.raises(LayoutError, match="one part"):
        Layout("shard_v", (8,), (Cut(0, (Part(4), Part(4)), spans=(((0, 8),),)),))
