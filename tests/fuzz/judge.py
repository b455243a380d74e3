"""What a damaged checkpoint does to everything that reads it: it is told, or what comes out is right.

The seven ways of reading a folder (open, verify, convert, reshape, diff, doctor, load) run on a damaged copy, in this
process, between two looks at the disk. Each must end in an error of a known kind that says something, or in the very
outcome that the whole folder has. Anything else is a violation, one line:

    silent     it ended well, and what came out is not what was saved
    traceback  it ended in an exception that is no message
    outside    something beside the output was written, changed or removed
    bound      the process took more memory than the folder's size allows (time: see `Watch`)

    judge = Judge(bases, run, scratch)
    judge.violations(fault)             # [] or ["convert: silent: ..."]
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fuzz.bases import Base
from fuzz.faults import WAYS, Fault

from matrix.taking import fill_with_noise
from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.loading import load
from megatron.checkpoint.resume import ResumeError, Wanted, choose_resume, open_planned
from megatron.checkpoint.state_digest import state_digests
from megatron.engine.schedule import ScheduleError
from megatron.ucp import cli
from megatron.ucp.convert import convert
from megatron.ucp.diff import diff
from megatron.ucp.digest import total
from megatron.ucp.doctor import examine
from megatron.ucp.errors import UcpError, UnsupportedCheckpointError
from megatron.ucp.manifest import MANIFEST_NAME
from megatron.ucp.pointers import POINTERS
from megatron.ucp.reshape import reshape
from megatron.ucp.run_folder import find_checkpoints
from megatron.ucp.targets.native_target import NativeTarget
from megatron.ucp.topology import Topology
from megatron.ucp.verify import verify

TOLD = (UcpError, CheckpointError, ResumeError, ScheduleError, OSError)
"""What the command line and the trainer print as a message, without a traceback."""
MAX_MEMORY = 64 << 20
"""Bytes more than before; the largest base is smaller than a megabyte."""
MAX_SECONDS = 30
"""Of one way of reading, which takes a tenth of a second: only what would never end comes to it."""
MAX_ADDRESSES = 8 << 30
"""More than the process has may not be asked for at once: so that a fault found does not end the machine."""
MAX_MESSAGE = 12_000
"""Characters: twenty lines or so, with their values cut short."""
NOISE = 0.777
BYSTANDER = "somebody's file"


@dataclass(frozen=True)
class Outcome:
    """How one way of reading ended."""

    value: Any = None
    error: BaseException | None = None
    warnings: tuple[str, ...] = ()

    @property
    def is_told(self) -> bool:
        return self.error is not None


class Judge:
    def __init__(self, bases: dict[str, Base], run: Any, scratch: Path):
        """`run`: the live run that takes the loads; `scratch`: an empty folder."""
        self.bases, self.run, self.scratch = bases, run, scratch
        self.right: dict[str, dict[str, Any]] = {}
        self.usual_warnings: dict[str, set[str]] = {}
        self._groups = [dict(group) for group in run.live.state.base.param_groups]
        os.chdir(scratch)  # where code from a file would leave its traces
        for name, base in bases.items():
            found = self._outcomes(self._copy(base), base)
            for how, outcome in found.items():
                if how == "reshape" and isinstance(outcome.error, UnsupportedCheckpointError):
                    continue  # of several model-parallel ranks, with experts, or universal
                if outcome.is_told and not (how == "load" and not base.loads):
                    raise AssertionError(f"{name}, undamaged: {how}: {outcome.error}") from outcome.error
            self.right[name] = {how: outcome.value for how, outcome in found.items()}
            self.usual_warnings[name] = set(found["load"].warnings)
            self._check_right(base)
        resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESSES + _addresses(), resource.RLIM_INFINITY))

    def violations(self, fault: Fault) -> list[str]:
        base = self.bases[fault.base]
        place = self._copy(base)
        fault.plant(place / "run", place / "run" / base.tag, random.Random(f"{fault.base} {fault.name}"))
        says = _differences(_manifest(base.folder), _manifest(place / "run" / base.tag)) if fault.is_signed else set()
        before = _table(place)
        least = _peak_memory(reset=True)
        found = self._outcomes(place, base, fault.ways)
        violations = [f"outside: {line}" for line in _changes(before, _table(place))]
        for how, outcome in found.items():
            violations += [f"{how}: {what}" for what in self._judged(base, fault, how, outcome, found, says)]
        for trace in self.scratch.iterdir():
            if trace.name != "case":
                violations.append(f"outside: {trace.name} in the current folder")
                trace.unlink()
        taken = _peak_memory() - least
        if taken > MAX_MEMORY:
            violations.append(f"bound: {taken >> 20} MiB were taken")
        return violations

    # -- the seven ways --------------------------------------------------------------------------------------------

    def _outcomes(self, place: Path, base: Base, chosen: tuple[str, ...] = WAYS) -> dict[str, Outcome]:
        run, folder, output = place / "run", place / "run" / base.tag, place / "out"
        ways: dict[str, Callable[[], Any]] = {
            "open": lambda: _inspect(folder),
            "verify": lambda: verify(folder, num_workers=1),
            "convert": lambda: _conversion(convert(folder, output, num_workers=1).manifest),
            "reshape": lambda: _conversion(reshape(folder, output, NativeTarget(2, 3), num_workers=1).manifest),
            "diff": lambda: diff(base.folder, folder, trust_digests=False),
            "doctor": lambda: _doctor(run),
            "load": lambda: self._load(run),
        }
        found = {}
        for how in chosen:
            with _warnings() as lines:
                try:
                    with _time_limit():
                        found[how] = Outcome(ways[how]())
                except Exception as error:  # its kind is what is judged
                    found[how] = Outcome(error=error)
            found[how] = replace(found[how], warnings=tuple(lines))
            if how in ("convert", "reshape"):
                if found[how].is_told and os.path.lexists(output):
                    found["output"] = Outcome("there is one, of a conversion that failed")
                is_as_ever = base.name in self.right and found[how].value == self.right[base.name][how]
                if (
                    how == "convert" and not is_as_ever
                ):  # the same checksums of the same files: it is sound, as of the whole folder
                    found["converted"] = self._converted(output, found[how])
                shutil.rmtree(output, ignore_errors=True)
                for pointer in POINTERS:
                    (place / pointer).unlink(missing_ok=True)
        return found

    def _converted(self, output: Path, conversion: Outcome) -> Outcome:
        """What verify says of the output, if there is one."""
        if conversion.is_told:
            return Outcome(error=conversion.error)
        return Outcome(verify(output, num_workers=1))

    def _load(self, run_folder: Path) -> dict[str, Any]:
        live = self.run.live
        for group, values in zip(live.state.base.param_groups, self._groups, strict=True):
            group.clear()
            group |= values | {"weight_decay": NOISE, "lr": NOISE}
        fill_with_noise(self.run)
        live.schedule.num_samples = 777
        live.streams.reseed(777)
        found = find_checkpoints(run_folder)
        plan = choose_resume(found, Wanted(Topology(), 1, exit_on_missing_checkpoint=True))
        progress = load(live, open_planned(plan))
        state = live.state
        return {
            "digests": state_digests(state),
            "progress": progress,
            "steps": sorted({state.step_of(interval.flat) for interval in state.intervals}),
            "hyper-parameters": live.state.hyper_parameters(),
            "schedule": live.schedule.state_dict(),
            "streams": {key: value.tolist() for key, value in live.streams.state_dict().items()},
            "engine": (live.engine.global_steps, live.engine.global_samples, live.engine.skipped_steps),
        }

    # -- the judgement ---------------------------------------------------------------------------------------------

    def _check_right(self, base: Base) -> None:
        """The outcomes of the undamaged folder against what stood in the engine that saved it."""
        right = self.right[base.name]
        assert right["verify"].is_sound and right["verify"].is_proven == base.is_proven, base.name
        assert right["diff"].is_equal, (base.name, right["diff"].lines)
        if base.is_proven:
            assert right["verify"].digest == total(base.digests) == right["converted"].digest, base.name
        if base.loads:
            assert right["load"]["digests"] == base.digests, base.name
            assert right["load"]["steps"] == [2.0] and right["load"]["progress"].iteration == 2, base.name

    def _judged(
        self, base: Base, fault: Fault, how: str, outcome: Outcome, found: dict[str, Outcome], says: set[str]
    ) -> list[str]:
        if outcome.is_told:
            return _faults_of_message(outcome.error)
        if how == "output":
            return [f"outside: {outcome.value}"]
        right, value = self.right[base.name][how], outcome.value
        if how == "verify":
            return _judged_report(value, right, fault)
        if fault.is_another:
            return []
        if how == "reshape" and right is None:
            return []
        if how in ("convert", "reshape"):
            wrong = _differences(right, value) - says
            if wrong and not value["unverified"]:
                return [f"silent: another {', '.join(sorted(wrong)[:5])} than of the whole folder"]
        if how == "converted":
            if not value.is_sound:
                return [f"silent: the output is not sound: {value.findings[:2]}"]
            if value.is_proven and (value.digest != right.digest or not base.is_proven):
                return ["silent: the output passes for proven"]
        if how == "diff" and value.is_equal and (placed := found["load"].value) is not None:
            # It answers for what a load places.
            is_equal = placed["digests"] == self.right[base.name]["load"]["digests"]
            return [] if is_equal else ["silent: it says equal"]
        if how == "doctor":
            is_taken = found["load"].value is not None
            return ["silent: it says that a resume would take nothing"] if is_taken and not value else []
        if how == "load" and base.is_proven:
            wrong = sorted(key for key in right if value[key] != right[key])
            is_warned = bool(set(outcome.warnings) - self.usual_warnings[base.name])
            if wrong and not (is_warned and self._is_unsaid(value, right)):
                return [f"silent: another {', '.join(wrong)} than was saved"]
        return []

    def _is_unsaid(self, value: dict[str, Any], right: dict[str, Any]) -> bool:
        """Whether hyper-parameters that are not the saved ones are this run's own: nothing was said of them."""
        own = {group["name"]: group | {"weight_decay": NOISE, "lr": NOISE} for group in self._groups}
        return all(
            repr(found) == repr(right["hyper-parameters"][group][key]) or found in (own[group].get(key), NOISE)
            for group, values in value["hyper-parameters"].items()
            for key, found in values.items()
        )

    def _copy(self, base: Base) -> Path:
        place = self.scratch / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        shutil.copytree(base.run, place / "run")
        (place / BYSTANDER).write_text("not to be touched")
        return place


def _judged_report(report: Any, right: Any, fault: Fault) -> list[str]:
    if any("Traceback" in line or not line.strip() for line in report.findings):
        return [f"traceback: a finding is {report.findings}"]
    if any(len(line) > MAX_MESSAGE for line in report.findings):
        return ["bound: a finding of many characters"]
    if not report.is_sound:
        return []
    if fault.must_be_told and report.is_proven:
        return ["silent: it says sound"]
    if report.is_proven and report.digest != right.digest and not fault.is_another:
        return ["silent: it says that another state is sound"]
    return []


class TookTooLongError(Exception):
    pass


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TookTooLongError(f"more than {MAX_SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(MAX_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger().removeHandler(handler)


def _faults_of_message(error: BaseException | None) -> list[str]:
    chain = error
    while chain is not None:  # all_ranks_or_none makes a CheckpointError of whatever a rank raised
        if isinstance(chain, CheckpointError) and chain.__cause__ is not None:
            chain = chain.__cause__
            continue
        break
    if isinstance(chain, (TookTooLongError, MemoryError)):
        return [f"bound: {type(chain).__name__}: {chain}"]
    if not isinstance(chain, TOLD):
        return [f"traceback: {type(chain).__name__}: {str(chain)[:200]}"]
    if not str(error).strip():
        return ["traceback: a message without words"]
    if len(str(error)) > MAX_MESSAGE:
        return [f"bound: a message of {len(str(error))} characters"]
    return []


def _inspect(folder: Path) -> None:
    """As a user does it, on a terminal that knows all of Unicode. Raises what is told there."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["inspect", str(folder)])
    if code:
        err.seek(0)
        raise UcpError(err.read())


def _doctor(run: Path) -> str:
    """As a user asks it, and what it says that a resume would take."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cli.main(["doctor", str(run)])
    return examine(run).would_resume


def _conversion(manifest: Any) -> dict[str, Any]:
    """All that a conversion says of what it made, but for what names the Source."""
    data = json.loads(json.dumps(manifest.to_json()))
    return {key: value for key, value in data.items() if key not in ("saved_by", "source", "checksum")}


def _differences(first: Any, second: Any, where: tuple[str, ...] = ()) -> set[str]:
    """Places in which two manifests differ, down to a parameter's field."""
    if isinstance(first, dict) and isinstance(second, dict) and len(where) < 4:
        keys = {*first, *second}
        return {p for k in keys for p in _differences(first.get(k, _GONE), second.get(k, _GONE), (*where, k))}
    return set() if repr(first) == repr(second) else {".".join(where)}  # as text, since nan is not nan


_GONE = object()


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST_NAME).read_text())


def _table(place: Path) -> dict[str, tuple]:
    """What lies there, by path: kind, size and, of small files, content. Follows no link."""
    table = {}
    for root, folders, names in os.walk(place):
        for name in (*folders, *names):
            path = os.path.join(root, name)
            status = os.lstat(path)
            is_file = os.path.isfile(path) and not os.path.islink(path)
            content = hashlib.sha1(Path(path).read_bytes()).hexdigest() if is_file and status.st_size < 1 << 20 else ""
            table[os.path.relpath(path, place)] = (status.st_mode, status.st_size if is_file else 0, content)
    return table


def _changes(before: dict[str, tuple], after: dict[str, tuple]) -> list[str]:
    return sorted(f"{path} was changed" for path in {*before, *after} if before.get(path) != after.get(path))


def _peak_memory(reset: bool = False) -> int:
    """Bytes of this process. With `reset` it is counted anew from here, where the system allows it (Linux: proc(5),
    clear_refs); elsewhere it only grows, and the first to take more is seen."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def _addresses() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
