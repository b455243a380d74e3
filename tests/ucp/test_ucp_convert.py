"""Any DeepSpeed folder -> universal: bit-equal to the atomic state it was cut from by plain code (synthetic.py)."""

import zipfile
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from ucp.synthetic import FROZEN, Parameter, make_state, model, write_native

from megatron.ucp import native, zip_layout
from megatron.ucp.commit import checksum_file
from megatron.ucp.convert import convert
from megatron.ucp.diff import diff
from megatron.ucp.digest import digest_tensor
from megatron.ucp.errors import CorruptFileError, UnsupportedCheckpointError
from megatron.ucp.execute import copy_runs, read_into
from megatron.ucp.layout import Layout, Part, ShardRank
from megatron.ucp.manifest import read_manifest, write_manifest
from megatron.ucp.plan import plan
from megatron.ucp.reshape import reshape
from megatron.ucp.runs import shard_runs
from megatron.ucp.safe_load import load
from megatron.ucp.sources import open_source
from megatron.ucp.stored import DTYPES
from megatron.ucp.targets.native_target import NativeTarget
from megatron.ucp.topology import Topology
from megatron.ucp.torch_file import Record, StreamedTensor, save_streamed
from megatron.ucp.verify import verify

STATE = make_state(model(), seed=3)

CASES = {
    "dp1-zero0": (Topology(), 0, {}),
    "dp1-zero1": (Topology(), 1, {}),
    "dp2-zero1-elastic": (Topology(dp_size=2), 1, {"is_elastic": True}),
    "dp2-zero2-bf16": (Topology(dp_size=2), 2, {"prefix": "bf16_"}),
    "dp3-zero1": (Topology(dp_size=3), 1, {}),
    "tp2-zero0": (Topology(tp_size=2), 0, {}),
    "tp2dp2-zero2": (Topology(tp_size=2, dp_size=2), 2, {}),
    "tp4-zero1-shared-kv-heads": (Topology(tp_size=4), 1, {}),
    "tp8dp2-zero1-shared-kv-heads": (Topology(tp_size=8, dp_size=2), 1, {}),
    "pp2-zero0-tied": (Topology(pp_size=2), 0, {}),
    "pp2-zero1-tied": (Topology(pp_size=2), 1, {}),
    "pp4-zero1-untied": (Topology(pp_size=4), 1, {"is_tied": False}),
    "tp2pp2-zero0": (Topology(tp_size=2, pp_size=2), 0, {}),
    "tp2pp2dp2-zero1": (Topology(tp_size=2, pp_size=2, dp_size=2), 1, {}),
    "dp12-zero1": (Topology(dp_size=12), 1, {}),
    "tp2pp2dp11-zero1": (Topology(tp_size=2, pp_size=2, dp_size=11), 1, {}),
    "dp130-zero2": (Topology(dp_size=130), 2, {}),
    "sp2dp2-zero1": (Topology(dp_size=2, sp_size=2), 1, {}),
    "dp3-zero3": (Topology(dp_size=3), 3, {}),
    "tp2dp2-zero3-bf16": (Topology(tp_size=2, dp_size=2), 3, {"prefix": "bf16_"}),
    "sp2dp2-zero3": (Topology(dp_size=2, sp_size=2), 3, {}),
}


def assert_universal_equals(folder, state):
    manifest = read_manifest(folder)
    assert set(manifest.parameters) == set(state)
    for name, states in state.items():
        for key, tensor in states.items():
            path = folder / "zero" / name / f"{key}.pt"
            assert torch.equal(load(path)["param"], tensor), (name, key)
        if len(states) > 1:  # a frozen parameter takes no steps
            assert float(load(folder / "zero" / name / "step.pt")) == 5.0


@pytest.mark.parametrize("case", CASES)
def test_converts_bit_equal(tmp_path, case):
    topology, zero_stage, options = CASES[case]
    write_native(tmp_path / "run/global_step5", STATE, topology, zero_stage, **options)
    result = convert(tmp_path / "run/global_step5", tmp_path / "run/global_step5_universal/")
    assert_universal_equals(result.output, STATE)
    assert (tmp_path / "run/latest_universal").read_text() == "global_step5_universal"
    assert [p.name for p in (tmp_path / "run").iterdir() if ".tmp" in p.name] == []
    for folder in (tmp_path / "run/global_step5", result.output):
        report = verify(folder)
        assert report.is_sound and report.is_proven and report.digest == result.digest, report.findings
    assert diff(tmp_path / "run/global_step5", result.output, trust_digests=False).is_equal


def test_there_are_enough_cases():
    assert len(CASES) >= 21


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_output_does_not_depend_on_the_number_of_workers(tmp_path, num_workers):
    write_native(tmp_path / "n", STATE, Topology(tp_size=2, dp_size=2), 1)
    convert(tmp_path / "n", tmp_path / "u", num_workers=num_workers)
    files = read_manifest(tmp_path / "u").files
    convert(tmp_path / "n", tmp_path / "v", num_workers=2)
    assert read_manifest(tmp_path / "v").files == files


def test_files_are_what_torch_writes(tmp_path):
    write_native(tmp_path / "n", STATE, Topology(tp_size=2), 1)
    convert(tmp_path / "n", tmp_path / "u")
    path = tmp_path / "u/zero/layers.0.mlp.dense_4h_to_h.weight/exp_avg.pt"
    assert zipfile.ZipFile(path).testzip() is None
    for is_mapped in (False, True):
        content = torch.load(path, weights_only=True, mmap=is_mapped)
        assert content["cat_dim"] == 1 and content["param"].is_contiguous()
        assert content["param"].data_ptr() % 64 == 0 or not is_mapped
    vocabulary = load(tmp_path / "u/zero/embedding.word_embeddings.weight/fp32.pt")
    assert vocabulary["vocab_tensor"] is True and len(vocabulary["param"]) == 37
    sub_params = load(tmp_path / "u/zero/layers.0.attention.query_key_value.weight/fp32.pt")["sub_param_shape"]
    assert sub_params.shape == ((16, 4, 4), 16) and sub_params.partition_dim == 0
    assert set(load(tmp_path / "u/zero/final_norm.weight/fp32.pt")) == {"param"}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["tp2pp2dp2-zero1", "pp2-zero0-tied"])
def test_any_interval_of_any_target_is_read(tmp_path, case, precision):
    """The path of a resume: a Target rank's fragment, straight from a native Source of another topology."""
    topology, zero_stage, options = CASES[case]
    write_native(tmp_path / "n", STATE, topology, zero_stage, **options)
    source = open_source(tmp_path / "n")
    kv = Part(4, 2, True)
    layout = Layout.shard_nc((24, 16), 0, (Part(16, 2), kv, kv))
    name = "layers.1.attention.query_key_value.weight"
    rank = ShardRank(2, 4)
    expected = layout.split(STATE[name]["exp_avg"], rank).flatten()[13:77]
    out = torch.full((70,), -1.0, dtype=precision)
    read_into(source, name, "exp_avg", shard_runs(layout, rank, 13, 77), out[:64])
    assert torch.equal(out[:64], expected.to(precision)) and bool((out[64:] == -1).all())


def test_partial_parameters_are_averaged(tmp_path):

    def edit(pp, tp, name, state, shard):
        return shard + tp if name == "final_norm.weight" else shard

    manifest = write_native(tmp_path / "n", STATE, Topology(tp_size=2, dp_size=2), 1, edit=edit, with_manifest=False)
    info = manifest.parameters["final_norm.weight"]
    parameters = {**manifest.parameters, "final_norm.weight": replace(info, layout=Layout.partial(info.layout.shape))}
    means = {s: ((x.double() + (x + 1).double()) / 2).float() for s, x in STATE["final_norm.weight"].items()}
    digests = {s: digest_tensor(mean, name="final_norm.weight", state=s).hex() for s, mean in means.items()}
    digests = {**manifest.digests, "final_norm.weight": digests}
    write_manifest(tmp_path / "n", replace(manifest, parameters=parameters, digests=digests))
    convert(tmp_path / "n", tmp_path / "u")
    found = load(tmp_path / "u/zero/final_norm.weight/exp_avg.pt")["param"]
    assert torch.equal(found, means["exp_avg"])
    assert verify(tmp_path / "n").is_sound and verify(tmp_path / "u").is_sound


def test_plan_counts_every_byte_of_every_rank(tmp_path):
    write_native(tmp_path / "n", STATE, Topology(tp_size=2, dp_size=2), 1)
    source = open_source(tmp_path / "n")
    numel = sum(tensor.numel() for states in STATE.values() for tensor in states.values())
    reads = plan(source, Topology(dp_size=3, pp_size=2), zero_stage=1)
    assert len(reads) == 6 and sum(r.num_bytes for r in reads) == 4 * numel
    assert all(sum(r.files.values()) == r.num_bytes for r in reads)
    reads = plan(source, Topology(dp_size=3), zero_stage=0)
    assert [r.num_bytes for r in reads] == [4 * numel] * 3


def test_universal_of_universal_is_itself(tmp_path):
    write_native(tmp_path / "n", STATE, Topology(tp_size=2), 1)
    first = convert(tmp_path / "n", tmp_path / "u")
    assert convert(tmp_path / "u", tmp_path / "v").digest == first.digest
    assert_universal_equals(tmp_path / "v", STATE)


def test_without_the_compiled_kernel_the_result_is_the_same(tmp_path, monkeypatch):

    write_native(tmp_path / "n", STATE, Topology(tp_size=4, dp_size=2), 1)
    first = convert(tmp_path / "n", tmp_path / "u")
    monkeypatch.setattr(native, "kernel", None)
    second = convert(tmp_path / "n", tmp_path / "v")
    assert first.digest == second.digest and first.manifest.files == second.manifest.files


FROZEN_CASES = {
    "dp2-zero0": (Topology(dp_size=2), 0),
    "tp2dp2-zero1": (Topology(tp_size=2, dp_size=2), 1),
    "tp2dp2-zero2": (Topology(tp_size=2, dp_size=2), 2),
    "dp3-zero3": (Topology(dp_size=3), 3),
    "tp2sp2dp2-zero3": (Topology(tp_size=2, dp_size=2, sp_size=2), 3),
    "pp2-zero0": (Topology(pp_size=2), 0),
    "tp2pp2dp2-zero1": (Topology(tp_size=2, pp_size=2, dp_size=2), 1),
}


@pytest.mark.parametrize("case", FROZEN_CASES)
def test_frozen_parameters_are_carried(tmp_path, case):
    """As bfloat16 in the files, which becomes float32 without loss."""
    topology, zero_stage = FROZEN_CASES[case]
    parameters = [
        *model(),
        Parameter("layers.0.mlp.frozen_column.weight", (9, 5), "column", FROZEN, 1),
        Parameter("layers.1.frozen_norm.weight", (3,), "whole", FROZEN, 2),
    ]
    state = make_state(parameters, seed=7)
    write_native(tmp_path / "n", state, topology, zero_stage, parameters=parameters)
    result = convert(tmp_path / "n", tmp_path / "u")
    assert_universal_equals(tmp_path / "u", state)
    assert [p.name for p in (tmp_path / "u/zero/layers.1.frozen_norm.weight").iterdir()] == ["fp32.pt"]
    for folder in ("n", "u"):
        assert verify(tmp_path / folder).digest == result.digest
        assert not read_manifest(tmp_path / folder).parameters["layers.1.frozen_norm.weight"].is_trainable


def test_files_beyond_the_zip_limit_stay_aligned_and_readable(tmp_path, monkeypatch):
    """Over 2 GiB the zip's headers change; the limit is lowered here instead of writing so much. Of several tensors,
    of other types, one of them in two places, and one that torch made."""

    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    monkeypatch.setattr(zip_layout, "ZIP64_LIMIT", 1000)
    values, small = torch.arange(50000.0), torch.arange(7)
    large = streamed((50, 1000), "float32", values.split(999))
    half = streamed((3, 0, 2), "bfloat16", [])
    scalar, turned = torch.tensor(2.5, dtype=torch.float64), torch.arange(6).view(2, 3).t()
    content = {"cat_dim": 0, "param": large, "more": [half, large, small, scalar, turned, torch.tensor([True, False])]}
    info = save_streamed(content, tmp_path / "big.pt")
    assert checksum_file(tmp_path / "big.pt") == info
    for is_mapped in (False, True):
        found = torch.load(tmp_path / "big.pt", weights_only=True, mmap=is_mapped)
        assert torch.equal(found["param"], values.view(50, 1000)) and found["param"].data_ptr() % 64 == 0
        assert found["more"][1].data_ptr() == found["param"].data_ptr()
        assert found["more"][0].shape == (3, 0, 2) and found["more"][0].dtype == torch.bfloat16
        for value, saved in zip(found["more"][2:], content["more"][2:], strict=True):
            assert torch.equal(value, saved) and value.dtype == saved.dtype
    assert zipfile.ZipFile(tmp_path / "big.pt").testzip() is None


def streamed(shape: tuple[int, ...], dtype: str, stretches: Sequence[torch.Tensor]) -> StreamedTensor:
    def write(record: Record) -> None:
        for values in stretches:
            record.write(values.numpy())

    return StreamedTensor(shape, DTYPES[dtype], write)


@pytest.mark.parametrize("lengths", [(3, 4), (3, 6), ()])
def test_stretches_of_another_length_than_their_tensor_are_refused(lengths: tuple[int, ...], tmp_path):
    tensor = streamed((2, 4), "float32", [torch.zeros(n) for n in lengths])
    with pytest.raises(ValueError, match="bytes written of 32"):
        save_streamed({"param": tensor}, tmp_path / "x.pt")
    tensor = streamed((8,), "float32", [torch.zeros(8, dtype=torch.float64)])
    with pytest.raises(ValueError, match="float64 for a tensor of torch.float32"):
        save_streamed({"param": tensor}, tmp_path / "x.pt")


def test_a_copy_outside_its_tensor_is_refused(tmp_path):

    for copies in ([[0, 3, 2]], [[0, 0, 9]]):
        with pytest.raises(CorruptFileError):
            copy_runs(torch.zeros(8), torch.zeros(4), np.array(copies))
    with pytest.raises(ValueError):
        copy_runs(torch.zeros(2), torch.zeros(4), np.array([[0, 0, 3]]))


def test_what_deepspeed_would_not_have_saved_so_is_not_written_so(tmp_path):
    """A padded vocabulary: its padding is no part of a state, and DeepSpeed's own files would be too short."""
    write_native(tmp_path / "n", make_state(model()), Topology(dp_size=2), 1)
    with pytest.raises(UnsupportedCheckpointError, match="word_embeddings.weight: padded"):
        reshape(tmp_path / "n", tmp_path / "out", NativeTarget.parse("zero2", 3))
    assert not (tmp_path / "out").exists()


def test_other_files_of_a_save_come_along(tmp_path):
    parameters = model(vocabulary=40)
    write_native(tmp_path / "n", make_state(parameters), Topology(dp_size=2), 1, parameters=parameters)
    (tmp_path / "n/streams.safetensors").write_bytes(b"whatever a program keeps")
    manifest = read_manifest(tmp_path / "n")
    files = {**manifest.files, "streams.safetensors": checksum_file(tmp_path / "n/streams.safetensors")}
    write_manifest(tmp_path / "n", replace(manifest, files=files))
    reshape(tmp_path / "n", tmp_path / "out", NativeTarget.parse("zero2", 3))
    convert(tmp_path / "n", tmp_path / "u")
    for made in ("out", "u"):
        assert (tmp_path / made / "streams.safetensors").read_bytes() == b"whatever a program keeps"
        assert verify(tmp_path / made).findings == ()
