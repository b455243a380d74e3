"""A machine that stops at any file event of a save or a conversion: no state is lost, and the command goes on."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fuzz.crash_points import MUTATIONS, OPERATIONS
from ucp.synthetic import make_state, model, write_native

from megatron.ucp import native
from megatron.ucp.convert import convert
from megatron.ucp.digest import total
from megatron.ucp.manifest import read_manifest, write_manifest
from megatron.ucp.topology import Topology

ROOT = Path(__file__).resolve().parents[2]
DRIVER = [sys.executable, str(ROOT / "tests/fuzz/crash_points.py")]
CASES = 3_010
SIZES = 14
"""Of a disk that is too small, for each operation."""
PLANTED_CASES = 60 if native.kernel is not None else 160
FINE = {"older", "newer", "done", "named"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """A run with two checkpoints, what its next save would hold, and what the newer one is converted to. In memory
    where there is such a folder: what a flush does is not asked of a disk."""
    memory = Path("/dev/shm")
    base = memory if os.access(memory, os.W_OK) else tmp_path_factory.getbasetemp()
    place = Path(tempfile.mkdtemp(prefix="crash-", dir=base))
    try:
        yield prepared(place)
    finally:
        shutil.rmtree(place)


def prepared(made: Path) -> Path:
    parameters = model(vocabulary=40)
    states = {}
    for name, seed, iteration in (("run/global_step2", 1, 2), ("run/global_step4", 2, 4), ("second", 3, 8)):
        place = made / "base" / name
        write_native(place, make_state(parameters, seed=seed), Topology(dp_size=2), 1, parameters=parameters)
        manifest = read_manifest(place)
        manifest = replace(manifest, common={**manifest.common, "iteration": iteration})
        write_manifest(place, manifest)
        states[total(manifest.digests)] = {2: "oldest", 4: "older", 8: "newer"}[iteration]
    (made / "base/run/latest").write_text("global_step4")
    convert(made / "base/run/global_step4", made / "converted")
    (made / "base/run/latest_universal").unlink(missing_ok=True)
    (made / "states.json").write_text(json.dumps(states))
    return made


def start(folder: Path, seed: int, cases: int, *mutation: str) -> subprocess.Popen:
    command = [*DRIVER, str(folder), str(seed), str(cases), *mutation]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def told(process: subprocess.Popen) -> dict:
    output, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(output)


def test_no_state_is_lost_at_any_moment(folder):
    parts = [told(process) for process in [start(folder, seed, CASES // 2) for seed in (1, 2)]]
    faults = [fault for part in parts for fault in part["faults"]]
    counts = {name: sum((Counter(part["outcomes"][name]) for part in parts), Counter()) for name in OPERATIONS}
    kinds = sorted({kind for each in counts.values() for kind in each})
    print(f"\n{'stopped in':20} {'events':>6} " + " ".join(f"{kind:>8}" for kind in kinds))
    for name, each in counts.items():
        print(f"{name:20} {parts[0]['events'][name]:6} " + " ".join(f"{each[kind]:8}" for kind in kinds))
    assert not faults, "\n".join(faults[:20])
    assert set(kinds) <= FINE and sum(sum(each.values()) for each in counts.values()) >= 3_000
    for name, each in counts.items():
        assert each["older"] > 20 and (each["newer"] or name.startswith(("convert", "doctor"))), (name, each)
    assert sum(each["named"] for each in counts.values()) < 0.05 * CASES, [part["named"] for part in parts]


def test_a_disk_that_is_too_small_or_read_only(folder):
    """A real one, where the system lets a user mount one: errors of the disk at every event are planted above."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = [*namespace, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if shutil.which("unshare") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs of one's own cannot be mounted here")
    command = [*namespace, sys.executable, str(ROOT / "tests/fuzz/small_disk.py"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parts = []
    for arguments in ([str(SIZES)], ["5", "plant"]):
        shutil.rmtree(folder / "small", ignore_errors=True)
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        parts.append(json.loads(done.stdout))
    found, planted = parts
    assert planted["faults"]
    assert not found["faults"], "\n".join(found["faults"][:10])
    for name, counts in found["outcomes"].items():
        assert sum(counts.values()) == SIZES + 1 and min(counts.get("older", 0), counts.get("newer", 0)) > 1, (
            name,
            counts,
        )


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_check_that_is_taken_away_is_seen(mutation, folder):
    place = list(MUTATIONS).index(mutation)
    faults = told(start(folder, 100 + place, PLANTED_CASES, mutation))["faults"]
    assert faults, mutation
