"""PyTorch's distributed checkpoints, made by an FSDP2 program, against what that program had in memory."""

import os
import pickle
import shutil

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from ucp.dcp_program import fsdp2, fsdp2_goes_on
from ucp.huggingface_models import made

from harness.ranks import run_ranks
from megatron.ucp import cli
from megatron.ucp.convert import convert
from megatron.ucp.diff import diff
from megatron.ucp.digest import digest_runs
from megatron.ucp.errors import (
    CorruptFileError,
    DigestMismatchError,
    UcpError,
    UnsafePickleError,
    UnsupportedCheckpointError,
)
from megatron.ucp.execute import read_into
from megatron.ucp.export import export_dcp
from megatron.ucp.naming.matching import match
from megatron.ucp.runs import whole_runs
from megatron.ucp.sources import open_source
from megatron.ucp.sources.dcp.metadata import read_metadata
from megatron.ucp.sources.dcp.source import DcpSource
from megatron.ucp.sources.renamed import with_names_of
from megatron.ucp.targets import dcp as dcp_target
from megatron.ucp.verify import verify

STATES = ("fp32", "exp_avg", "exp_avg_sq")


def values(source, name, state):
    layout = source.manifest.parameters[name].layout
    flat = torch.zeros(layout.numel)
    read_into(source, name, state, whole_runs(layout.numel), flat)
    return flat.view(layout.shape)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By (model, ranks, form): the folder, and what was in memory."""
    known = {}

    def get(name="llama", ranks=2, layout="nested", dtype="float32"):
        key = name, ranks, layout, dtype
        if key not in known:
            folder = tmp_path_factory.mktemp("dcp") / "step-3"
            known[key] = folder, run_ranks(ranks, fsdp2, folder, name, layout, dtype)[0][0]
        return known[key]

    return get


@pytest.mark.parametrize(
    ("name", "ranks", "layout", "dtype"),
    [
        ("llama", 2, "nested", "float32"),
        ("llama", 3, "flat", "float32"),
        ("gpt2", 3, "nested", "float32"),
        ("qwen2", 1, "flat", "float32"),
        ("llama tied", 2, "flat", "bfloat16"),
    ],
)
def test_every_parameter_and_state_is_what_was_in_memory(name, ranks, layout, dtype, saved, tmp_path):
    folder, truth = saved(name, ranks, layout, dtype)
    source = open_source(folder)
    assert isinstance(source, DcpSource)
    tied = {"lm_head.weight"} if name in ("gpt2", "qwen2", "llama tied") else set()
    assert set(source.manifest.parameters) == {key for key in truth if " " not in key}
    for key, info in source.manifest.parameters.items():
        if key in tied and "exp_avg" not in info.states:
            continue
        assert info.states == STATES and info.step == 3.0, key
        assert torch.equal(values(source, key, "fp32"), truth[key].float())
        for state in STATES[1:]:
            assert torch.equal(values(source, key, state), truth[f"{key} {state}"].float())
    assert source.manifest.optimizer.groups["0"]["betas"] == [0.9, 0.95]
    assert verify(folder).is_sound and not verify(folder).is_proven
    converted = convert(folder, tmp_path / "universal")
    assert diff(folder, converted.output).is_equal and verify(converted.output).is_sound


# -- under our names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mixtral"])
def test_under_our_names_with_all_states(name, saved, tmp_path):
    """Held against the program's memory through plain slicing of each family's fused parameters."""
    folder, truth = saved(name)
    made(name).save_pretrained(tmp_path / "like")
    if name == "gpt2":  # its output layer is the embedding, and DCP keeps it under both names
        truth = {key: value for key, value in truth.items() if not key.startswith("lm_head")}
    converted = convert(folder, tmp_path / "universal", like=tmp_path / "like")
    source = open_source(converted.output)
    assert verify(converted.output).is_sound
    heads = source.manifest.model["num_attention_heads"] * source.manifest.model["kv_channels"]
    kv = source.manifest.model["num_key_value_heads"] * source.manifest.model["kv_channels"]
    for state in STATES:

        def theirs(key, state=state):
            return truth[key if state == "fp32" else f"{key} {state}"].float()

        def ours(key, state=state):
            return values(source, key, state)

        for layer in range(3):
            qkv = ours(f"layers.{layer}.attention.query_key_value.weight")
            if name == "gpt2":
                assert torch.equal(qkv, theirs(f"transformer.h.{layer}.attn.c_attn.weight").T)
                dense = theirs(f"transformer.h.{layer}.attn.c_proj.weight").T
                assert torch.equal(ours(f"layers.{layer}.attention.dense.weight"), dense)
                continue
            parts = qkv.split([heads, kv, kv])
            for part, letter in zip(parts, "qkv", strict=True):
                assert torch.equal(part, theirs(f"model.layers.{layer}.self_attn.{letter}_proj.weight"))
            if name == "mixtral":
                up = theirs(f"model.layers.{layer}.mlp.experts.gate_up_proj")
                assert torch.equal(ours(f"layers.{layer}.mlp.experts.dense_h_to_4h"), up)
            else:
                gate, up = ours(f"layers.{layer}.mlp.dense_h_to_4h.weight").chunk(2)
                assert torch.equal(gate, theirs(f"model.layers.{layer}.mlp.gate_proj.weight"))
                assert torch.equal(up, theirs(f"model.layers.{layer}.mlp.up_proj.weight"))
    info = source.manifest.parameters["final_norm.weight"]
    assert info.states == STATES and info.step == 3.0
    assert (converted.output / "config.json").is_file()


def test_a_model_of_another_shape_is_refused_with_all_that_differs(saved, tmp_path):
    folder, _ = saved()
    made("qwen3").save_pretrained(tmp_path / "like")
    with pytest.raises(UnsupportedCheckpointError, match="self_attn.q_norm.weight") as error:
        convert(folder, tmp_path / "universal", like=tmp_path / "like")
    assert "is expected" in str(error.value) and not (tmp_path / "universal").exists()


def test_parts_at_other_steps_are_refused(saved, tmp_path):
    """q, k and v are one parameter here, and it has one step."""
    folder, _ = saved()
    made("llama").save_pretrained(tmp_path / "like")
    source = open_source(folder)
    infos = source.manifest.parameters
    key = "model.layers.1.self_attn.k_proj.weight"
    import dataclasses

    infos[key] = dataclasses.replace(infos[key], step=2.0)
    with pytest.raises(UnsupportedCheckpointError, match=r"layers\.1\.attention\.query_key_value\.weight"):
        with_names_of(source, tmp_path / "like")


def test_a_mistake_in_the_runs_would_be_seen(saved, tmp_path, monkeypatch):
    from megatron.ucp.sources import renamed

    folder, _ = saved()
    made("llama").save_pretrained(tmp_path / "like")
    right = convert(folder, tmp_path / "right", like=tmp_path / "like").digest

    def exchanged(family, model, shapes, **options):
        found = match(family, model, shapes, **options)
        for parts in found.by_parameter.values():
            if len(parts) == 3:  # k and v, of one shape
                parts[1], parts[2] = (parts[1][0], parts[2][1]), (parts[2][0], parts[1][1])
        return found

    monkeypatch.setattr(renamed, "match", exchanged)
    assert convert(folder, tmp_path / "wrong", like=tmp_path / "like").digest != right


# -- bad input ---------------------------------------------------------------------------------------------------------


def _copied(saved, tmp_path):
    folder, _ = saved()
    return shutil.copytree(folder, tmp_path / "copy")


def _edited(folder, edit):
    """`.metadata` with torch's own object changed."""
    with open(folder / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _first(metadata):
    return next(iter(metadata.state_dict_metadata))


def _moved(metadata, **changes):
    index = next(index for index in metadata.storage_data if index.fqn == "model.model.norm.weight")
    info = metadata.storage_data[index]
    for key, value in changes.items():
        setattr(info, key, value)


EDITS = {
    "a file outside": (lambda m: _moved(m, relative_path="../../etc/passwd"), "leads to another folder"),
    "an absolute file": (lambda m: _moved(m, relative_path="/etc/passwd"), "is absolute"),
    "a file that is not there": (lambda m: _moved(m, relative_path="__9_9.distcp"), "no such file"),
    "a place before the file": (lambda m: _moved(m, offset=-5), "bytes at -5"),
    "a place that is text": (lambda m: _moved(m, offset="x"), "bytes at 'x'"),
    "compressed chunks": (lambda m: _moved(m, transform_descriptors=["zstd"]), "compressed"),
    "a chunk too few": (lambda m: m.state_dict_metadata["model.model.norm.weight"].chunks.pop(), "elements, of 32"),
    "a giant tensor": (
        lambda m: setattr(m.state_dict_metadata["model.model.norm.weight"], "size", torch.Size([1 << 40])),
        "elements, of",
    ),
    "a negative shape": (
        lambda m: setattr(m.state_dict_metadata["model.model.norm.weight"], "size", (-1, 4)), "no shape"),
    "no chunks at all": (
        lambda m: setattr(m.state_dict_metadata["model.model.norm.weight"], "chunks", 7), "no shape"),
    "no tables": (lambda m: setattr(m, "storage_data", None), "no table"),
}  # fmt: skip


@pytest.mark.parametrize("what", EDITS)
def test_what_metadata_cannot_say(what, saved, tmp_path):
    edit, message = EDITS[what]
    folder = _copied(saved, tmp_path)
    _edited(folder, edit)
    with pytest.raises(UcpError, match=message):
        open_source(folder)
    with pytest.raises(UcpError, match="."):
        convert(folder, tmp_path / "universal")
    assert not (tmp_path / "universal").exists()


@pytest.mark.parametrize(("start", "length"), [(3, None), (None, 50), (10**9, None), (0, 10**9)])
def test_a_place_where_nothing_of_the_kind_lies(start, length, saved, tmp_path):
    folder = _copied(saved, tmp_path)
    changes = {key: value for key, value in (("offset", start), ("length", length)) if value is not None}
    _edited(folder, lambda m: _moved(m, **changes))
    source = open_source(folder)
    if (start, length) == (0, 10**9):  # another tensor's record is found there, or none
        with pytest.raises(CorruptFileError, match=r"norm\.weight|no record"):
            values(source, "model.norm.weight", "fp32")
        return
    with pytest.raises(CorruptFileError, match="no record of torch"):
        values(source, "model.norm.weight", "fp32")


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("where", ["metadata", "inside"])
def test_no_code_is_run(where, saved, tmp_path):
    folder = _copied(saved, tmp_path)
    mark = str(tmp_path / "it_ran")
    if where == "metadata":
        (folder / ".metadata").write_bytes(pickle.dumps({"a": _Evil(mark)}))
    else:
        _edited(folder, lambda m: setattr(m, "planner_data", {"a": _Evil(mark)}))
    with pytest.raises(UnsafePickleError, match="mkdir"):
        open_source(folder)
    assert not os.path.exists(mark)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04.", b"\x80\x04]\x94.", b"\x80\x05\x95" + b"\xff" * 20])
def test_metadata_that_is_none(content, saved, tmp_path):
    folder = _copied(saved, tmp_path)
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(CorruptFileError, match="metadata|not readable"):
        read_metadata(folder)


def test_damaged_metadata_ends_in_our_errors(saved, tmp_path):
    """Bytes changed at random: a Source or one of our errors, nothing else."""
    import random

    folder = _copied(saved, tmp_path)
    raw = (folder / ".metadata").read_bytes()
    generator, refused = random.Random(5), 0
    for _ in range(300):
        damaged = bytearray(raw)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        (folder / ".metadata").write_bytes(damaged)
        try:
            open_source(folder)
        except UcpError:
            refused += 1
    assert refused > 50


def test_optimizer_states_of_strangers_are_refused(tmp_path):
    import torch.distributed.checkpoint as dcp

    content = {"model": {"w": torch.zeros(3)}, "optim": {"state": {"v": {"exp_avg": torch.zeros(3)}}}}
    dcp.save(content, checkpoint_id=tmp_path / "x", no_dist=True)
    with pytest.raises(UnsupportedCheckpointError, match="parameters that the model has not"):
        open_source(tmp_path / "x")
    dcp.save({"note": "x"}, checkpoint_id=tmp_path / "y", no_dist=True)
    with pytest.raises(UnsupportedCheckpointError, match="no parameters"):
        open_source(tmp_path / "y")


def test_our_reader_of_metadata_agrees_with_torchs(saved):
    from torch.distributed.checkpoint import FileSystemReader

    folder, _ = saved("llama", 3, "flat")
    theirs, ours = FileSystemReader(folder).read_metadata(), read_metadata(folder)
    tensors = {key: kind for key, kind in theirs.state_dict_metadata.items() if hasattr(kind, "chunks")}
    assert set(ours.tensors) == set(tensors) and len(ours.values) + len(tensors) == len(theirs.state_dict_metadata)
    for key, kind in tensors.items():
        assert ours.tensors[key].shape == tuple(kind.size)
        assert str(ours.tensors[key].dtype) == str(kind.properties.dtype)
        told = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in kind.chunks if all(chunk.sizes)}
        assert {chunk.offsets: chunk.sizes for chunk in ours.tensors[key].chunks} == told
    places = {(index.fqn, tuple(index.offset or ())): info for index, info in theirs.storage_data.items()}
    for key, tensor in ours.tensors.items():
        for chunk in tensor.chunks:
            info = places[key, chunk.offsets]
            assert (chunk.place.file, chunk.place.start) == (info.relative_path, info.offset)


def _chunk_on_chunk(tensor):
    tensor.chunks[1].offsets = tensor.chunks[0].offsets


def _half_on_chunk(tensor):
    """Not of one grid: a chunk reaches into the one before it, and leaves as much out."""
    first, second = tensor.chunks
    rows = first.sizes[0] // 2
    second.offsets = torch.Size([second.offsets[0] - rows, *second.offsets[1:]])


@pytest.mark.parametrize("change", [_chunk_on_chunk, _half_on_chunk])
def test_chunks_that_lie_on_each_other_are_refused(change, saved, tmp_path):
    """As many elements as the tensor has, some of them twice and others not at all."""
    shutil.copytree(saved("llama")[0], tmp_path / "bad")
    metadata = pickle.loads((tmp_path / "bad/.metadata").read_bytes())
    tensor = metadata.state_dict_metadata["model.model.layers.1.mlp.down_proj.weight"]
    places = dict(metadata.storage_data)
    change(tensor)
    for index, info in places.items():
        if index.fqn.endswith("layers.1.mlp.down_proj.weight") and index.fqn.startswith("model."):
            metadata.storage_data[MetadataIndex(index.fqn, tensor.chunks[1].offsets, 1)] = info
    (tmp_path / "bad/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CorruptFileError, match="not whole") as error:
        open_source(tmp_path / "bad")
    assert error.value.found == ["model.layers.1.mlp.down_proj.weight (fp32): chunks that lie on each other"]


# -- as a Target -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory):
    """By model: what an FSDP2 program saved, converted under our names, and that exported again."""
    known = {}

    def get(name):
        if name not in known:
            folder = tmp_path_factory.mktemp("exported")
            made(name).save_pretrained(folder / "like")
            convert(saved(name)[0], folder / "universal", like=folder / "like")
            assert cli.main(["export", str(folder / "universal"), str(folder / "dcp"), "--format", "dcp"]) == 0
            known[name] = folder
        return known[name]

    return get


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_neox"])
def test_an_fsdp2_program_goes_on_from_what_is_exported(name, saved, exported):
    """As it goes on from its own checkpoint: weights, moments, steps, groups, and the losses that follow."""
    folder, truth = saved(name)
    found, groups, losses = run_ranks(3, fsdp2_goes_on, exported(name) / "dcp", name)[0]
    assert found.keys() == truth.keys()
    for key, values_there in truth.items():
        assert torch.equal(found[key], values_there), key
    (group,) = groups
    assert (group["lr"], list(group["betas"]), group["weight_decay"]) == (1e-3, [0.9, 0.95], 0.1)
    _, of_six = run_ranks(3, fsdp2, folder.parent / "six", name, "nested", "float32", 6)[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(of_six[3:]), rtol=0, atol=2e-5)


def test_what_is_exported_is_read_again_bitwise(exported, tmp_path):
    folder = exported("llama")
    convert(folder / "dcp", tmp_path / "again", like=folder / "like")
    assert diff(folder / "universal", tmp_path / "again").is_equal


def test_an_export_that_fails_leaves_nothing(exported, tmp_path, monkeypatch):
    folder = exported("llama")
    monkeypatch.setattr(dcp_target, "digest_runs", _failing_at("layers.1.mlp.dense_4h_to_h.weight"))
    with pytest.raises(OSError, match="no more room"):
        export_dcp(folder / "universal", tmp_path / "out", num_workers=2)
    monkeypatch.undo()
    monkeypatch.setattr(dcp_target, "gather", _flipping(dcp_target.gather))
    with pytest.raises(DigestMismatchError, match=r"layers\.2"):
        export_dcp(folder / "universal", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out*"))


def _failing_at(name):
    def digest(values, runs, **about):
        if about["name"] == name:
            raise OSError("no more room")
        return digest_runs(values, runs, **about)

    return digest


def _flipping(gather):
    def flipped(source, name, state, pieces, runs, out):
        gather(source, name, state, pieces, runs, out)
        if (name, state) == ("layers.2.attention.dense.weight", "exp_avg"):
            out[-1] += 1.0

    return flipped


def test_flags_of_a_model_folder_are_refused(exported, tmp_path, capsys):
    command = ["export", str(exported("llama") / "universal"), str(tmp_path / "out"), "--format", "dcp"]
    assert cli.main([*command, "--max-positions", "64"]) == 1
    assert "--max-positions" in capsys.readouterr().err
