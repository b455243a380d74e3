"""Checkpoints that earlier code wrote stay readable, and mean the same numbers.

version1/: a native save and a universal folder. version2/: a native save of every layout of files (kinds.py), with the
hashes of what each converts to.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from golden.kinds import KINDS, flags_of, tensor_hashes

from harness.ranks import run_ranks
from matrix.recording import write_dataset
from matrix.taking import take_all
from megatron.ucp.convert import convert
from megatron.ucp.digest import total
from megatron.ucp.sources import open_source
from megatron.ucp.verify import verify

HERE = Path(__file__).resolve().parent
NATIVE, UNIVERSAL = HERE / "version1/global_step2", HERE / "version1/global_step2_universal"
VERSION_2 = HERE / "version2"
EXPECTED = json.loads((VERSION_2 / "expected.json").read_text())
DIGEST = "360ee48d538a445bcaf271e27a84f72d"
"""Of the state when it was saved; written down by hand from the saving run's console."""


@pytest.mark.parametrize("folder", [NATIVE, UNIVERSAL], ids=["native", "universal"])
def test_golden_folder_is_sound_and_means_the_same(folder: Path):
    report = verify(folder)
    assert report.is_sound and "version 1" in report.doubt
    assert report.digest == DIGEST == total(open_source(folder).manifest.digests)


def test_conversion_gives_the_golden_universal_folder(tmp_path):
    made = convert(NATIVE, tmp_path / "out_universal", num_workers=1).manifest
    assert made.format_version == 2 and "version 1" in made.unverified
    files = sorted(path.relative_to(UNIVERSAL) for path in (UNIVERSAL / "zero").rglob("*.pt"))
    assert len(files) == 16 * 4 + 1
    for file in files:
        golden, made = (
            torch.load(folder / file, weights_only=False) for folder in (UNIVERSAL, tmp_path / "out_universal")
        )
        if isinstance(golden, dict) and "param" in golden:
            assert golden.keys() == made.keys()
            golden, made = golden["param"], made["param"]
        if torch.is_tensor(golden):
            assert torch.equal(golden, made), file


def test_a_manifest_without_fields_of_later_writers_is_read(tmp_path):
    """Fields may be added within version 1: what an older writer did not say has its default."""
    folder = Path(shutil.copytree(NATIVE, tmp_path / "older"))
    manifest = json.loads((folder / "ucp.json").read_text())
    for later in ("zero3_order", "saved_by"):
        del manifest[later]
    (folder / "ucp.json").write_text(json.dumps(manifest))
    assert verify(folder).digest == DIGEST


def test_a_changed_golden_file_is_noticed(tmp_path):
    folder = Path(shutil.copytree(UNIVERSAL, tmp_path / "changed"))
    path = folder / "zero" / "final_norm.weight" / "exp_avg.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not verify(folder).is_sound


def test_every_layout_of_files_has_a_golden_save():
    assert KINDS.keys() == EXPECTED.keys() == {path.name for path in VERSION_2.iterdir() if path.is_dir()}
    for stage in range(4):
        assert any(open_source(VERSION_2 / kind).manifest.zero_stage == stage for kind in KINDS)
    manifests = [open_source(VERSION_2 / kind).manifest for kind in KINDS]
    assert {m.is_pipelined for m in manifests} == {True, False}
    assert any(m.topology.ep_size == 2 for m in manifests)
    assert any(not info.is_trainable for m in manifests for info in m.parameters.values())


@pytest.mark.parametrize("kind", KINDS)
def test_version_2_converts_to_the_same_tensors(kind: str, tmp_path):
    report = verify(VERSION_2 / kind)
    assert report.is_sound and report.is_proven and report.digest == EXPECTED[kind]["digest"]
    convert(VERSION_2 / kind, tmp_path / "universal", num_workers=1)
    assert tensor_hashes(tmp_path / "universal") == EXPECTED[kind]["universal"]


@pytest.mark.parametrize("kind", KINDS)
def test_version_2_is_resumed_elsewhere(kind: str, tmp_path):
    """By one process without ZeRO, whose state is noise before."""
    data = write_dataset(tmp_path / "golden_text_document")
    elsewhere = {"zero": 0, "pp": 1, "tp": 1, "no_pipeline_parallel": True, "seed": 99}
    if "experts" in kind:
        elsewhere["moe_expert_parallel_size"] = 1
    (taken,) = run_ranks(1, take_all, flags_of(kind, data, **elsewhere), [("direct", str(VERSION_2 / kind))])
    assert total(taken[0].digests) == EXPECTED[kind]["digest"]
    assert (taken[0].iteration, taken[0].samples) == (2, 16)


def test_planted_fault_one_bit_is_seen_by_the_hashes(tmp_path):
    convert(VERSION_2 / "zero2", tmp_path / "universal", num_workers=1)
    path = tmp_path / "universal/zero/final_norm.weight/exp_avg.pt"
    content = torch.load(path, weights_only=False)
    content["param"].view(torch.int32)[3] ^= 1
    torch.save(content, path)
    found, expected = tensor_hashes(tmp_path / "universal"), EXPECTED["zero2"]["universal"]
    assert [file for file in expected if found[file] != expected[file]] == ["zero/final_norm.weight/exp_avg.pt"]
