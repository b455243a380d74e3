"""Planted faults: for each checker one thing that it must catch, by name, and leave no output behind."""

import contextlib
import json
import os
import pickle
import resource
import shutil
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.utils.tensor_fragment import fragment_address
from ucp.synthetic import make_state, model, write_native

from megatron.ucp import commit as commit_module
from megatron.ucp.commit import checksum_file, commit, point_to, remove_left_overs, stage
from megatron.ucp.convert import convert
from megatron.ucp.convert_command import main
from megatron.ucp.diff import diff
from megatron.ucp.disk import disk_errors, require_space
from megatron.ucp.errors import (
    CorruptFileError,
    DigestMismatchError,
    ManifestError,
    MissingFileError,
    NotACheckpointError,
    NotEnoughSpaceError,
    OutputExistsError,
    OwnedByOtherError,
    ReplicaMismatchError,
    SourceError,
    UcpError,
    UnsafePickleError,
)
from megatron.ucp.manifest import read_manifest, write_manifest
from megatron.ucp.safe_load import load
from megatron.ucp.sources import find_checkpoint, open_source
from megatron.ucp.topology import Topology
from megatron.ucp.torch_file import save_streamed
from megatron.ucp.verify import verify

STATE = make_state(model(), seed=4)
TOPOLOGY = Topology(tp_size=2, dp_size=2)
ZERO_FILE = "zero_pp_rank_1_mp_rank_01_optim_states.pt"


@pytest.fixture
def native(tmp_path):
    write_native(tmp_path / "run/global_step5", STATE, TOPOLOGY, 1)
    return tmp_path / "run/global_step5"


def assert_refused(native, error, *words):
    """Conversion raises, naming the words, and nothing that could be taken for a checkpoint is left."""
    output = native.parent / "out"
    before = sorted(p.name for p in native.parent.iterdir())
    with pytest.raises(error) as caught:
        convert(native, output)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert sorted(p.name for p in native.parent.iterdir()) == before
    return str(caught.value)


def test_missing_files_are_all_named(native):
    (native / ZERO_FILE).unlink()
    (native / "mp_rank_00_model_states.pt").unlink()
    assert_refused(native, MissingFileError, "zero_pp_rank_1_mp_rank_01", "mp_rank_00_model_states.pt")
    findings = "\n".join(verify(native).findings)
    assert ZERO_FILE in findings and "mp_rank_00_model_states.pt" in findings


def test_a_file_of_another_topology(native):
    shutil.copy(native / ZERO_FILE, native / "zero_pp_rank_2_mp_rank_01_optim_states.pt")
    assert_refused(native, SourceError, "another topology", "zero_pp_rank_2")


def swap(a, b):
    shutil.move(a, a.with_suffix(".x"))
    shutil.move(b, a)
    shutil.move(a.with_suffix(".x"), b)


def test_swapped_tensor_parallel_shards(tmp_path):
    native = tmp_path / "n"
    # Even cuts only: the sizes of uneven ones would give the swap away before the digest has to.
    parameters = [p for p in model() if "mlp" not in p.name]
    write_native(native, {p.name: STATE[p.name] for p in parameters}, TOPOLOGY, 1, parameters=parameters)
    for rank in (0, 1):
        files = [native / f"zero_pp_rank_{rank}_mp_rank_{mp:02d}_optim_states.pt" for mp in (0, 1)]
        swap(*files)
    assert_refused(native, DigestMismatchError)
    findings = "\n".join(verify(native).findings)
    assert "state digest" in findings and "checksum" in findings


def test_swapped_zero_partitions(native):
    swap(native / "zero_pp_rank_0_mp_rank_00_optim_states.pt", native / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    assert_refused(native, UcpError)
    assert not verify(native).is_sound


@pytest.mark.parametrize("topology", [Topology(tp_size=2), Topology(pp_size=2)], ids=str)
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_replicas_that_differ(tmp_path, topology, zero_stage):
    name = "final_norm.weight" if topology.tp_size > 1 else "embedding.word_embeddings.weight"

    def edit(pp, tp, found, state, shard):
        if found != name or state != "exp_avg" or pp + tp == 0 or (pp == 0 and topology.pp_size > 1):
            return shard
        shard = shard.clone()
        shard.view(-1)[3] += 1
        return shard

    write_native(tmp_path / "n", STATE, topology, zero_stage, edit=edit)
    assert_refused(tmp_path / "n", ReplicaMismatchError, name, "exp_avg", "element 3", "mp_rank_01")
    assert name in "\n".join(verify(tmp_path / "n").findings)


def test_nan_replicas_are_compared_by_bits(tmp_path):
    state = {n: {s: t.clone() for s, t in states.items()} for n, states in STATE.items()}
    state["final_norm.weight"]["fp32"][2] = float("nan")
    write_native(tmp_path / "n", state, TOPOLOGY, 1)
    assert verify(convert(tmp_path / "n", tmp_path / "u").output).is_sound


def test_shared_key_heads_that_differ(tmp_path):
    def edit(pp, tp, name, state, shard):
        if name == "layers.0.attention.query_key_value.bias" and state == "fp32" and tp == 3:
            shard = shard.clone()
            shard[-1] += 1  # the last value head is shared by ranks 2 and 3
        return shard

    write_native(tmp_path / "n", STATE, Topology(tp_size=4), 1, edit=edit)
    assert_refused(tmp_path / "n", ReplicaMismatchError, "layers.0.attention.query_key_value.bias", "mp_rank_03")


def test_truncated_file(native):
    os.truncate(native / ZERO_FILE, (native / ZERO_FILE).stat().st_size // 2)
    assert_refused(native, CorruptFileError, ZERO_FILE)
    assert any("bytes" in finding and ZERO_FILE in finding for finding in verify(native).findings)


def flip(path, position):
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_flipped_bit_in_a_tensor(native):
    path = native / ZERO_FILE
    flat = load(path)["optimizer_state_dict"]["single_partition_of_fp32_groups"][0]
    flip(path, path.read_bytes().find(flat.numpy().tobytes()) + 40)
    message = assert_refused(native, (DigestMismatchError, ReplicaMismatchError))
    assert "(fp32)" in message
    assert any("checksum" in finding for finding in verify(native).findings)


def test_flipped_bit_in_the_output_is_found_by_verify_and_diff(native, tmp_path):
    output = convert(native, tmp_path / "u").output
    path = output / "zero/final_norm.weight/exp_avg.pt"
    flip(path, path.read_bytes().find(STATE["final_norm.weight"]["exp_avg"].numpy().tobytes()) + 4)
    findings = "\n".join(verify(output).findings)
    assert "checksum" in findings and "final_norm.weight (exp_avg): state digest" in findings
    difference = diff(native, output, trust_digests=False)
    assert [(d.name, d.state, d.num_different) for d in difference.deltas] == [("final_norm.weight", "exp_avg", 1)]


def test_missing_and_foreign_files_in_the_output(native, tmp_path):
    output = convert(native, tmp_path / "u").output
    (output / "stray.txt").write_text("x")
    (output / "zero/final_norm.weight/step.pt").unlink()
    findings = "\n".join(verify(output).findings)
    assert "stray.txt: not in the table" in findings and "zero/final_norm.weight/step.pt: missing" in findings
    (output / "zero/final_norm.weight/fp32.pt").unlink()
    with pytest.raises(MissingFileError, match="final_norm.weight/fp32.pt"):
        open_source(output)


def test_manifest_that_does_not_fit_the_files(native):
    manifest = read_manifest(native)
    parameters = dict(manifest.parameters)
    parameters["other.weight"] = parameters.pop("final_norm.weight")
    write_manifest(native, replace(manifest, parameters=parameters, digests={}, unverified="a test"))
    assert_refused(native, SourceError, "other.weight", "expected 16", "final_norm.weight on mp_rank 0: not in the man")


class Payload:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_malicious_pickle_is_refused_and_not_run(native, monkeypatch, tmp_path, kind):
    monkeypatch.chdir(tmp_path)
    path = native / ZERO_FILE
    if kind == "bare":
        path.write_bytes(pickle.dumps(Payload()))
    else:
        torch.save({"optimizer_state_dict": Payload()}, path, _use_new_zipfile_serialization=kind == "zip")
    # Without a table of files whose sizes would give it away.
    write_manifest(native, replace(read_manifest(native), files={}, unverified="a test"))
    with pytest.raises(UnsafePickleError) as caught:
        load(path)
    assert "system" in str(caught.value) and ZERO_FILE in str(caught.value)
    assert_refused(native, UnsafePickleError)
    assert not (tmp_path / "owned").exists()
    with contextlib.suppress(RuntimeError):  # a bare pickle is refused by torch.load too, but after it ran
        torch.load(path, weights_only=False)
    assert (tmp_path / "owned").exists()  # the payload was real


def test_run_folder_is_understood_and_said(native, capsys):
    (native.parent / "latest").write_text("global_step5")
    assert find_checkpoint(native.parent) == native
    arguments = ["--input_folder", str(native.parent), "--output_folder", str(native.parent / "u")]
    assert main(arguments) == 0
    assert "converting its latest one, global_step5" in capsys.readouterr().out


def test_run_folder_without_latest_names_what_is_inside(native):
    with pytest.raises(NotACheckpointError, match="global_step5"):
        convert(native.parent, native.parent / "u")


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_no_checkpoint(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotACheckpointError):
        open_source(tmp_path / name)


def test_dangling_latest(native):
    (native.parent / "latest").write_text("global_step6")
    with pytest.raises(NotACheckpointError, match="global_step6"):
        open_source(native.parent)


def test_existing_output_is_left_alone(native):
    output = native.parent / "u"
    output.mkdir()
    (output / "mine").write_text("x")
    with pytest.raises(OutputExistsError):
        convert(native, output)
    assert (output / "mine").read_text() == "x"


def test_left_over_of_a_dead_run_is_removed_and_is_no_checkpoint(native, dead_mark):
    left = native.parent / "u.tmp"
    shutil.copytree(native, left)
    (left / "stray.pt").write_text("x")
    (left / ".writing").write_text(dead_mark)
    with pytest.raises(NotACheckpointError, match="did not finish"):
        open_source(left)
    output = convert(native, native.parent / "u").output
    assert not left.exists() and not (output / "stray.pt").exists() and verify(output).is_sound


def test_a_live_writer_is_not_disturbed(native):
    staging = stage(native.parent / "u")
    (staging / ".writing").write_text(json.dumps({"host": socket.gethostname(), "pid": 1}))
    with pytest.raises(OutputExistsError, match="pid 1"):
        convert(native, native.parent / "u")
    assert staging.exists()


@pytest.mark.parametrize("name", ["u.tmp", "u.replaced"])
@pytest.mark.parametrize("mark", [None, "not a mark", "{}", '{"host": "h", "pid": -1}'], ids=str)
def test_a_folder_of_the_users_own_is_left_alone(native, name, mark):
    for make in (lambda: convert(native, native.parent / "u"), lambda: _replace(native.parent / "u")):
        theirs = native.parent / name
        theirs.mkdir(exist_ok=True)
        (theirs / "mine").write_text("x")
        if mark is not None:
            (theirs / ".writing").write_text(mark)
        if name == "u.replaced" and not (native.parent / "u").exists():
            convert(native, native.parent / "u")  # it does not stand in the way
            continue
        with pytest.raises(OwnedByOtherError, match="not ours"):
            make()
        assert (theirs / "mine").read_text() == "x"


def _replace(final):
    """As a save over an earlier one of the same step does."""
    staging = stage(final, replace=True)
    (staging / "ucp.json").write_text("2")
    commit(staging, final, replace=True)


def test_a_link_in_place_of_the_staging_folder_or_of_the_pointers_temporary_file(native, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/x").write_text("x")
    (native.parent / "u.tmp").symlink_to(tmp_path / "home")
    (native.parent / ".latest_universal.tmp").symlink_to(tmp_path / "home/x")
    with pytest.raises(OwnedByOtherError, match="not ours"):
        convert(native, native.parent / "u")
    (native.parent / "u.tmp").unlink()
    convert(native, native.parent / "u")
    assert (tmp_path / "home/x").read_text() == "x" and [p.name for p in (tmp_path / "home").iterdir()] == ["x"]
    assert (native.parent / "latest_universal").read_text() == "u"


def test_the_mark_is_there_until_the_folder_has_its_name(native, monkeypatch):
    """A second converter in the window between the last flush and the rename must find an owner."""
    seen, rename = [], os.rename

    def watched(source, target):
        if str(target).endswith("/u"):
            seen.append((Path(source) / ".writing").is_file())
        rename(source, target)

    monkeypatch.setattr(commit_module.os, "rename", watched)
    output = convert(native, native.parent / "u").output
    assert seen == [True] and not (output / ".writing").exists()


def test_left_overs_are_removed_by_mark_only(tmp_path, dead_mark):
    for name, mark in (
        ("global_step1.tmp", dead_mark),
        ("global_step2.tmp", None),
        ("global_step3.tmp", json.dumps({"host": "elsewhere", "pid": 7})),
        ("global_step4.tmp", json.dumps({"host": socket.gethostname(), "pid": 1})),
        ("global_step5.replaced", dead_mark),
        ("global_step6.replaced", dead_mark),
        ("global_step6", None),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ucp.json").write_text("x")
        if mark:
            (tmp_path / name / ".writing").write_text(mark)
    assert remove_left_overs(tmp_path) == ["global_step1.tmp", "global_step6.replaced"]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f"global_step{n}" for n in ("2.tmp", "3.tmp", "4.tmp", "5.replaced", "6")]


@pytest.fixture
def dead_mark() -> str:
    process = subprocess.Popen(["true"])
    process.wait()
    return json.dumps({"host": socket.gethostname(), "pid": process.pid})


def test_full_disk_is_noticed_before_writing(native, monkeypatch):
    usage = shutil.disk_usage(native)
    monkeypatch.setattr(commit_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert_refused(native, NotEnoughSpaceError, "MiB")
    with pytest.raises(NotEnoughSpaceError):
        require_space(native / "deep/er", 2000)


def test_a_failing_worker_names_its_parameter(native, monkeypatch):
    from megatron.ucp.targets import universal

    def broken(source, name, state, *args, **kwargs):
        if (name, state) == ("final_norm.weight", "exp_avg"):
            raise OSError("disk on fire")
        return pour(source, name, state, *args, **kwargs)

    pour = universal.pour
    monkeypatch.setattr(universal, "pour", broken)
    assert_refused(native, UcpError, "final_norm.weight (exp_avg)", "disk on fire")


def test_commit_needs_the_manifest(tmp_path):
    staging = stage(tmp_path / "final")
    with pytest.raises(NotACheckpointError):
        commit(staging, tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_pointer_is_replaced_whole(tmp_path):
    point_to(tmp_path, "latest", "a")
    point_to(tmp_path, "latest", "b")
    assert (tmp_path / "latest").read_text() == "b" and len(list(tmp_path.iterdir())) == 1


def test_replacing_a_checkpoint_keeps_one_whole(tmp_path):
    for text in ("1", "2"):
        staging = stage(tmp_path / "final", replace=True)
        (staging / "ucp.json").write_text(text)
        commit(staging, tmp_path / "final", replace=True)
    assert (tmp_path / "final/ucp.json").read_text() == "2" and [p.name for p in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d.update(format_version=99),
        lambda d: d.pop("parameters"),
        lambda d: d.update(kind="frozen"),
        lambda d: d["topology"].update(zp_size=2),
        lambda d: next(iter(d["parameters"].values())).pop("layout"),
        lambda d: d.update(files={"a": {"bytes": 1}}),
    ],
)
def test_manifests_that_cannot_be_understood(native, edit):
    path = native / "ucp.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ManifestError):
        read_manifest(native)


def test_manifest_that_is_not_json(native):
    (native / "ucp.json").write_text("{")
    with pytest.raises(ManifestError, match="JSON"):
        read_manifest(native)


def test_manifest_survives_json(native):
    manifest = read_manifest(native)
    write_manifest(native, manifest)
    assert read_manifest(native) == manifest and manifest.files[ZERO_FILE] == checksum_file(native / ZERO_FILE)


def test_errors_survive_pickling():
    error = MissingFileError("2 files are missing", found=["b", "a"], where="here", do="copy them")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is MissingFileError and str(again) == str(error) and "a, b" in str(error)


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(native):
    """617 bytes that would become gigabytes: one element, repeated by a stride of 0."""
    path = native / ZERO_FILE
    content = load(path, mmap=False)
    held = content["optimizer_state_dict"]
    held["single_partition_of_fp32_groups"][0] = torch.zeros(1).expand(1 << 29)
    # torch.save names classes where they are: DeepSpeed's own, not ours that stand for them.
    tables = held["param_slice_mappings"]
    held["param_slice_mappings"] = [{n: fragment_address(a.numel, a.start) for n, a in t.items()} for t in tables]
    held["loss_scaler"] = None
    torch.save(content, path)
    write_manifest(native, replace(read_manifest(native), files={}, unverified="a test"))
    assert_refused(native, CorruptFileError, "claims more than the file holds", ZERO_FILE)


@pytest.mark.parametrize("error", [IndexError, MemoryError, RecursionError, AttributeError, AssertionError])
def test_whatever_the_unpickler_stumbles_over_is_told_by_file(native, error, monkeypatch):
    def broken(*args, **kwargs):
        raise error("planted")

    monkeypatch.setattr(torch, "load", broken)
    with pytest.raises(CorruptFileError, match=f"{error.__name__}: planted") as caught:
        load(native / ZERO_FILE)
    assert ZERO_FILE in str(caught.value) and "what to do" in str(caught.value)


@contextlib.contextmanager
def _files_no_longer_than(num_bytes: int):
    """The system refuses to write on, as it does on a full disk, for any process and without a disk of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [100, 1000, 2000])
def test_a_conversion_that_the_system_stops_says_what_it_says(native, limit):
    with (
        _files_no_longer_than(limit),
        pytest.raises(NotEnoughSpaceError, match=rf"File too large\n  found: .*{limit} bytes.*bytes free") as caught,
    ):
        convert(native, native.parent / "u")
    assert str(native.parent / "u") in str(caught.value)
    assert not list(native.parent.glob("u*"))


@pytest.mark.parametrize("limit", [0, 64, 5000])
def test_torchs_writer_is_asked_what_stopped_it(limit, tmp_path):
    with _files_no_longer_than(limit), pytest.raises(NotEnoughSpaceError, match="File too large") as caught:
        save_streamed({"a": torch.zeros(10_000)}, tmp_path / "a.pt")
    assert str(tmp_path / "a.pt") in str(caught.value)


def test_an_error_that_has_nothing_to_do_with_the_disk_stays(tmp_path):
    with pytest.raises(RuntimeError, match="another"), disk_errors(tmp_path / "a"):
        raise RuntimeError("another")
    assert not list(tmp_path.iterdir())
