"""Several processes make what one makes, byte for byte; one that dies or fails is named, and its share done again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ucp.synthetic import make_state, model, write_native

from megatron.ucp import shares
from megatron.ucp.convert import convert
from megatron.ucp.errors import CorruptFileError, OutputExistsError, OwnedByOtherError, UcpError
from megatron.ucp.shares import Share, UnfinishedSharesError, convert_share
from megatron.ucp.sources import open_source
from megatron.ucp.topology import Topology
from megatron.ucp.verify import verify

ROOT = Path(__file__).resolve().parents[2]
TOOL = str(ROOT / "tools/ds_to_universal.py")


@pytest.fixture
def native(tmp_path) -> Path:
    write_native(tmp_path / "n", make_state(model()), Topology(tp_size=2, dp_size=2), 1)
    return tmp_path / "n"


def start(native: Path, share: str, before: str = "", wait: float = 60) -> subprocess.Popen:
    """A process that does a share; `before`: what else it runs first."""
    code = f"""
import sys
from megatron.ucp import shares
from megatron.ucp.errors import UcpError
{before}
try:
    share = shares.Share.parse({share!r})
    shares.convert_share({str(native)!r}, {str(native.parent / "u")!r}, share, wait_seconds={wait})
except UcpError as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)


def ends(*processes: subprocess.Popen) -> list[tuple[int, str]]:
    return [(process.wait(), error) for process in processes for _, error in [process.communicate(timeout=120)]]


def first_alone(native: Path) -> str:
    """What share 0 says when the other does not come. Its process ends, so that another may take its place."""
    [(code, error)] = ends(start(native, "0/2", wait=0.1))
    assert code == 1 and not (native.parent / "u").exists()
    return error


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_as_by_one(native: Path) -> None:
    convert(native, native.parent / "one")
    ours, theirs = contents(native.parent / "u"), contents(native.parent / "one")
    assert ours == theirs and len(ours) > 20
    assert verify(native.parent / "u").is_sound
    assert (native.parent / "latest_universal").read_text() == "one"
    assert not list(native.parent.glob("*.tmp"))


@pytest.mark.parametrize("count", [1, 2, 4, 60])
def test_by_several_as_by_one(count, native):
    """60: more than there are tensors, so that some have nothing to do. Share 0 comes last."""
    if count == 60:  # as many processes would be slow: those without work are told to be done
        dealt = shares._dealt(open_source(native).manifest, count)
        assert sum(not jobs for jobs in dealt) >= 5
        count = 5
    processes = [start(native, f"{index}/{count}") for index in reversed(range(count))]
    assert ends(*processes) == [(0, "")] * count
    assert_as_by_one(native)


def test_shares_are_even_and_the_same_everywhere(native):
    manifest = open_source(native).manifest
    jobs = [(name, state) for name, info in manifest.parameters.items() for state in info.states]
    size = {job: 4 * manifest.parameters[job[0]].layout_of(job[1]).numel for job in jobs}
    for count in (1, 2, 3, 4, 7):
        dealt = shares._dealt(manifest, count)
        assert dealt == shares._dealt(open_source(native).manifest, count)
        assert sorted(job for of_share in dealt for job in of_share) == sorted(jobs)
        sums = [sum(size[job] for job in of_share) for of_share in dealt]
        assert max(sums) - min(sums) <= max(size.values())


DIES = """
import os, signal
write = shares.write_tensors
def dies(source, folder, jobs, *others, **options):
    write(source, folder, jobs[:1], *others, **options)
    os.kill(os.getpid(), signal.SIGKILL)
shares.write_tensors = dies
"""


def test_the_share_of_a_process_that_died_is_done_again(native):
    processes = [start(native, "0/3"), start(native, "1/3"), start(native, "2/3", DIES)]
    (code, error), (other, _), (killed, _) = ends(*processes)
    assert other == 0 and killed == -signal.SIGKILL
    assert code and error.startswith("UnfinishedSharesError: 1 of 3 shares will not come")
    assert "share 2: its process" in error and "--share 2/3" in error
    staging = native.parent / "u.tmp"
    assert not (native.parent / "u").exists() and not (native.parent / "latest_universal").exists()
    done = {p: p.stat().st_mtime_ns for i in (0, 1) for p in written_by(staging, i)}
    [half] = [json.loads(line) for line in (staging / ".conversion/2.journal").read_text().splitlines()]
    done[staging / f"zero/{half[0]}/{half[1]}.pt"] = (staging / f"zero/{half[0]}/{half[1]}.pt").stat().st_mtime_ns
    assert ends(start(native, "0/3"), start(native, "2/3"), start(native, "1/3")) == [(0, "")] * 3
    done = {native.parent / "u" / p.relative_to(staging): at for p, at in done.items()}
    assert {p: p.stat().st_mtime_ns for p in done} == done and done
    assert_as_by_one(native)


def written_by(staging: Path, index: int) -> list[Path]:
    return [staging / name for name in json.loads((staging / f".conversion/{index}.json").read_text())["files"]]


def test_share_0_that_died_goes_on_where_it_was(native):
    (killed, _), (other, _) = ends(start(native, "0/2", DIES), start(native, "1/2"))
    assert killed == -signal.SIGKILL and other == 0
    assert ends(start(native, "0/2")) == [(0, "")]
    assert_as_by_one(native)


FAILS = """
def fails(*args, **options):
    raise UcpError("disk on fire")
shares.write_tensors = fails
"""


def test_a_share_that_fails_is_told_by_share_0_at_once(native):
    started = time.monotonic()
    (code, error), (other, own) = ends(start(native, "0/2", wait=600), start(native, "1/2", FAILS))
    assert other and "disk on fire" in own
    assert code and "share 1: disk on fire" in error and time.monotonic() - started < 60
    assert ends(start(native, "1/2"), start(native, "0/2")) == [(0, "")] * 2
    assert_as_by_one(native)


def test_a_share_that_does_not_come_is_named(native):
    error = first_alone(native)
    assert error.startswith("UnfinishedSharesError") and "share 1: it did not begin" in error and "--share 1/2" in error


def test_a_share_without_a_first_one_waits_and_says_for_what(native):
    with pytest.raises(UnfinishedSharesError, match="waited 0 s for share 0"):
        convert_share(native, native.parent / "u", Share(1, 2), wait_seconds=0.3)
    first_alone(native)
    with pytest.raises(UnfinishedSharesError, match="another|something else"):  # of three, where there are two
        convert_share(native, native.parent / "u", Share(1, 3), wait_seconds=0.3)


def test_an_output_that_is_there_is_told_at_once(native):
    convert(native, native.parent / "u")
    with pytest.raises(OutputExistsError):
        convert_share(native, native.parent / "u", Share(0, 2), wait_seconds=600)
    # Of shares that are started again, one may come when the others have finished.
    assert convert_share(native, native.parent / "u", Share(1, 2), wait_seconds=600) is None
    shutil.rmtree(native)
    write_native(native, make_state(model(), seed=9), Topology(dp_size=2), 1)
    with pytest.raises(OutputExistsError):
        convert_share(native, native.parent / "u", Share(1, 2), wait_seconds=600)


def test_a_share_that_was_done_may_come_while_the_first_ends(native, monkeypatch):
    """The staging folder becomes the output between two looks at it."""
    staging = native.parent / "u.tmp"
    convert(native, native.parent / "u")
    monkeypatch.setattr(shares, "_awaited", lambda *args: staging)
    assert convert_share(native, native.parent / "u", Share(1, 2)) is None
    assert not staging.exists()
    shutil.rmtree(native.parent / "u")
    with pytest.raises(FileNotFoundError):
        convert_share(native, native.parent / "u", Share(1, 2))


def test_of_another_source_nothing_is_gone_on_with(native):
    first_alone(native)
    shutil.rmtree(native)
    write_native(native, make_state(model(), seed=9), Topology(dp_size=2), 1)
    assert ends(start(native, "1/2"), start(native, "0/2")) == [(0, "")] * 2
    assert_as_by_one(native)


LINGERS = """
import contextlib, time
owned = shares.claimed
@contextlib.contextmanager
def lingers(path):
    with owned(path) as mark:
        yield mark
        time.sleep(3)
shares.claimed = lingers
"""


def test_the_folder_is_not_taken_from_under_a_process_that_is_still_in_it(native):
    processes = [start(native, "0/2"), start(native, "1/2", LINGERS)]
    staging = native.parent / "u.tmp"
    while not (staging / ".conversion/1.json").exists() and processes[1].poll() is None:
        time.sleep(0.01)
    time.sleep(1.5)  # share 0 has looked at it many times
    assert (staging / ".conversion/1.owner").exists() and not (native.parent / "u").exists()
    assert ends(*processes) == [(0, "")] * 2
    assert_as_by_one(native)


def test_two_processes_of_one_share_do_not_write_at_once(native):
    waits = "import time; write = shares.write_tensors\n"
    waits += "shares.write_tensors = lambda *a, **k: (time.sleep(3), write(*a, **k))[1]"
    first, second = start(native, "0/2", waits), start(native, "1/2", waits)
    staging = native.parent / "u.tmp"
    while not (staging / ".conversion/1.owner").exists():
        time.sleep(0.01)
    with pytest.raises(OwnedByOtherError):
        convert_share(native, native.parent / "u", Share(1, 2), wait_seconds=5)
    with pytest.raises(OwnedByOtherError):
        convert_share(native, native.parent / "u", Share(0, 2), wait_seconds=5)
    assert ends(first, second) == [(0, "")] * 2
    assert_as_by_one(native)


def test_a_damaged_source_is_found_by_whoever_reads_it(native):
    victim = native / "zero_pp_rank_1_mp_rank_01_optim_states.pt"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    (code, error), *others = ends(*(start(native, f"{i}/3") for i in range(3)))
    assert code and victim.name in error + "".join(told for _, told in others)
    assert not (native.parent / "u").exists()


@pytest.mark.parametrize("change", ["another tensor", "no digest", "no text", "nothing", "too few"])
def test_what_a_share_says_is_checked(change, native):
    first_alone(native)
    assert ends(start(native, "1/2")) == [(0, "")]
    path = native.parent / "u.tmp/.conversion/1.json"
    said = json.loads(path.read_text())
    changed = {
        "another tensor": {**said, "digests": [["x", "fp32", "0" * 32], *said["digests"][1:]]},
        "no digest": {**said, "digests": said["digests"][1:]},
        "no text": [],
        "nothing": {},
        "too few": {**said, "files": dict(list(said["files"].items())[1:])},
    }[change]
    path.write_text(json.dumps(changed))
    with pytest.raises(CorruptFileError, match="not of its share"):
        convert_share(native, native.parent / "u", Share(0, 2), wait_seconds=5)
    assert not (native.parent / "u").exists()


def test_files_that_are_gone_are_written_again(native):
    first_alone(native)
    assert ends(start(native, "1/2")) == [(0, "")]
    written_by(native.parent / "u.tmp", 1)[0].unlink()
    jobs = shares._dealt(open_source(native).manifest, 2)
    assert "its files are not there any more" in str(shares._lost(native.parent / "u.tmp", 1, jobs[1], is_late=False))
    assert "share 1: it did not begin" in first_alone(native)  # a new share 0 waits for it to be done again
    assert ends(start(native, "1/2"), start(native, "0/2")) == [(0, "")] * 2
    assert_as_by_one(native)


@pytest.mark.parametrize("text", ["", "1", "4/4", "-1/4", "0/0", "1/x", "0/99999999", "1/2/3"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(UcpError, match="share"):
        Share.parse(text)


def test_torchrun_starts_it(native):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    folders = ["--input_folder", str(native), "--output_folder", str(native.parent / "u")]
    done = subprocess.run([*torchrun, TOOL, "--share", "auto", *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("state digest") == 1
    assert_as_by_one(native)


def test_processes_without_a_common_network_share_the_work(native):
    alone = ["unshare", "--user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this machine makes no network namespaces")
    folders = ["--input_folder", str(native), "--output_folder", str(native.parent / "u")]
    commands = [[*alone, sys.executable, TOOL, "--share", f"{index}/4", *folders] for index in range(4)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    assert [code for code, _ in ends(*processes)] == [0] * 4
    assert_as_by_one(native)


def test_the_environment_alone_shares_nothing(native):
    """A conversion that a rank of a training starts finds the ranks' variables in its environment."""
    environment = {
        **os.environ,
        "RANK": "0",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
        "LOCAL_RANK": "0",
    }
    folders = ["--input_folder", str(native), "--output_folder", str(native.parent / "u")]
    done = subprocess.run([sys.executable, TOOL, *folders], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert_as_by_one(native)
