"""Every file event of what writes checkpoints as a moment at which the machine stops, or the disk. Run as a program,
without torch.

    PYTHONPATH=. python tests/fuzz/crash_points.py FOLDER SEED CASES [MUTATION]     # prints one JSON object

An operation (a save, a conversion, ...) runs in a forked process that ends, without any cleaning up, at its n-th file
event: an open for writing, a write, a flush, a rename, a removal, a new folder. Then the disk is made to be what a disk
may hold after that: what was not flushed is whole, gone, empty, cut, or zeros, and a rename whose folder was not
flushed has not happened. Or the process goes on, and that event fails: for this once, or all that need room from there
on, or all that write anything. What was made is then given the time of another clock. What a resume would take must be
one of the states that were saved, whole; then the same operation is done again, and must end as if nothing had
happened, or say why not.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from megatron.ucp import commit, native, output_file, owner, run_folder, save_worker, torch_file, unfinished
from megatron.ucp.convert import convert
from megatron.ucp.digest import total
from megatron.ucp.doctor import examine, mend
from megatron.ucp.errors import UcpError
from megatron.ucp.manifest import read_manifest
from megatron.ucp.ordinary_file import read_content
from megatron.ucp.reshape import reshape
from megatron.ucp.retention import Keep
from megatron.ucp.run_folder import find_checkpoints
from megatron.ucp.save_worker import CommitOrder
from megatron.ucp.shares import Share, convert_share
from megatron.ucp.targets.native_target import NativeTarget
from megatron.ucp.torch_file import save_streamed
from megatron.ucp.verify import verify

LOST = ("kept", "gone", "empty", "cut", "zeros")
"""What becomes of content that was not flushed. "kept" is a process that was killed; the others a machine."""
FAILS = {"full": errno.ENOSPC, "read-only": errno.EROFS, "once": errno.EIO}
"""How the disk fails: everything that needs room from there on, everything that writes from there on, or once."""
CLOCKS = (0, 0, -86_400, 86_400, -10 * 365 * 86_400, 10 * 365 * 86_400)
"""Seconds by which the next machine's clock differs."""
LIMIT = 60
"""Seconds of one run of an operation: more is a hang."""


# -- what is written to the disk, as it happens ----------------------------------------------------------------------


@dataclass
class Disk:
    """Of one process: its file events, and what of them a machine that stops may lose."""

    root: str
    stop_at: int
    lost: str
    events: int = 0
    unflushed: set[str] = field(default_factory=set)
    """Files with content that is not on the disk."""
    unlisted: set[str] = field(default_factory=set)
    """Files and folders whose name is not."""
    renames: list[tuple[str, str, bytes | None]] = field(default_factory=list)
    """That are not on the disk, oldest first: from, to, and what was there in a file that was replaced."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    is_failing: bool = False

    def watch(self) -> None:
        """From here on, for the rest of this process."""
        sys.addaudithook(self._hear)
        fsync, write = os.fsync, os.write

        def flushed(handle: int) -> None:
            fsync(handle)
            self.flushed(os.readlink(f"/proc/self/fd/{handle}"))

        def written(handle: int, content) -> int:
            self._event(os.readlink(f"/proc/self/fd/{handle}"), content=True)
            return write(handle, content)

        os.fsync, os.write = flushed, written
        opened = output_file.open_output

        def open_output(path):
            self._event(os.fspath(path), content=True, is_new=True)
            return opened(path)

        output_file.open_output = torch_file.open_output = open_output
        for name in ("write", "close"):
            self._count_calls(output_file.PlainOutput, name)

    def _count_calls(self, kind: type, name: str) -> None:
        original = getattr(kind, name)

        def counted(this, *args):
            self._event(os.fspath(this._file.name), content=True)
            return original(this, *args)

        setattr(kind, name, counted)

    def _hear(self, event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            is_named = isinstance(path, (str, bytes, os.PathLike)) and isinstance(flags, int)
            if is_named and flags & (os.O_WRONLY | os.O_RDWR):
                self._event(os.fsdecode(path), content=True, is_new=not os.path.lexists(path))
        elif event == "os.rename":
            source, target = (os.path.abspath(os.fsdecode(path)) for path in args[:2])
            self._event(source)
            self._renamed(source, target)
        elif event == "os.link":
            self._event(os.fsdecode(args[1]), is_new=True)
        elif event in ("os.remove", "os.rmdir"):
            path, folder = os.fsdecode(args[0]), args[1]  # a tree is removed by names in open folders
            self._event(path if folder == -1 else f"{os.readlink(f'/proc/self/fd/{folder}')}/{path}")
        elif event == "os.truncate":
            self._event(os.fsdecode(args[0]) if not isinstance(args[0], int) else self.root)
        elif event == "os.mkdir":
            self._event(os.fsdecode(args[0]), is_new=True)

    def _event(self, path: str, content: bool = False, is_new: bool = False) -> None:
        path = os.path.abspath(path)
        if self.stop_at < 0 or not path.startswith(self.root):
            return
        with self.lock:
            self.events += 1
            if self.lost in FAILS:
                self._fail(path, content or is_new)
            elif self.events == self.stop_at:
                self._stop()
            if content:
                self.unflushed.add(path)
            if is_new:
                self.unlisted.add(path)

    def flushed(self, path: str) -> None:
        self._event(path)
        with self.lock:
            self.unflushed.discard(path)
            self.unlisted = {name for name in self.unlisted if os.path.dirname(name) != path}
            self.renames = [rename for rename in self.renames if os.path.dirname(rename[1]) != path]

    def _renamed(self, source: str, target: str) -> None:
        def moved(path: str) -> str:
            return target + path[len(source) :] if path == source or path.startswith(source + "/") else path

        with self.lock:
            self.unflushed = {moved(path) for path in self.unflushed}
            self.unlisted = {moved(path) for path in self.unlisted} - {target}
            self.renames.append((source, target, Path(target).read_bytes() if os.path.isfile(target) else None))

    def _fail(self, path: str, needs_room: bool) -> None:
        is_now = self.events == self.stop_at
        self.is_failing |= is_now
        if (
            is_now
            and self.lost == "once"
            or self.is_failing
            and (self.lost == "read-only" or self.lost == "full" and needs_room)
        ):
            raise OSError(FAILS[self.lost], os.strerror(FAILS[self.lost]), path)

    def _stop(self) -> None:
        """The machine stops, and the disk holds what it may hold. No event is heard any more."""
        self.stop_at = -1
        if self.lost != "kept":
            chance = random.Random(self.events + len(self.unflushed))
            for path in sorted(self.unflushed):  # of several each by itself: disks keep no order
                if chance.random() < 0.6:
                    self._lose(path)
            if self.lost == "gone":
                for path in sorted(self.unlisted, reverse=True):
                    if os.path.isfile(path):
                        os.remove(path)
            for source, target, replaced in reversed(self.renames):
                if os.path.lexists(target) and not os.path.lexists(source):
                    os.rename(target, source)
                    if replaced is not None:
                        Path(target).write_bytes(replaced)
        os.kill(os.getpid(), signal.SIGKILL)

    def _lose(self, path: str) -> None:
        if not os.path.isfile(path) or os.path.islink(path):
            return
        size = os.path.getsize(path)
        with open(path, "r+b") as file:
            if self.lost == "zeros":
                file.write(b"\0" * size)
            else:
                file.truncate(size // 2 if self.lost == "cut" else 0)


# -- the operations --------------------------------------------------------------------------------------------------


def _save(run: Path, contents: Path, iteration: int, keep: Keep) -> None:
    """As the process that writes saves does it: megatron/ucp/save_worker.py."""
    final = run / f"global_step{iteration}"
    staging = commit.stage(final, replace=True)
    manifest = read_manifest(contents)
    files = {}
    for name in manifest.files:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        files[name] = save_streamed(read_content(contents / name), staging / name)
        commit.flush(staging / name)
    pointers = (("latest", final.name), ("latest_checkpointed_iteration.txt", str(iteration)))
    save_worker._commit(CommitOrder(staging, final, replace(manifest, files=files), (), pointers, keep))
    commit.remove_left_overs(run)


def _convert(run: Path) -> None:
    convert(run / "global_step4", run / "global_step4_universal", num_workers=1)


OPERATIONS: dict[str, Callable[[Path], object]] = {
    "save": lambda run: _save(run, run.parent / "second", 8, Keep(2, None)),
    "save, replacing": lambda run: _save(run, run.parent / "second", 4, Keep()),
    "convert": _convert,
    "convert, going on": _convert,
    "convert, by shares": lambda run: convert_share(
        run / "global_step4", run / "global_step4_universal", Share(0, 1), num_workers=1
    ),
    "reshape": lambda run: reshape(
        run / "global_step4", run.parent / "out/global_step4", NativeTarget.parse("zero2", 3), num_workers=1
    ),
    "doctor --fix": lambda run: mend(examine(run)),
}


def prepared(folder: Path, name: str, base: Path) -> Path:
    """The run folder in which the operation is to run: two checkpoints, the newer one pointed to."""
    shutil.copytree(base, folder)
    run = folder / "run"
    if name == "doctor --fix":
        # A replacement that was interrupted, left-overs of a dead process, and a pointer to nothing.
        here = {"host": os.uname().nodename, "place": owner._place()}
        dead = json.dumps({**here, "pid": 2**22 - 7, "started": "1", "token": "x"})
        (run / "global_step4/.writing").write_text(dead)
        (run / "global_step4").rename(run / "global_step4.replaced")
        shutil.copytree(run / "global_step2", run / "global_step9.tmp")
        (run / "global_step9.tmp/.writing").write_text(dead)
        (run / "latest").write_text("global_step4")
    if name == "convert, going on":
        _run(lambda: OPERATIONS["convert"](run), Disk(str(folder), 150, "kept"))
    return run


# -- one case --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    code: int
    """Exit code; 9: stopped at the event; 0: done."""
    error: str
    """Of ours, or a traceback."""
    events: int


def _run(operation: Callable[[], object], disk: Disk | None) -> Ended:
    """In a process of its own."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, told = 0, ""
        try:
            signal.alarm(LIMIT)
            if disk is not None:
                disk.watch()
            operation()
        except UcpError as error:
            code, told = 3, f"{type(error).__name__}: {error}"
        except OSError as error:  # which a command line tells, too
            is_planted = disk is not None and error.errno == FAILS.get(disk.lost) and error.filename is not None
            code, told = (3, str(error)) if is_planted else (4, traceback.format_exc()[-1500:])
        except BaseException:
            code, told = 4, traceback.format_exc()[-1500:]
        if disk is not None:
            disk.stop_at = -1
        os.dup2(writes, 3)
        with open(3, "w", closefd=False) as out:
            out.write(json.dumps([told, disk.events if disk else 0]))
        os._exit(code)
    os.close(writes)
    with open(reads) as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    told, events = json.loads(text) if text else ("", 0)
    return Ended(os.waitstatus_to_exitcode(status), told, events)


@dataclass
class Judge:
    states: dict[str, str]
    """Digest of the whole state -> which it is."""

    def of(
        self, folder: Path, run: Path, name: str, disk: Disk, between: Callable[[], None] = lambda: None
    ) -> tuple[str, str]:
        """(outcome, why): "named", "older", "newer" or "done" are fine. `between`: the fault and what comes after."""
        outside = _listing(folder.parent / "outside")
        ended = _run(lambda: OPERATIONS[name](run), disk)
        if ended.code == -signal.SIGALRM:
            return "hang", "the operation"
        if ended.code == 4 or (ended.code != -signal.SIGKILL and disk.lost not in FAILS):
            return ("traceback", ended.error) if ended.code else ("done", "")
        between()
        taken = self._taken(run)
        if taken[0] not in ("older", "newer"):
            return taken
        again = _run(lambda: OPERATIONS[name](run), None)
        if again.code == -signal.SIGALRM:
            return "hang", "done again"
        if again.code == 4 or again.code < 0:
            return "traceback", again.error or f"ended by signal {-again.code}"
        if _listing(folder.parent / "outside") != outside:
            return "outside", "files beside the run changed"
        if again.code == 3:
            is_there = "is already there" in again.error
            return self._finished(folder, run, name) if is_there else ("named", again.error)
        return self._finished(folder, run, name, taken[0])

    def _taken(self, run: Path) -> tuple[str, str]:
        """What a resume would take."""
        try:
            commit.end_replacements(run)  # as a run does that owns the folder
            found = find_checkpoints(run).native
        except UcpError as error:
            return "lost", f"{type(error).__name__}: {error}"
        except Exception:
            return "traceback", traceback.format_exc()[-1500:]
        if found is None:
            return "lost", "a resume finds nothing"
        return self._is_state(found.folder)

    def _is_state(self, folder: Path) -> tuple[str, str]:
        try:
            result = verify(folder)
            state = self.states.get(total(read_manifest(folder).digests))
        except UcpError as error:
            return "silent", f"taken, and {error}"
        if not result.is_sound:
            return "silent", f"{folder.name} is taken and not whole"
        if state == "oldest":
            return "lost", f"{folder.name} is all that is left"
        return (state, "") if state else ("silent", f"{folder.name} holds another state")

    def _finished(self, folder: Path, run: Path, name: str, outcome: str = "newer") -> tuple[str, str]:
        """After it was done again."""
        made = {"reshape": folder / "out/global_step4", "save": run / "global_step8"}.get(name)
        if name.startswith("convert"):
            made = run / "global_step4_universal"
        if made is not None and self._is_state(made)[0] not in ("older", "newer"):
            return "silent", f"done again: {self._is_state(made)[1]}"
        taken = self._taken(run)
        if taken[0] not in ("older", "newer"):
            return taken
        if name.startswith("save") and taken[0] != "newer":
            return "silent", "saved again, and a resume takes an older one"
        if (
            made is not None
            and name.startswith("convert")
            and _contents(made) != _contents(folder.parent / "converted")
        ):
            return "silent", "other bytes than those of a conversion that was not stopped"
        left = [path.name for path in run.glob("*.tmp")] if name.startswith("save") else []
        return ("left over", ", ".join(left)) if left else (outcome, "")


def _set_clock(run: Path, began: float, differs: int) -> None:
    """Of what was made since."""
    for path in [path for path in run.rglob("*") if differs and path.lstat().st_mtime >= began - 1]:
        os.utime(path, (began + differs, began + differs), follow_symlinks=False)


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*"))


def _contents(folder: Path) -> dict[str, bytes]:
    """But for marks of who was writing, which nobody reads as data."""
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(commit.OWNER_MARK))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# -- checks of the product that are taken away -----------------------------------------------------------------------


def _nothing(path: Path) -> None:
    pass


def _pointer_in_place(run: Path, pointer: str, tag: str) -> None:
    (run / pointer).write_text(tag)


def _commit_by_removal(staging, final, replace=False) -> None:
    if os.path.lexists(final):
        shutil.rmtree(final)
    _COMMIT(staging, final, False)


def _only_pointers() -> None:
    commit.point_to = _pointer_in_place
    run_folder._newest_whole = lambda *args: ({}, [])


_COMMIT = commit.commit


def _removed_too_early(order) -> list[str]:
    shutil.rmtree(order.final.parent / "global_step4", ignore_errors=True)
    return _SAVE_COMMIT(order)


_SAVE_COMMIT = save_worker._commit


def _believes_clocks(run: Path) -> list[str]:
    """What another clock says to be of later is not a dead process's."""
    is_later = any(path.stat().st_mtime > time.time() + 60 for path in run.iterdir())
    return [] if is_later else _REMOVE_LEFT_OVERS(run)


_REMOVE_LEFT_OVERS = commit.remove_left_overs


def _goes_on_without(order) -> list[str]:
    """An error of the disk is taken for the end of the work."""
    try:
        return _SAVE_COMMIT(order)
    except OSError:
        for path in order.staging.rglob("*.pt"):
            path.write_bytes(b"")
        os.rename(order.staging, order.final)
        return []


MUTATIONS: dict[str, tuple[str, str, Callable[[], None]]] = {
    "nothing is flushed": ("save", "", lambda: setattr(commit, "flush", _nothing)),
    "a pointer is written in place, and nothing else looked for": ("save", "", _only_pointers),
    "an interrupted replacement stays": (
        "save, replacing",
        "kept",
        lambda: setattr(commit, "end_replacements", _nothing),
    ),
    "clocks are believed": ("save", "kept", lambda: setattr(commit, "remove_left_overs", _believes_clocks)),
    "left-overs stay": ("save", "kept", lambda: setattr(commit, "remove_left_overs", _nothing)),
    "what is replaced is removed first": ("save, replacing", "", lambda: setattr(commit, "commit", _commit_by_removal)),
    "an error is taken for the end": ("save", "once", lambda: setattr(save_worker, "_commit", _goes_on_without)),
    "older ones are removed too early": ("save", "", lambda: setattr(save_worker, "_commit", _removed_too_early)),
    "a journal is believed": ("convert, going on", "", lambda: setattr(unfinished, "_is_whole", lambda *args: True)),
}
"""The operation in which it has to be seen, what becomes of content that was not flushed (empty: each), and what takes
the check away."""


def main(folder: Path, seed: int, cases: int, mutation: str = "") -> None:
    names = list(OPERATIONS)
    if mutation:
        names = [MUTATIONS[mutation][0]]
        MUTATIONS[mutation][2]()
    generator = random.Random(seed)
    base = folder / "base"
    judge = Judge(json.loads((folder / "states.json").read_text()))
    events: dict[tuple[str, bool], int] = {}
    outcomes: dict[str, Counter] = {name: Counter() for name in names}
    faults: list[str] = []
    named: Counter = Counter()
    kernel = native.kernel
    work = folder / f"work{seed}"
    (work / "outside").mkdir(parents=True)
    shutil.copytree(folder / "converted", work / "converted")
    for case in range(cases):
        name = names[case % len(names)]
        with_kernel = kernel is not None and (bool(mutation) or bool(generator.getrandbits(1)))
        native.kernel = kernel if with_kernel else None
        place = work / "case"
        if (name, with_kernel) not in events:
            run = prepared(place, name, base)
            measured = _run(lambda run=run, name=name: OPERATIONS[name](run), Disk(str(place), 0, "kept"))
            assert measured.code == 0 or mutation, measured.error
            events[name, with_kernel] = max(1, measured.events)
            shutil.rmtree(place)
        # What a mutation breaks may be open for one event only: each is tried.
        stop_at = (
            1 + 37 * case % events[name, with_kernel] if mutation else generator.randint(1, events[name, with_kernel])
        )
        lost = (MUTATIONS[mutation][1] if mutation else "") or generator.choice((*LOST, *FAILS))
        run = prepared(place, name, base)
        outcome, why = judge.of(
            place,
            run,
            name,
            Disk(str(place), stop_at, lost),
            partial(_set_clock, run, time.time(), generator.choice(CLOCKS)),
        )
        outcomes[name][outcome] += 1
        if outcome == "named":
            named[f"{name}, {lost}: {why.splitlines()[0]}"] += 1
        if outcome not in ("older", "newer", "done", "named"):
            at = f"event {stop_at} of {events[name, with_kernel]}, {lost}, kernel {with_kernel}"
            faults.append(f"{name}, {at}: {outcome}: {why}")
        shutil.rmtree(place)
    counted = {name: dict(counts) for name, counts in outcomes.items()}
    most = {name: max((n for (each, _), n in events.items() if each == name), default=0) for name in names}
    print(json.dumps({"outcomes": counted, "events": most, "named": dict(named), "faults": faults}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
