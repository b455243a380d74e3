"""A conversion that was killed goes on, and ends with the same bytes; what it finds there it does not believe."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ucp.synthetic import make_state, model, write_native

from megatron.ucp import convert as convert_module
from megatron.ucp import unfinished
from megatron.ucp.convert import Conversion, convert
from megatron.ucp.crc32 import crc32
from megatron.ucp.disk import require_space
from megatron.ucp.doctor import examine
from megatron.ucp.errors import OutputExistsError, OwnedByOtherError
from megatron.ucp.owner import mark_of
from megatron.ucp.topology import Topology

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def native(tmp_path) -> Path:
    write_native(tmp_path / "n", make_state(model()), Topology(tp_size=2, dp_size=2), 1)
    return tmp_path / "n"


def run(native: Path, before: str = "", output: str = "u") -> tuple[int, str]:
    """A process that converts; `before`: what else it runs first."""
    code = f"from megatron.ucp.targets import universal\nfrom megatron.ucp import convert, unfinished\n{before}\n"
    code += f"convert.convert({str(native)!r}, {str(native.parent / output)!r}, num_workers=2)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def killed_after(native: Path, num_tensors: int, when: str = "after") -> Path:
    """The staging folder of a conversion that a SIGKILL ended when so many tensors had been written: "after" the line
    in the journal, "before" it, or in the "middle" of the next file."""
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    code = {
        "after": f"add(self, tensor); count.append(1)\n    if len(count) >= {num_tensors}: {kill}",
        "before": f"count.append(1)\n    if len(count) > {num_tensors}: {kill}\n    add(self, tensor)",
        "middle": f"add(self, tensor); count.append(1)\n    if len(count) >= {num_tensors}: universal.pour = cut",
    }[when]
    before = f"""
import os, signal
add, count, pour = unfinished.Journal.add, [], universal.pour
def cut(source, name, state, record, **options):
    pour(source, name, state, record, **options)
    {kill}
def counted(self, tensor):
    {code}
unfinished.Journal.add = counted
"""
    code, error = run(native, before)
    assert code == -signal.SIGKILL, error
    assert not (native.parent / "u").exists()
    return native.parent / "u.tmp"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def goes_on(native: Path, **options) -> Conversion:
    result = convert(native, native.parent / "u", **options)
    convert(native, native.parent / "one", **options)
    ours, whole = contents(native.parent / "u"), contents(native.parent / "one")
    assert ours == whole and len(ours) > 20
    folders = [
        {p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_dir()} for f in (result.output, native / "../one")
    ]
    assert folders[0] == folders[1]
    assert not list(native.parent.glob("*.tmp"))
    return result


@pytest.mark.parametrize("when", ["after", "before", "middle"])
@pytest.mark.parametrize("num_tensors", [1, 7, 40])
def test_a_killed_conversion_goes_on(when, num_tensors, native):
    staging = killed_after(native, num_tensors, when)
    there = {p.relative_to(staging): p.stat() for p in staging.rglob("*.pt")}
    lines = len((staging / ".conversion/tensors.journal").read_text().splitlines())
    # The other worker may have written more by then, and both may have been about to write their lines.
    assert num_tensors - 2 <= lines <= num_tensors + 2
    result = goes_on(native)
    assert result.num_kept == lines
    after = {path: (result.output / path).stat() for path in there if (result.output / path).is_file()}
    kept = [path for path, at in there.items() if path in after and after[path].st_mtime_ns == at.st_mtime_ns]
    assert len(kept) >= result.num_kept
    assert f"{result.num_kept} of " in result.told_kept() or not result.num_kept


def test_room_is_asked_while_another_share_renames_its_files(native, monkeypatch):
    staging = killed_after(native, 7)
    (plan,) = [path.read_text() for path in (staging / ".conversion").iterdir() if path.name == unfinished._PLAN]
    there = unfinished.bytes_there(native.parent / "u", plan)
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda top: ((root, dirs, [*names, "gone.tmp"]) for root, dirs, names in walk(top)))
    assert unfinished.bytes_there(native.parent / "u", plan) == there > 0


def test_killed_again_and_again(native):
    random.seed(4)
    held = []
    for _ in range(4):
        killed_after(native, random.randint(1, 9), random.choice(["after", "before", "middle"]))
        held.append(len((native.parent / "u.tmp/.conversion/tensors.journal").read_text().splitlines()))
    assert held == sorted(held) and held[-1] > held[0]
    assert goes_on(native).num_kept >= held[-1] - 1


def journal_of(staging: Path) -> tuple[Path, list[list]]:
    path = staging / ".conversion/tensors.journal"
    return path, [json.loads(line) for line in path.read_text().splitlines()]


def damaged(path: Path) -> bytes:
    """A file with one bit of its values flipped, and with checksums that agree."""
    import torch

    content = torch.load(path, weights_only=False)
    content["param"].view(-1)[0] += 1
    torch.save(content, path)
    return path.read_bytes()


HOSTILE = {
    "a bit flipped": lambda staging, path, line: path.write_bytes(
        path.read_bytes()[:-200] + b"x" + path.read_bytes()[-199:]
    ),
    "cut": lambda staging, path, line: os.truncate(path, 100),
    "empty": lambda staging, path, line: path.write_bytes(b""),
    "gone": lambda staging, path, line: path.unlink(),
    "no zip": lambda staging, path, line: path.write_bytes(b"x" * line[2]),
    "a pipe": lambda staging, path, line: (path.unlink(), os.mkfifo(path)),
    "a link": lambda staging, path, line: (path.rename(staging.parent / "x"), path.symlink_to(staging.parent / "x")),
    "a folder that is a link": lambda staging, path, line: (
        path.parent.rename(staging.parent / "d"),
        path.parent.symlink_to(staging.parent / "d"),
    ),
    "another file": lambda staging, path, line: path.write_bytes(b"stray"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_that_is_not_what_was_written_is_written_again(what, native):
    staging = killed_after(native, 9)
    _, lines = journal_of(staging)
    victim = lines[3]
    HOSTILE[what](staging, staging / f"zero/{victim[0]}/{victim[1]}.pt", victim)
    outside = {
        name: (native.parent / name).stat().st_mtime_ns for name in ("x", "d") if (native.parent / name).exists()
    }
    result = convert(native, native.parent / "u")
    assert len(lines) - 3 <= result.num_kept <= len(lines)
    assert {name: (native.parent / name).stat().st_mtime_ns for name in outside} == outside, "written outside"
    assert contents_as_fresh(native)


def contents_as_fresh(native: Path) -> bool:
    convert(native, native.parent / "one")
    assert not [p for p in (native.parent / "u").rglob("*") if p.is_symlink() or p.is_fifo()]
    return contents(native.parent / "u") == contents(native.parent / "one")


def test_a_forged_file_with_a_checksum_to_match_is_found_by_its_digest(native):
    staging = killed_after(native, 9)
    path, lines = journal_of(staging)
    content = damaged(staging / f"zero/{lines[3][0]}/{lines[3][1]}.pt")
    lines[3][2:4] = [len(content), f"{crc32(content):08x}"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = goes_on(native)
    assert result.num_kept == len(lines) - 1


@pytest.mark.parametrize(
    "line",
    [
        "", "[", "[" * 100_000, "null", "{}", "[]", '["a", "fp32", 1, "00000000", "x"]', "\x00\xff",
        json.dumps(["../../x", "fp32", 1, "0" * 8, "0" * 32]),
        json.dumps(["w", "fp32", 10**400, "0" * 8, "0" * 32]),
        json.dumps([["w"], "fp32", 1, "0" * 8, "0" * 32]),
        json.dumps(["w", {"a": 1}, 1, "0" * 8, "0" * 32]),
        json.dumps(["w", "fp32", True, "0" * 8, 32]),
        json.dumps(["w", "fp32", 1, None, "g" * 32]),
    ],
)  # fmt: skip
def test_no_line_of_the_journal_is_believed(line, native):
    staging = killed_after(native, 5)
    path, lines = journal_of(staging)
    path.write_text(line + "\n" + path.read_text() + line)
    assert goes_on(native).num_kept == len(lines)


@pytest.mark.parametrize("what", ["a link", "a pipe", "huge", "a folder", "no plan"])
def test_a_journal_that_is_none_costs_only_time(what, native):
    staging = killed_after(native, 5)
    path, _ = journal_of(staging)
    path.rename(native.parent / "j")
    if what == "a link":
        path.symlink_to(native.parent / "j")
    elif what == "a pipe":
        os.mkfifo(path)
    elif what == "huge":
        shutil.copy(native.parent / "j", path)
        os.truncate(path, 1 << 40)
    elif what == "a folder":
        path.mkdir()
    else:
        (staging / ".conversion/plan").unlink()
    journal = (native.parent / "j").read_bytes()
    assert goes_on(native).num_kept == 0
    assert (native.parent / "j").read_bytes() == journal


def test_of_another_source_nothing_is_kept(native):
    killed_after(native, 20)
    shutil.rmtree(native)
    write_native(native, make_state(model(), seed=9), Topology(tp_size=2, dp_size=2), 1)
    assert goes_on(native).num_kept == 0


def test_of_another_source_without_a_manifest_nothing_is_kept(native, tmp_path):
    """Of the same names and sizes, as the next save of the same run: only the times tell, and no digest would."""
    for seed in (1, 2):
        shutil.rmtree(native)
        write_native(native, make_state(model(), seed=seed), Topology(dp_size=2), 1)
        (native / "ucp.json").unlink()
        if seed == 1:
            killed_after(native, 20)
    assert goes_on(native).num_kept == 0


def test_other_options_begin_anew(native):
    killed_after(native, 20)
    assert goes_on(native, column_parallel=("nothing",)).num_kept == 0


def test_a_conversion_that_goes_on_is_not_disturbed(native):
    """Its owner lives."""
    staging = killed_after(native, 20)
    owner = subprocess.Popen(
        [sys.executable, "-c", f"from megatron.ucp.owner import claim; claim({str(staging / '.writing')!r}); input()"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
    )
    try:
        while (mark := mark_of(staging / ".writing")) is None or mark.pid != owner.pid:
            assert owner.poll() is None
        with pytest.raises(OwnedByOtherError, match="another process owns"):
            convert(native, native.parent / "u")
    finally:
        owner.communicate(b"\n")
    assert goes_on(native).num_kept >= 20


def test_the_room_that_is_asked_for_is_what_is_missing(native, monkeypatch):
    asked = []
    monkeypatch.setattr(
        convert_module, "require_space", lambda folder, size: asked.append(size) or require_space(folder, size)
    )
    killed_after(native, 40)
    convert(native, native.parent / "u")
    convert(native, native.parent / "one")
    there = sum(p.stat().st_size for p in (native.parent / "u/zero").rglob("*.pt"))
    assert 0.3 * there < asked[1] - asked[0]


def test_a_failure_of_one_that_goes_on_leaves_nothing(native):
    killed_after(native, 9)
    victim = native / "zero_pp_rank_1_mp_rank_01_optim_states.pt"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    code, error = run(native)
    assert code and victim.name in error
    assert not (native.parent / "u").exists() and not (native.parent / "u.tmp").exists()


def test_an_output_that_came_meanwhile_is_told(native):
    killed_after(native, 9)
    (native.parent / "u").mkdir()
    with pytest.raises(OutputExistsError):
        convert(native, native.parent / "u")


def test_the_doctor_says_that_it_would_go_on(native):
    run_folder = native.parent / "run"
    run_folder.mkdir()
    staging = killed_after(native, 9)
    shutil.copytree(native, run_folder / "global_step5")
    shutil.move(staging, run_folder / "global_step5_universal.tmp")
    told = [str(entry) for entry in examine(run_folder).entries if "universal.tmp" in str(entry)]
    assert len(told) == 1 and "would go on with it" in told[0]
