"""FORMAT.md against the writer: fields, patterns, layout of the folder, the worked example."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from ucp.synthetic import make_state, model, write_native

from megatron.ucp import layout as layout_module
from megatron.ucp.convert import convert
from megatron.ucp.digest import digest_tensor
from megatron.ucp.layout import Layout, ShardRank
from megatron.ucp.manifest import FORMAT_VERSION, ParameterInfo
from megatron.ucp.safe_load import load
from megatron.ucp.targets.universal import file_keys
from megatron.ucp.topology import Topology

TEXT = (Path(layout_module.__file__).parent / "FORMAT.md").read_text()


def section(number: int) -> str:
    return re.search(rf"^## {number}\. .*?(?=^## |\Z)", TEXT, re.M | re.S)[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("format")
    write_native(root / "n", make_state(model()), Topology(tp_size=2, pp_size=2), 0)
    convert(root / "n", root / "u")
    return root / "n", root / "u"


def test_the_table_lists_exactly_the_fields_of_both_kinds(folders):
    rows = [line.split("|")[1] for line in section(3).splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    for folder in folders:
        written = json.loads((folder / "ucp.json").read_text())
        assert set(written) == listed
    assert f"version {FORMAT_VERSION}" in TEXT.splitlines()[0]


def test_parameters_have_the_listed_fields(folders):
    row = next(line for line in section(3).splitlines() if line.startswith("| `parameters`"))
    listed = set(re.findall(r"`(\w+)`", row.split("|")[2]))
    assert listed == {f.name for f in fields(ParameterInfo)}
    written = json.loads((folders[1] / "ucp.json").read_text())["parameters"]["final_norm.weight"]
    assert set(written) == listed


def test_patterns_are_listed():
    listed = re.search(r"one of `([\w ]+)`", section(4))[1].split()
    assert tuple(listed) == layout_module.PATTERNS


def test_every_file_of_a_universal_folder_is_one_of_those_described(folders):
    known = re.compile(
        r"zero/[^/]+/(fp32|exp_avg|exp_avg_sq|step)\.pt|zero/optimizer_state\.pt|ucp\.json|"
        r"(zero_pp_rank_0_)?mp_rank_\d\d_model_states\.pt"
    )
    found = {p.relative_to(folders[1]).as_posix() for p in folders[1].rglob("*") if p.is_file()}
    assert all(known.fullmatch(path) for path in found), found
    assert set(json.loads((folders[1] / "ucp.json").read_text())["files"]) == found - {"ucp.json"}


def test_files_load_restricted_and_mapped(folders):
    paths = [path for path in folders[1].rglob("*.pt") if "query_key_value" not in str(path)]
    assert len(paths) > 30
    for path in paths:
        torch.load(path, weights_only=True, mmap=True)


def test_model_states_hold_no_tensors(folders):
    content = load(folders[1] / "mp_rank_00_model_states.pt")
    assert content["module"] == {} and content["optimizer"] is None and content["global_steps"] == 5


def test_worked_example():
    example = json.loads(re.search(r"<!-- example -->\n```json\n(.*?)```", TEXT, re.S)[1])
    layout = Layout.from_json(example["layout"])
    assert layout.to_json() == example["layout"]
    atomic = torch.arange(1.0, 7.0).reshape(3, 2)
    shards = [layout.split(atomic, ShardRank(t, 2)).tolist() for t in range(2)]
    shown = re.search(r"rank 0 holds (\[\[.*?\]\]), rank 1 holds (\[\[.*?\]\])", TEXT)
    assert [json.loads(shown[1]), json.loads(shown[2])] == shards
    assert digest_tensor(atomic, name="w", state="fp32").hex() == example["digest of (w, fp32)"]
    assert file_keys(layout, "w") == example["keys of zero/w/fp32.pt"]
