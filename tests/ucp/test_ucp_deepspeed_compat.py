"""Layouts <-> DeepSpeed's patterns, and DeepSpeed's own converter against ours on the same files."""

import argparse
from pathlib import Path

import pytest
import torch
from ucp.synthetic import layout_of, make_state, model, padded_vocabulary, write_native

from harness.ranks import run_ranks
from megatron.ucp.convert import convert
from megatron.ucp.deepspeed_compat import layout_from_patterns, universal_checkpoint_info
from megatron.ucp.diff import diff
from megatron.ucp.errors import LayoutError, UnsupportedCheckpointError
from megatron.ucp.layout import Cut, Layout, Part, ShardRank
from megatron.ucp.sources import open_source
from megatron.ucp.topology import Topology

MODEL = model()
STATE = make_state(MODEL, seed=6)
TIED = ("embedding.word_embeddings.weight",)


def info_for(tp_size, with_widths=True):
    return universal_checkpoint_info(
        {p.name: layout_of(p, tp_size) for p in MODEL}, tp_size=tp_size if with_widths else None, tied=TIED
    )


def _stock(rank, world_size, folders):
    from deepspeed.checkpoint.ds_to_universal import main

    for folder in folders:
        main(
            argparse.Namespace(
                input_folder=f"{folder}/native",
                output_folder=f"{folder}/stock",
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=False,
            )
        )
        _compare(Path(folder) / "stock", Path(folder) / "ours")


def _compare(stock: Path, ours: Path):
    """Same files, keys and values, read as DeepSpeed's loader reads them."""
    paths = sorted(p.relative_to(stock) for p in stock.rglob("*.pt"))
    of_stage_3 = {Path(f"zero_pp_rank_0_{path}") for path in paths if path.name.startswith("mp_rank_")}
    assert {*paths, *of_stage_3} == {p.relative_to(ours) for p in ours.rglob("*.pt")}
    num_tensors = 0
    for path in paths:
        a, b = (torch.load(folder / path, weights_only=False) for folder in (stock, ours))
        if path.name == "step.pt":
            assert a == b and type(a) is type(b)
            continue
        # What ZeRO-3 engines look for, and DeepSpeed's own conversion of ZeRO-1 and 2 does not have.
        assert set(a) == set(b) - ({"optimizer_state_dict"} if path.name == "optimizer_state.pt" else set()), path
        if path.parts[0] != "zero" or path.name == "optimizer_state.pt":
            continue
        num_tensors += 1
        for key, value in a.items():
            if torch.is_tensor(value):
                assert torch.equal(value, b[key]), (path, key)
            elif key == "sub_param_shape":
                assert (value.shape, value.partition_dim) == (b[key].shape, b[key].partition_dim)
            else:
                assert value == b[key], (path, key)
    assert num_tensors == 3 * len(MODEL)


TOPOLOGIES = [Topology(tp_size=2, pp_size=2, dp_size=2), Topology(dp_size=3), Topology(pp_size=2, dp_size=11)]


def test_deepspeeds_converter_gives_the_same_folder(tmp_path):
    folders = []
    for i, topology in enumerate(TOPOLOGIES):
        folders.append(str(tmp_path / str(i)))
        info = info_for(topology.tp_size)
        write_native(tmp_path / str(i) / "native", STATE, topology, 1, info=info)
        convert(tmp_path / str(i) / "native", tmp_path / str(i) / "ours")
    run_ranks(1, _stock, folders)
    for folder in folders:
        # Ours reads DeepSpeed's universal folder too, without a ucp.json.
        assert diff(f"{folder}/stock", f"{folder}/native").deltas == ()


@pytest.mark.parametrize("topology", [*TOPOLOGIES, Topology(tp_size=2)], ids=str)
@pytest.mark.parametrize("with_widths", [True, False])
def test_layouts_come_back_from_the_patterns(tmp_path, topology, with_widths):
    manifest = write_native(
        tmp_path / "n", STATE, topology, 2, info=info_for(topology.tp_size, with_widths), with_manifest=False
    )
    found = open_source(tmp_path / "n").manifest
    assert found.topology == topology and found.zero_stage == 2 and found.iteration == 5
    for name, info in manifest.parameters.items():
        assert found.parameters[name].layout.shape == info.layout.shape, name
        assert found.parameters[name].states == info.states and found.parameters[name].step == 5.0
        assert found.parameters[name].pp_stages == info.pp_stages and found.parameters[name].group == info.group
    result = convert(tmp_path / "n", tmp_path / "u")
    write_native(tmp_path / "truth", STATE, Topology(), 1)
    assert diff(tmp_path / "u", tmp_path / "truth", trust_digests=False).deltas == ()
    assert result.manifest.source["topology"] == topology.to_json()


def test_unnamed_tensor_parallel_parameters_are_refused_by_name_unless_told(tmp_path):
    info = info_for(2)
    info["parameter_with_column_parallelism_patterns"] = []  # what a Megatron-DeepSpeed checkpoint looks like
    write_native(tmp_path / "n", STATE, Topology(tp_size=2), 1, info=info, with_manifest=False)
    with pytest.raises(UnsupportedCheckpointError) as caught:
        open_source(tmp_path / "n")
    assert "layers.0.mlp.dense_h_to_4h.weight" in str(caught.value) and "--column_parallel" in str(caught.value)
    assert "dense_4h_to_h" not in str(caught.value)
    source = open_source(tmp_path / "n", column_parallel=(r".*dense_h_to_4h\.weight",))
    assert source.manifest.parameters["layers.1.mlp.dense_h_to_4h.weight"].layout.pattern == "shard_v"


def test_forgotten_replicated_norms_are_refused(tmp_path):
    """DeepSpeed would concatenate them (its issue 6503)."""
    info = info_for(2)
    info["tp_replicated_parameter_patterns"] = []
    write_native(tmp_path / "n", STATE, Topology(tp_size=2), 1, info=info, with_manifest=False)
    with pytest.raises(UnsupportedCheckpointError, match="final_norm.weight"):
        open_source(tmp_path / "n")


def test_foreign_zero0_of_several_model_parallel_ranks_is_refused_with_the_reason(tmp_path):
    write_native(tmp_path / "n", STATE, Topology(tp_size=2), 0, with_manifest=False)
    with pytest.raises(UnsupportedCheckpointError, match="of one tensor- and pipeline-parallel rank"):
        open_source(tmp_path / "n")


def test_patterns_cover_all_layers_with_one_expression():
    info = info_for(2)
    assert info["parameter_with_row_parallelism_patterns"] == [
        r"layers\.\d+\.attention\.dense\.weight$",
        r"layers\.\d+\.mlp\.dense_4h_to_h\.weight$",
    ]
    assert info["original_vocab_size"] == 37 and info["padded_vocab_size"] == padded_vocabulary(37, 2)
    assert info["pipeline_replicated_parameter_patterns"] == [r"embedding\.word_embeddings\.weight$"]
    entry = next(e for e in info["parameter_with_sub_params"] if "weight" in e["patterns"][0])
    assert entry["shape"] == ((16, 4, 4), 16) and info["sub_param_shard_widths"][entry["patterns"][0]][0] == [8, 8]


def test_patterns_fall_back_to_names_where_layers_differ():
    layouts = {"layers.0.w.x": Layout.replicate((2,)), "layers.1.w.x": Layout.shard_v((2,))}
    info = universal_checkpoint_info(layouts, tp_size=2)
    assert info["tp_replicated_parameter_patterns"] == [r"layers\.0\.w\.x$"]
    assert info["parameter_with_column_parallelism_patterns"] == [r"layers\.1\.w\.x$"]


def test_every_pattern_of_the_paper_has_a_list():
    layouts = {
        "unique": Layout.unique((4,)),
        "partial": Layout.partial((4,)),
        "hybrid": Layout.shard_hy((4, 4), (Cut(0, (Part(4),), "ep"), Cut(1, (Part(4),)))),
    }
    info = universal_checkpoint_info(layouts, tp_size=2)
    assert info["tp_replicated_parameter_patterns"] == ["unique$"]
    assert info["parameter_to_average_patterns"] == ["partial$"]
    assert info["parameter_with_row_parallelism_patterns"] == ["hybrid$"]


@pytest.mark.parametrize(
    "sizes, widths",
    [((4, 4), [[1, 3], [3, 1]]), ((6, 3, 3), [[4, 2], [1, 2], [2, 1]]), ((6, 2), [[2, 2, 2], [1, 1, 0]])],
    ids=str,
)
def test_recorded_widths_of_parts_are_believed(sizes: tuple[int, ...], widths: list[list[int]]):
    """The first has the totals of an even cut, so that shapes alone say nothing. Against DeepSpeed's own arithmetic."""
    from deepspeed.checkpoint.affine import sub_param_map

    num_ranks = len(widths[0])
    theirs = sub_param_map((sum(sizes), 3), list(sizes), widths, 0)
    info = {
        "parameter_with_sub_params": [{"patterns": ["^qkv$"], "shape": [list(sizes), 3], "partition_dim": 0}],
        "sub_param_shard_widths": {"^qkv$": widths},
    }
    layout = layout_from_patterns("qkv", [theirs.shard_shapes[rank] for rank in range(num_ranks)], info)
    whole = torch.randn(theirs.logical_shape)
    for rank in range(num_ranks):
        assert torch.equal(layout.split(whole, ShardRank(rank, num_ranks)), theirs.extract(whole, rank))
    info["sub_param_shard_widths"]["^qkv$"] = [[9] * num_ranks] * len(sizes)
    with pytest.raises(LayoutError, match="other parts"):
        layout_from_patterns("qkv", [theirs.shard_shapes[rank] for rank in range(num_ranks)], info)
