"""What the doctor finds in a run folder, what it mends, and what it leaves alone."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from ucp.synthetic import make_state, model, write_native

from megatron.ucp import cli, commit
from megatron.ucp.commit import DAMAGE_MARK, OWNER_MARK, RUN_MARK
from megatron.ucp.doctor import Entry, examine, mend
from megatron.ucp.manifest import read_manifest, write_manifest
from megatron.ucp.topology import Topology

STATE = make_state(model(), seed=5)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with checkpoints of iterations 3 and 5."""
    import dataclasses

    folder = tmp_path / "run"
    for iteration in (3, 5):
        made = folder / f"global_step{iteration}"
        write_native(made, STATE, Topology(dp_size=2), 1)
        manifest = read_manifest(made)
        write_manifest(made, dataclasses.replace(manifest, common={**manifest.common, "iteration": iteration}))
    (folder / "latest").write_text("global_step5")
    return folder


def _of(folder: Path, name: str, **options) -> Entry:
    (entry,) = [entry for entry in examine(folder, **options).entries if entry.name == name]
    return entry


def _mark(folder: Path, pid: int, host: str = "") -> None:
    text = json.dumps({"host": host or socket.gethostname(), "pid": pid, "started": "", "place": "", "token": "t"})
    (folder / OWNER_MARK).write_text(text)


def _dead_pid() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _optimizer_file(folder: Path) -> Path:
    return next(folder.glob("*optim_states.pt"))


def test_all_is_well(run):
    for full in (False, True):
        examined = examine(run, full=full)
        assert examined.is_well and examined.would_resume == "global_step5"
        assert {(entry.name, entry.what) for entry in examined.entries} == {
            ("global_step3", "whole"),
            ("global_step5", "whole"),
            ("latest", "pointer"),
        }
        assert mend(examined) == []


def test_a_flipped_byte_is_found_where_every_byte_is_read(run):
    _flip(_optimizer_file(run / "global_step5"))
    assert _of(run, "global_step5").what == "whole"
    entry = _of(run, "global_step5", full=True)
    assert entry.what == "damaged" and _optimizer_file(run / "global_step5").name in entry.why and not entry.fix


@pytest.mark.parametrize("damage", ["short", "gone", "manifest"])
def test_a_damaged_checkpoint_is_told_and_never_removed(damage: str, run):
    path = _optimizer_file(run / "global_step5")
    if damage == "short":
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "gone":
        path.unlink()
    else:
        (run / "global_step5/ucp.json").write_text("{")
    examined = examine(run)
    assert not examined.is_well and _of(run, "global_step5").what == "damaged"
    mend(examined)
    assert (run / "global_step5").is_dir()


def test_a_mark_goes_when_every_byte_proves_it_wrong(run):
    commit.mark_damaged(run / "global_step5", "a rank said so")
    examined = examine(run)
    assert examined.would_resume == "global_step3" and "a rank said so" in _of(run, "global_step5").why
    assert mend(examined) == []  # sizes prove nothing
    assert mend(examine(run, full=True)) == ["global_step5: its mark is taken away"]
    assert examine(run).would_resume == "global_step5" and examine(run).is_well


def test_a_true_mark_stays(run):
    _flip(_optimizer_file(run / "global_step5"))
    commit.mark_damaged(run / "global_step5", "a rank said so")
    assert mend(examine(run, full=True)) == []
    assert (run / "global_step5" / DAMAGE_MARK).is_file()


@pytest.mark.parametrize("content", ["global_step7", "", "../elsewhere", None], ids=["gone", "empty", "out", "none"])
def test_a_lost_pointer_names_the_newest_whole_one(content: str | None, run):
    (run / "latest").unlink()
    if content is not None:
        (run / "latest").write_text(content)
    _optimizer_file(run / "global_step5").unlink()
    assert _of(run, "latest").what == "lost pointer"
    assert mend(examine(run)) == ["latest: names global_step3"]
    assert (run / "latest").read_text() == "global_step3"


def test_an_interrupted_replacement_is_ended(run):
    (run / "global_step5").rename(run / "global_step5.replaced")
    _mark(run / "global_step5.replaced", _dead_pid())
    entry = _of(run, "global_step5.replaced")
    assert (entry.what, entry.fix) == ("replaced", "rename back")
    mend(examine(run))
    assert examine(run).is_well and examine(run).would_resume == "global_step5"


def test_one_whose_successor_is_there_is_a_left_over(run):
    write_native(run / "global_step5.replaced", STATE, Topology(dp_size=2), 1)
    _mark(run / "global_step5.replaced", _dead_pid())
    assert mend(examine(run)) == ["global_step5.replaced: removed"]
    assert examine(run).is_well


def test_what_a_dead_save_left_is_removed_and_nothing_else(run):
    for name in ("dead", "live", "elsewhere", "nobody"):
        (run / f"{name}.tmp").mkdir()
    _mark(run / "dead.tmp", _dead_pid())
    _mark(run / "live.tmp", os.getppid())
    _mark(run / "elsewhere.tmp", 17, host="another")
    (run / "notes").mkdir()
    assert [_of(run, f"{name}.tmp").what for name in ("live", "dead")] == ["being written", "unfinished"]
    assert mend(examine(run)) == ["dead.tmp: removed"]
    assert sorted(p.name for p in run.glob("*.tmp")) == ["elsewhere.tmp", "live.tmp", "nobody.tmp"]
    assert _of(run, "notes").what == "not a checkpoint"


def test_a_replacement_that_is_going_on_is_left_to_its_owner(run):
    (run / "global_step5").rename(run / "global_step5.replaced")
    _mark(run / "global_step5.replaced", os.getppid())
    assert mend(examine(run)) == [] and (run / "global_step5.replaced").is_dir()


def test_a_run_that_is_going_on_is_left_alone(run):
    (run / "dead.tmp").mkdir()
    _mark(run / "dead.tmp", _dead_pid())
    _mark(run, os.getppid())
    (run / OWNER_MARK).rename(run / RUN_MARK)
    (told,) = mend(examine(run))
    assert "a run is going on here" in told and (run / "dead.tmp").is_dir()


def _is_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _leads_out(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.parents[1] / "outside" if path.parent.name == "run" else path.parents[2] / "outside")


def _is_huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # with holes


HOSTILE = {
    "fifo": _is_fifo,
    "link": _leads_out,
    "huge": _is_huge,
    "folder": lambda path: (path.unlink(missing_ok=True), path.mkdir()),
    "escapes": lambda path: path.write_bytes(b"\x1b]0;x\x07\xff\x00" * 50),
    "nested": lambda path: path.write_text("[" * 3000),
}


@pytest.mark.parametrize(
    "place", ["latest", ".owner", "global_step5/.damaged", "global_step5/.writing", "x.tmp/.writing"]
)
@pytest.mark.parametrize("what", HOSTILE)
def test_whatever_lies_there(what: str, place: str, run, capfd):
    """Told, without waiting, without a traceback, and without a byte outside."""
    (run.parent / "outside").write_text("as it was")
    (run / "x.tmp").mkdir()
    HOSTILE[what](run / place)
    for options in ([], ["--full", "--fix"], []):
        assert cli.main(["doctor", str(run), *options]) in (0, 1)
    told = capfd.readouterr()
    assert "global_step3" in told.out and "\x1b" not in told.out + told.err and "Traceback" not in told.err
    assert (run.parent / "outside").read_text() == "as it was"
    assert all((run / name / "ucp.json").is_file() for name in ("global_step3", "global_step5"))


def test_the_command(run, capsys):
    assert cli.main(["doctor", str(run)]) == 0
    assert "a resume would take global_step5" in capsys.readouterr().out
    (run / "latest").write_text("gone\x1b[2J")
    assert cli.main(["doctor", str(run)]) == 1
    told = capsys.readouterr().out
    assert "--fix would mend 1" in told and "\x1b" not in told
    assert cli.main(["doctor", str(run), "--fix", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mended"] == ["latest: names global_step5"]
    assert cli.main(["doctor", str(run / "latest")]) == 1
