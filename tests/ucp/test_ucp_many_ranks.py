"""Ranks beyond 9 and 99, shards that are padding and nothing else, parameters with fewer elements than there are ranks.

Whoever compares numbers in file names as text reads rank 10 before rank 2; the last test plants that reader.
"""

import copy
import re
from dataclasses import replace

import pytest
import torch
from ucp.synthetic import FROZEN, Parameter, layout_of, make_state, model, write_native
from ucp.test_ucp_convert import assert_universal_equals

from megatron.ucp.convert import convert
from megatron.ucp.deepspeed_compat import universal_checkpoint_info
from megatron.ucp.diff import diff
from megatron.ucp.errors import DigestMismatchError, ManifestError, SourceError, UcpError
from megatron.ucp.execute import read_into
from megatron.ucp.manifest import read_manifest, write_manifest
from megatron.ucp.plan import plan
from megatron.ucp.runs import whole_runs
from megatron.ucp.safe_load import load
from megatron.ucp.sources import deepspeed, open_source
from megatron.ucp.sources import source as source_module
from megatron.ucp.sources.foreign import save
from megatron.ucp.topology import Topology
from megatron.ucp.verify import verify

# Twelve tensor-parallel ranks cannot share two key heads, so no fused qkv here.
MODEL = [
    *(p for p in model(num_layers=1) if p.kind != "qkv"),
    Parameter("layers.0.tiny.weight", (5, 1), "whole", "decay", 1),
    Parameter("layers.0.scale", (1,), "whole", "no_decay", 1),
    Parameter("layers.0.frozen.weight", (7, 3), "whole", FROZEN, 1),
]
STATE = make_state(MODEL, seed=12)
TOPOLOGIES = {
    "dp12": Topology(dp_size=12),
    "dp128": Topology(dp_size=128),
    "tp12": Topology(tp_size=12),
    "tp12dp3": Topology(tp_size=12, dp_size=3),
    "dp6sp2": Topology(dp_size=6, sp_size=2),
}


def write(folder, topology, zero_stage, with_manifest=True):
    info = universal_checkpoint_info({p.name: layout_of(p, topology.tp_size) for p in MODEL}, tp_size=topology.tp_size)
    write_native(folder, STATE, topology, zero_stage, parameters=MODEL, info=info, with_manifest=with_manifest)


@pytest.mark.parametrize("with_manifest", [True, False], ids=["manifest", "foreign"])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_many_ranks(tmp_path, name, zero_stage, with_manifest):
    topology = TOPOLOGIES[name]
    write(tmp_path / "n", topology, zero_stage, with_manifest)
    result = convert(tmp_path / "n", tmp_path / "u")
    assert_universal_equals(tmp_path / "u", STATE)
    # Without a manifest nothing tells dp from sp, and nothing has to.
    found = Topology(**result.manifest.source["topology"])
    assert (found.tp_size, found.zero_size) == (topology.tp_size, topology.zero_size)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_the_files_do_have_shards_of_padding_alone(tmp_path, zero_stage):
    """The data these tests stand on: without such shards they would prove nothing."""
    write(tmp_path / "n", TOPOLOGIES["dp128"], zero_stage)
    last = load(tmp_path / "n/zero_pp_rank_127_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
    if zero_stage == 1:
        assert last["group_paddings"][1] == last["base_optimizer_state"]["state"][1]["exp_avg"].numel() > 0
        assert last["single_partition_of_fp32_groups"][1].numel() == 0 and not last["param_slice_mappings"][1]
        before = load(tmp_path / "n/zero_pp_rank_126_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
        assert before["group_paddings"][1] == last["group_paddings"][1]
    else:
        assert any(bool((flat == 9e9).all()) for flat in last["fp32_flat_groups"])
        assert min(tensor.numel() for states in STATE.values() for tensor in states.values()) < 128


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_sequence_parallel_saves_verify_diff_and_lose_nothing(tmp_path, zero_stage):
    write(tmp_path / "n", Topology(dp_size=2, sp_size=2), zero_stage)
    write(tmp_path / "m", Topology(dp_size=4), zero_stage)
    result = convert(tmp_path / "n", tmp_path / "u")
    for folder in ("n", "u"):
        report = verify(tmp_path / folder)
        assert report.is_sound and report.is_proven and report.digest == result.digest
    assert diff(tmp_path / "n", tmp_path / "m", trust_digests=False).is_equal
    reads = plan(open_source(tmp_path / "n"), Topology(dp_size=2, sp_size=2), zero_stage=1)
    numel = {p.name: sum(t.numel() for t in STATE[p.name].values()) * (4 if p.group else 2 * 4) for p in MODEL}
    # Frozen parameters are read by all four ranks, as bfloat16 from the save.
    assert sum(rank.num_bytes for rank in reads) == sum(numel.values())
    assert sorted(p.name for p in (tmp_path / "u").glob("mp_rank*")) == ["mp_rank_00_model_states.pt"]


def with_table_of_fragments(folder):
    """The manifest with the table that our saves carry, read from the files by plain code."""
    fragments = {}
    for path in folder.glob("*optim_states.pt"):
        zero_rank, mp_rank = (int(number) for number in re.findall(r"rank_(\d+)", path.name))
        for group, mapping in enumerate(load(path)["optimizer_state_dict"]["param_slice_mappings"]):
            for name, address in mapping.items():
                part = [mp_rank, zero_rank, group, address.start, address.numel]
                fragments.setdefault(name, []).append(part)
    manifest = replace(read_manifest(folder), fragments={name: sorted(parts) for name, parts in fragments.items()})
    write_manifest(folder, manifest)
    return manifest


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_table_of_fragments_stands_for_the_files_own(tmp_path, name):
    write(tmp_path / "n", TOPOLOGIES[name], 1)
    own = open_source(tmp_path / "n").fragments()
    with_table_of_fragments(tmp_path / "n")
    source = open_source(tmp_path / "n")
    assert source.fragments() == own
    convert(tmp_path / "n", tmp_path / "u")
    assert_universal_equals(tmp_path / "u", STATE)
    assert read_manifest(tmp_path / "u").fragments == {}


def test_with_the_table_a_rank_opens_only_what_it_reads(tmp_path, monkeypatch):
    write(tmp_path / "n", TOPOLOGIES["dp128"], 1)
    opened, read = [], source_module.read_content
    monkeypatch.setattr(source_module, "read_content", lambda path: opened.append(path.name) or read(path))

    def read_one():
        opened.clear()
        source = open_source(tmp_path / "n")
        out = torch.empty(1)
        read_into(source, "layers.0.scale", "exp_avg", whole_runs(1), out)
        assert torch.equal(out, STATE["layers.0.scale"]["exp_avg"])
        return len(opened)

    assert read_one() == 128
    with_table_of_fragments(tmp_path / "n")
    assert read_one() <= 2


def test_a_wrong_table_of_fragments_is_refused(tmp_path):
    write(tmp_path / "n", TOPOLOGIES["dp12"], 1)
    manifest = with_table_of_fragments(tmp_path / "n")
    for column, change, error in ((3, -1, DigestMismatchError), (4, 1, SourceError), (1, 1000, ManifestError)):
        fragments = copy.deepcopy(manifest.fragments)
        fragments["layers.0.tiny.weight"][0][column] += change
        write_manifest(tmp_path / "n", replace(manifest, fragments=fragments))
        with pytest.raises(error):
            convert(tmp_path / "n", tmp_path / "u")


def test_a_quick_look_sees_a_gap(tmp_path):
    write(tmp_path / "n", TOPOLOGIES["dp12"], 1)
    manifest = with_table_of_fragments(tmp_path / "n")
    assert verify(tmp_path / "n", quick=True).is_sound
    name, parts = next(iter(manifest.fragments.items()))
    short = [*parts[:-1], [*parts[-1][:4], parts[-1][4] - 1]]
    write_manifest(tmp_path / "n", replace(manifest, fragments={**manifest.fragments, name: short}))
    report = verify(tmp_path / "n", quick=True)
    assert not report.is_sound and name in report.findings[0]


@pytest.mark.parametrize("zero_stage", [1, 3])
@pytest.mark.parametrize("name", ["dp12", "dp128", "tp12"])
def test_a_reader_that_sorts_numbers_as_text_is_found_out(tmp_path, monkeypatch, name, zero_stage):
    write(tmp_path / "n", TOPOLOGIES[name], zero_stage, with_manifest=False)
    find_files = deepspeed.find_files

    def as_text(numbers):
        return dict(zip(sorted(numbers), sorted(numbers, key=str), strict=True))

    def wrong(folder, manifest):
        files = find_files(folder, manifest)
        z, mp = (as_text({key[i] for key in files.zeros}) for i in (0, 1))
        return replace(files, zeros={key: files.zeros[z[key[0]], mp[key[1]]] for key in files.zeros})

    monkeypatch.setattr(deepspeed, "find_files", wrong)
    monkeypatch.setattr(save, "find_files", wrong)
    try:
        convert(tmp_path / "n", tmp_path / "u")
    except UcpError:
        return
    different = [
        (key, state)
        for key, states in STATE.items()
        for state, tensor in states.items()
        if not torch.equal(load(tmp_path / "u/zero" / key / f"{state}.pt")["param"], tensor)
    ]
    assert different
