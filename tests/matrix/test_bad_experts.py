"""Files of experts that are missing, doubled or exchanged: convert, verify and load name the experts and the files.

Experts of all ep ranks have the same names and shapes, so nothing but a proof by value finds one in another's place.
"""

from __future__ import annotations

import json
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.pt_files import save_again
from harness.ranks import run_ranks
from matrix.cells import Cell, cell
from matrix.families import MODELS
from matrix.recording import build, command_line, train
from megatron.ucp.commit import checksum_file
from megatron.ucp.convert import convert
from megatron.ucp.digest import Digest, digest_tensor
from megatron.ucp.errors import MissingFileError, UcpError
from megatron.ucp.manifest import read_manifest, write_manifest
from megatron.ucp.sources.deepspeed_files import find_files
from megatron.ucp.verify import verify

NUM_STEPS = 2
TAG = f"global_step{NUM_STEPS}"
EXPERTS = "layers.1.mlp.experts.dense_4h_to_h"
SAVED = {
    "moe-tp1pp1dp2ep2-z0": "expp_rank_{}_mp_rank_00_expert_states.pt",
    "moe-tp1pp1dp2ep2-z2": "zero_pp_rank_{}_mp_rank_00_optim_states.pt",
    "moe-tp1pp1dp2ep2-z3": "zero_pp_rank_{}_mp_rank_00_optim_states.pt",
}
"""Which file of an ep rank has its experts' states."""


@pytest.fixture(scope="module")
def line(data):
    def line_of(cell: Cell, **flags) -> list[str]:
        return command_line(data, **{**MODELS["moe"], **cell.flags, "iters": NUM_STEPS, **flags})

    return line_of


@pytest.fixture(scope="module")
def saved(line, tmp_path_factory):
    """Run folders with a native and a universal checkpoint, by name of the cell."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = folder = tmp_path_factory.mktemp(name)
            run_ranks(cell(name).world_size, train, line(cell(name), save=folder))
            convert(folder / TAG, folder / f"{TAG}_universal", num_workers=1)
        return made[name]

    return get


def _outcome(rank: int, world_size: int, argv: list[str]) -> str:
    try:
        build(argv, rank, world_size)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "built"


def _told(folder: Path, argv: list[str], output: Path) -> dict[str, str]:
    """What convert, verify and load say of a checkpoint."""
    with pytest.raises(UcpError) as refusal:
        convert(folder, output, num_workers=1)
    assert not list(output.parent.glob(f"{output.name}*"))
    (loaded,) = run_ranks(1, _outcome, argv)
    return {"convert": str(refusal.value), "verify": "\n".join(verify(folder).findings), "load": loaded}


def _missing(first: Path, second: Path) -> None:
    second.unlink()


def _doubled(first: Path, second: Path) -> None:
    shutil.copyfile(first, second)


def _exchanged(first: Path, second: Path) -> None:
    content = first.read_bytes()
    shutil.copyfile(second, first)
    second.write_bytes(content)


@pytest.mark.parametrize("fault", [_missing, _doubled, _exchanged], ids=lambda it: it.__name__.strip("_"))
@pytest.mark.parametrize("source", SAVED)
def test_a_file_of_an_expert_parallel_rank(source: str, fault, saved, line, tmp_path):
    run = Path(shutil.copytree(saved(source), tmp_path / "run"))
    first, second = (run / TAG / SAVED[source].format(rank) for rank in range(2))
    fault(first, second)
    argv = line(cell("moe-tp1pp1dp1-z0"), load=run, load_tag=TAG)
    for verb, told in _told(run / TAG, argv, tmp_path / "output").items():
        assert f"{EXPERTS} (experts 2 to 3)" in told, verb
        assert second.name in told, verb
        if fault is _exchanged:
            assert f"{EXPERTS} (experts 0 to 1)" in told and first.name in told, verb


@pytest.mark.parametrize("source", ["moe-tp1pp1dp2ep2-z2"])
def test_exchanged_files_whose_table_was_made_right(source: str, saved, line, tmp_path):
    """The checksums say nothing then, the digests all."""
    run = Path(shutil.copytree(saved(source), tmp_path / "run"))
    files = [run / TAG / SAVED[source].format(rank) for rank in range(2)]
    _exchanged(*files)
    manifest = read_manifest(run / TAG)
    right = {file.name: checksum_file(file) for file in files}
    write_manifest(run / TAG, replace(manifest, files={**manifest.files, **right}))
    argv = line(cell("moe-tp1pp1dp1-z0"), load=run, load_tag=TAG)
    told = _told(run / TAG, argv, tmp_path / "output")
    for verb in ("verify", "load"):
        assert f"{EXPERTS} (fp32) (experts 0 to 3)" in told[verb], verb


@pytest.mark.parametrize("has_digests_of_experts", [True, False], ids=["", "of-an-older-writer"])
def test_exchanged_experts_in_a_universal_file(has_digests_of_experts: bool, saved, line, tmp_path):
    run = Path(shutil.copytree(saved("moe-tp1pp1dp2ep2-z2"), tmp_path / "run"))
    folder = run / f"{TAG}_universal"
    file = folder / "zero" / EXPERTS / "exp_avg.pt"
    content = torch.load(file, weights_only=False)
    content["param"] = content["param"][[0, 3, 2, 1]]
    save_again(content, file)
    manifest = read_manifest(folder)
    files = {**manifest.files, file.relative_to(folder).as_posix(): checksum_file(file)}
    write_manifest(folder, replace(manifest, files=files))
    if not has_digests_of_experts:
        fields = json.loads((folder / "ucp.json").read_text())
        for later in ("expert_digests", "checksum", "unverified"):
            del fields[later]
        fields["format_version"] = 1
        (folder / "ucp.json").write_text(json.dumps(fields))
    argv = line(cell("moe-tp1pp1dp1-z0"), load=run, load_tag=folder.name, universal_checkpoint=True)
    named = f"{EXPERTS} (exp_avg)" + (" (experts 1, 3)" if has_digests_of_experts else "")
    for verb, told in _told(folder, argv, tmp_path / "output").items():
        assert named in told, verb
        assert ("(experts" in told) == has_digests_of_experts, verb


@pytest.mark.parametrize("source", [*SAVED, "moe-tp2pp2dp2ep2-z1"])
def test_digests_of_experts_are_of_each_by_itself(source: str, saved):
    """Against the tensors: what is left of a parameter with all other experts' elements not counted."""
    folder = saved(source) / f"{TAG}_universal"
    manifest, native = read_manifest(folder), read_manifest(saved(source) / TAG)
    assert manifest.expert_digests == native.expert_digests
    assert len(manifest.expert_digests) == 4
    for name, states in manifest.expert_digests.items():
        assert set(states) == {"fp32", "exp_avg", "exp_avg_sq"}
        for state, digests in states.items():
            whole = torch.load(folder / "zero" / name / f"{state}.pt", weights_only=False)["param"]
            zeros = digest_tensor(torch.zeros_like(whole), name=name, state=state)
            of_zeros = Digest()
            for expert, digest in enumerate(digests):
                others = torch.zeros_like(whole)
                others[expert] = whole[expert]
                # The same but for this expert: what it adds to zeros, less what its zeros do.
                of_zeros += Digest.from_hex(digest) - (digest_tensor(others, name=name, state=state) - zeros)
            assert of_zeros == zeros, (name, state)
            assert sum(map(Digest.from_hex, digests), Digest()).hex() == manifest.digests[name][state]


def test_as_many_ranks_of_experts_as_nobody_has_are_refused_without_counting_them(saved, tmp_path):
    """A quarter of a million ep ranks in a ZeRO-0 manifest, whose data-parallel degree no file can contradict."""
    folder = Path(shutil.copytree(saved("moe-tp1pp1dp2ep2-z0") / TAG, tmp_path / TAG))
    manifest = read_manifest(folder)
    vast = replace(manifest, topology=replace(manifest.topology, dp_size=1 << 18, ep_size=1 << 18))
    tracemalloc.start()
    with pytest.raises(MissingFileError, match="more than 4096 files .* are missing"):
        find_files(folder, vast)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
