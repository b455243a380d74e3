"""Nothing of a ucp.json is believed before it is checked, and no flip of a bit of any file is silent."""

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from ucp.synthetic import layout_of, make_state, model, write_native

from megatron.ucp import convert as convert_module
from megatron.ucp import verify as verify_module
from megatron.ucp.cli import main
from megatron.ucp.commit import checksum_file, data_files
from megatron.ucp.convert import convert
from megatron.ucp.deepspeed_compat import universal_checkpoint_info
from megatron.ucp.diff import diff
from megatron.ucp.errors import ChangedWhileReadError, CorruptFileError, ManifestError, UcpError
from megatron.ucp.manifest import manifest_bytes, parse_manifest, read_manifest, write_manifest
from megatron.ucp.safe_load import load
from megatron.ucp.sources import open_source
from megatron.ucp.topology import Topology
from megatron.ucp.verify import verify

PARAMETERS = model(num_layers=1)
STATE = make_state(PARAMETERS)
TOPOLOGY = Topology(tp_size=2, dp_size=2)
INFO = universal_checkpoint_info({p.name: layout_of(p, 2) for p in PARAMETERS}, tp_size=2, tied=[])
RNG = "rng_state.safetensors"


def with_side_file(folder: Path) -> Path:
    """As a save of the trainer's: with random streams beside DeepSpeed's files."""
    (folder / RNG).write_bytes(bytes(range(256)) * 4)
    manifest = read_manifest(folder)
    common = {**manifest.common, "rng": {"file": RNG, "world_size": 4}}
    files = {path: checksum_file(folder / path) for path in data_files(folder)}
    write_manifest(folder, replace(manifest, common=common, files=files))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    write_native(root / "native", STATE, TOPOLOGY, 1, parameters=PARAMETERS, info=INFO)
    write_native(root / "zero0", STATE, Topology(tp_size=2, pp_size=2), 0, parameters=PARAMETERS)
    write_native(root / "zero3", STATE, Topology(dp_size=2), 3, parameters=PARAMETERS)
    for name in ("native", "zero0", "zero3"):
        with_side_file(root / name)
    convert(root / "native", root / "universal")
    return root


KINDS = ("native", "zero0", "zero3", "universal")


@pytest.fixture
def copy_of(saved, tmp_path):
    return lambda kind: Path(shutil.copytree(saved / kind, tmp_path / kind))


def flip(path: Path, position: int, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1 << bit
    path.write_bytes(raw)


def is_told(call) -> bool:
    try:
        call()
    except UcpError:
        return True
    return False


# -- flips -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_is_silent(kind, copy_of, tmp_path):
    """In every file, at seeded places: verify says NOT sound, and no conversion comes of it."""
    folder, random_ = copy_of(kind), random.Random(7)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    chosen = files if len(files) < 14 else [folder / "ucp.json", folder / RNG, *random_.sample(files, 10)]
    for number, path in enumerate(chosen):
        before = path.read_bytes()
        flip(path, random_.randrange(len(before)), random_.randrange(8))
        assert not verify(folder).is_sound, path.name
        assert is_told(lambda number=number: convert(folder, tmp_path / f"out{number}")), path.name
        path.write_bytes(before)
    assert verify(folder).is_sound and verify(folder).is_proven


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_of_the_manifest_is_silent(kind, copy_of):
    folder, random_ = copy_of(kind), random.Random(8)
    raw = (folder / "ucp.json").read_bytes()
    where = folder / "ucp.json"
    assert parse_manifest(raw, where) == read_manifest(folder)
    for _ in range(300):
        changed = bytearray(raw)
        changed[random_.randrange(len(raw))] ^= 1 << random_.randrange(8)
        with pytest.raises(ManifestError):
            parse_manifest(bytes(changed), where)


# -- schema: a manifest that agrees with its checksum ------------------------------------------------------------------


def signed(folder: Path, change) -> None:
    """The planted fault, and a checksum that holds."""
    data = json.loads((folder / "ucp.json").read_text())
    change(data)
    (folder / "ucp.json").write_bytes(manifest_bytes(data))


NORM = "final_norm.weight"
FAULTS = {
    "digest-key": (lambda d: d["digests"][NORM].update(exP_avg=d["digests"][NORM].pop("exp_avg")), "exP_avg"),
    "digest-lost": (lambda d: d["digests"].pop(NORM), f"digests.{NORM}: is missing"),
    "digests-empty": (lambda d: d.update(digests={}), "digests: is empty"),
    "digest-not-hex": (lambda d: d["digests"][NORM].update(fp32="g" * 32), "hexadecimal"),
    "files-empty": (lambda d: d.update(files={}), "files: is empty"),
    "iteration": (lambda d: d["common"].update(iteration=-3), "common.iteration: -3"),
    "group-unknown": (lambda d: d["parameters"][NORM].update(group="another"), "none of optimizer.groups"),
    "group-long": (lambda d: d["optimizer"]["groups"].update({"x" * 1001: {}}), "longer than 1000 characters"),
    "dtype": (lambda d: d["parameters"][NORM].update(dtype="float31"), f"parameters.{NORM}.dtype: 'float31'"),
    "surrogate": (lambda d: d["saved_by"].update(framework="\ud83d"), "half of a surrogate pair"),
    "iteration-flag": (lambda d: d["common"].update(iteration=True), "common.iteration: True"),
    "samples": (lambda d: d["common"].update(consumed_train_samples="7"), "consumed_train_samples"),
    "lr": (lambda d: d["optimizer"]["groups"]["decay"].update(lr="much"), "optimizer.groups.decay.lr"),
    "eps": (lambda d: d["optimizer"]["groups"]["decay"].update(eps=-1e-8), "optimizer.groups.decay.eps"),
    "two-eps": (lambda d: d["optimizer"]["groups"]["decay"].update(eps=[1e-8, "x"]), "optimizer.groups.decay.eps[1]"),
    "no-groups": (lambda d: d["optimizer"].pop("groups"), "optimizer.groups: is missing"),
    "no-step": (lambda d: d["parameters"][NORM].pop("step"), f"parameters.{NORM}.step: is missing"),
    "weight-decay": (lambda d: d["optimizer"]["groups"]["decay"].update(weight_decay=-1), "weight_decay: -1"),
    "topology": (lambda d: d["topology"].update(dp_size=10**7), "topology.dp_size"),
    "topology-none": (lambda d: d.update(topology=None), "topology: None is no object"),
    "stage": (lambda d: d.update(zero_stage=4), "zero_stage: 4"),
    "stages": (lambda d: d["parameters"][NORM].update(pp_stages=[0, 1]), "pp_stages"),
    "states": (lambda d: d["parameters"][NORM].update(states=["exp_avg", "fp32"]), "states"),
    "states-path": (lambda d: d["parameters"][NORM].update(states=["fp32", "../../x"]), "holds a '/'"),
    "step": (lambda d: d["parameters"][NORM].update(step=-1.0), "step: -1.0"),
    "shape": (lambda d: d["parameters"][NORM]["layout"].update(shape=[1 << 40, 1 << 40]), "elements"),
    "layout": (lambda d: d["parameters"][NORM].update(layout=[]), "layout: [] is no object"),
    "unknown": (lambda d: d["parameters"][NORM].update(colour="red"), "colour: is not known"),
    "name": (lambda d: d["parameters"].update({"../x": d["parameters"][NORM]}), "'../x'"),
    "path": (lambda d: d["files"].update({"/etc/passwd": {"bytes": 1, "crc32": "0" * 8}}), "is absolute"),
    "bytes": (lambda d: d["files"].update({"a": {"bytes": -1, "crc32": "0" * 8}}), "files.a.bytes"),
    "rng-unlisted": (lambda d: d["files"].pop(RNG), RNG),
    "rng-path": (lambda d: d["common"]["rng"].update(file="../x"), "common.rng.file"),
    "removed": (lambda d: d.pop("expert_digests"), "expert_digests: is missing"),
    "unverified": (lambda d: d.update(unverified=None), "unverified"),
    "deep": (lambda d: d["model"].update(a=json.loads("[" * 40 + "]" * 40)), "nested"),
    "version": (lambda d: d.update(format_version=True), "format_version"),
    "fragments": (lambda d: d["fragments"].update({NORM: [[9, 0, 0, 0, 16]]}), f"fragments.{NORM}"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_is_refused_by_its_place(fault, copy_of, capsys):
    folder = copy_of("native")
    change, told = FAULTS[fault]
    signed(folder, change)
    with pytest.raises(ManifestError) as caught:
        open_source(folder)
    assert told in str(caught.value) and "what to do" in str(caught.value)
    assert not verify(folder).is_sound
    for command in (["inspect"], ["verify"], ["diff", str(folder)], ["plan"], ["convert", str(folder) + "_u"]):
        assert main([command[0], str(folder), *command[1:]]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_all_faults_are_told_at_once(copy_of):
    folder = copy_of("native")
    signed(folder, lambda d: (FAULTS["iteration"][0](d), FAULTS["stage"][0](d), FAULTS["step"][0](d)))
    with pytest.raises(ManifestError, match=r"3 fault\(s\)") as caught:
        open_source(folder)
    assert all(FAULTS[name][1] in str(caught.value) for name in ("iteration", "stage", "step"))


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe{}", b"[" * 100_000, b'{"kind": 1, "kind": 2}', b'{"a": ' * 90_000],
    ids=["empty", "cut", "list", "null", "number", "utf-16", "deep", "twice", "deep-objects"],
)
def test_what_is_no_manifest_is_said(raw, tmp_path, capsys):
    (tmp_path / "ucp.json").write_bytes(raw)
    with pytest.raises(ManifestError):
        open_source(tmp_path)
    assert main(["verify", str(tmp_path)]) == 1 and "Traceback" not in capsys.readouterr().err


def test_a_file_that_is_read_but_not_listed_is_refused(copy_of):
    folder = copy_of("native")
    signed(folder, lambda d: d["files"].pop("mp_rank_01_model_states.pt"))
    with pytest.raises(ManifestError, match="not in the table") as caught:
        open_source(folder)
    assert "mp_rank_01_model_states.pt" in str(caught.value)


# -- proof is not made by converting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file, text", [(RNG, b"abc"), ("mp_rank_00_model_states.pt", b"0.19.8")])
def test_an_unsound_side_file_does_not_convert(file, text, copy_of, tmp_path):
    folder = copy_of("native")
    flip(folder / file, (folder / file).read_bytes().find(text), 0)
    with pytest.raises(CorruptFileError, match=file):
        convert(folder, tmp_path / "u")
    assert not (tmp_path / "u").exists() and not (tmp_path / "latest_universal").exists()


def test_a_lost_manifest_and_a_flipped_bit_do_not_become_proof(copy_of, tmp_path, capsys):
    folder = copy_of("native")
    (folder / "ucp.json").unlink()
    (folder / RNG).unlink()
    path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    moments = load(path)["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"]
    flip(path, path.read_bytes().find(moments.numpy().tobytes()), 0)
    convert(folder, tmp_path / "u")
    convert(tmp_path / "u", tmp_path / "again")
    for output in ("u", "again"):
        report = verify(tmp_path / output)
        assert report.is_sound and not report.is_proven and "without checksums" in report.doubt
        assert read_manifest(tmp_path / output).unverified
        assert main(["verify", str(tmp_path / output)]) == 0 and "unverified" in capsys.readouterr().out
        assert main(["inspect", str(tmp_path / output)]) == 0 and "verified    no: " in capsys.readouterr().out


def test_a_proven_save_converts_to_a_proven_folder(saved):
    report = verify(saved / "universal")
    assert report.is_proven and not report.doubt and read_manifest(saved / "universal").unverified == ""


def test_a_version_1_manifest_says_so_and_its_checks_hold(copy_of):
    def older(data):
        for later in ("checksum", "unverified"):
            del data[later]
        data["format_version"] = 1

    folder = copy_of("native")
    data = json.loads((folder / "ucp.json").read_text())
    older(data)
    (folder / "ucp.json").write_text(json.dumps(data))
    report = verify(folder)
    assert report.is_sound and not report.is_proven and "version 1" in report.doubt
    FAULTS["digest-key"][0](data)
    (folder / "ucp.json").write_text(json.dumps(data))
    assert not verify(folder).is_sound


# -- a save that replaces the folder while it is read ------------------------------------------------------------------


@pytest.fixture
def swapped(copy_of, saved, tmp_path):
    """(folder, swap): another state under the same names takes the folder's place when `swap` is called."""

    def make(with_manifest: bool = True):
        folder = copy_of("native")
        other = make_state(PARAMETERS, seed=1)
        write_native(tmp_path / "other", other, TOPOLOGY, 1, parameters=PARAMETERS, info=INFO)
        with_side_file(tmp_path / "other")
        if not with_manifest:
            (folder / "ucp.json").unlink()
            (tmp_path / "other/ucp.json").unlink()

        def swap():
            if (tmp_path / "other").exists():
                os.rename(folder, tmp_path / "aside")
                os.rename(tmp_path / "other", folder)

        return folder, swap

    return make


def before(call, swap):
    def wrapped(*args, **kwargs):
        swap()
        return call(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("with_manifest", [True, False], ids=["ours", "foreign"])
@pytest.mark.parametrize("step", ["write_universal", "require_unchanged", "write_manifest"])
def test_a_conversion_of_two_saves_is_refused(step, with_manifest, swapped, tmp_path, monkeypatch):
    folder, swap = swapped(with_manifest)
    monkeypatch.setattr(convert_module, step, before(getattr(convert_module, step), swap))
    with pytest.raises(ChangedWhileReadError, match="replaced"):
        convert(folder, tmp_path / "u")
    assert not (tmp_path / "u").exists() and not (tmp_path / "u.tmp").exists()


@pytest.mark.parametrize("step", ["open_source", "_check_side_files"])
def test_verify_does_not_judge_two_saves_as_one(step, swapped, monkeypatch):
    folder, swap = swapped()
    monkeypatch.setattr(verify_module, step, before(getattr(verify_module, step), swap))
    with pytest.raises(ChangedWhileReadError):
        verify(folder)


def test_diff_does_not_compare_two_saves_as_one(swapped, saved, monkeypatch):
    from megatron.ucp import diff as diff_module

    folder, swap = swapped()
    monkeypatch.setattr(diff_module, "_compare_tables", before(diff_module._compare_tables, swap))
    with pytest.raises(ChangedWhileReadError):
        diff(folder, saved / "universal")


# -- into itself -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["native", "native/u", "link", "link/u"])
def test_converting_into_the_checkpoint_itself_is_refused(output, copy_of, tmp_path):
    folder = copy_of("native")
    (tmp_path / "link").symlink_to(folder)
    files = sorted(folder.rglob("*"))
    with pytest.raises(UcpError, match="one folder, or one lies in the other|already there"):
        convert(folder, tmp_path / output)
    assert sorted(folder.rglob("*")) == files and verify(folder).is_sound
