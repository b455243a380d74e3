"""Checkpoints written by version 1 of the format stay readable, and mean the same numbers."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron.ucp.convert import convert
from megatron.ucp.digest import total
from megatron.ucp.sources import open_source
from megatron.ucp.verify import verify

HERE = Path(__file__).resolve().parent
NATIVE, UNIVERSAL = HERE / "global_step2", HERE / "global_step2_universal"
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
