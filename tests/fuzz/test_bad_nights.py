"""A rank that dies or stands still in any phase of a save or a resume: told, nothing lost, the same command goes on.

Truth: the state digests of a job of the same flags to which nothing happened.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from fuzz.bad_nights import MUTATIONS, Night, body

from harness.ranks import RankFailure, run_ranks
from matrix.recording import command_line
from megatron.ucp.digest import total
from megatron.ucp.manifest import read_manifest
from megatron.ucp.run_folder import find_checkpoints
from megatron.ucp.verify import verify

DEATHS, STANDSTILLS, KILLS = 6, 2, 2
"""Cases of each kind of save, and of a resume."""
LIMIT = 60
"""Seconds of a job; those that are right take two, and seven where they wait for a rank."""
SAVES = {"save": (), "async save": ("--async-save",)}


def _argv(data: Path, run: Path, how: str) -> list[str]:
    return [*command_line(data, zero=1, iters=4, save=run, save_interval=1, load=run), *SAVES[how]]


@pytest.fixture(scope="module")
def base(data, tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """(a run folder that has come to iteration 2, {state digest: iteration} of a job to which nothing happens)."""
    run, whole = tmp_path_factory.mktemp("base") / "run", tmp_path_factory.mktemp("whole") / "run"
    nothing = Night("", "", victim=-1)
    run_ranks(2, body, [*_argv(data, run, "save"), "--exit-interval", "2"], nothing)
    run_ranks(2, body, _argv(data, whole, "save"), nothing)
    return run, {total(read_manifest(whole / f"global_step{i}").digests): i for i in range(1, 5)}


def _phases(base: Path, data: Path, run: Path, during: str, how: str, victim: int) -> list[str]:
    shutil.copytree(base, run)
    return run_ranks(2, body, _argv(data, run, how), Night(during, "", victim))[victim][1]


@pytest.mark.parametrize(("during", "how"), [("save", "save"), ("save", "async save"), ("resume", "save")])
def test_the_job_goes_on(during: str, how: str, base, data, tmp_path):
    run_folder, states = base
    chance, outcomes, faults = random.Random(f"{during} {how}"), Counter[str](), list[str]()
    nights = []
    for victim in (0, 1):
        phases = _phases(run_folder, data, tmp_path / f"phases{victim}", during, how, victim)
        assert len(phases) > 30, phases
        for fault, count in (("dies", DEATHS), ("stands still", STANDSTILLS)):
            places = chance.sample(range(1, len(phases) + 1), count // 2 + (victim and count % 2))
            nights += [(Night(during, fault, victim, place), phases[place - 1]) for place in places]
    nights += [(Night(during, "is killed", chance.randrange(2), chance.uniform(0.05, 0.8)), "") for _ in range(KILLS)]
    for number, (night, phase) in enumerate(nights):
        run = tmp_path / f"night{number}"
        shutil.copytree(run_folder, run)
        outcome, why = _judged(night, _argv(data, run, how), run, states)
        outcomes[f"{night.fault}: {outcome}"] += 1
        if why:
            faults.append(f"{night} ({phase}): {outcome}: {why}")
        shutil.rmtree(run, ignore_errors=True)
    print(f"\n{during}, {how}: {dict(outcomes)}")
    assert not faults, "\n".join(faults)
    assert sum(outcomes.values()) == DEATHS + STANDSTILLS + KILLS and outcomes["is killed: ended first"] < KILLS


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_check_that_is_taken_away_is_seen(mutation: str, base, data, tmp_path):
    run_folder, states = base
    phases = _phases(run_folder, data, tmp_path / "phases", "save", "save", 0)
    place = 1 + next(number for number, name in enumerate(phases) if name.endswith("write_archive"))
    fault = "dies" if mutation == "a dead owner is believed alive" else "stands still"
    for planted in ("", mutation):
        run = tmp_path / f"night{bool(planted)}"
        shutil.copytree(run_folder, run)
        night = Night("save", fault, 0, place, planted)
        assert bool(_judged(night, _argv(data, run, "save"), run, states)[1]) == bool(planted)


def _judged(night: Night, argv: list[str], run: Path, states: dict[str, int]) -> tuple[str, str]:
    """(what a resume would take, why that is wrong)."""
    began, told = time.monotonic(), ""
    try:
        run_ranks(2, body, argv, night, timeout=LIMIT)
    except RankFailure as failure:
        told = str(failure)
    other = 1 - night.victim
    if time.monotonic() - began > LIMIT - 1 or (f"rank {other} hung" in told and night.fault == "stands still"):
        return "hang", told
    if night.fault != "is killed" and f"rank {night.victim} {'died' if night.fault == 'dies' else 'hung'}" not in told:
        return "silent", f"the fault was not come to: {told}"
    if night.fault == "is killed" and f"rank {night.victim} died" not in told:
        return ("ended first", "") if not told else ("traceback", told)
    if night.fault == "stands still" and f"rank {other} raised: LostRankError" not in told:
        return "traceback", told
    found = find_checkpoints(run).native
    if found is None or not verify(found.folder).is_sound:
        return "lost", "a resume finds nothing" if found is None else f"{found.folder} is not whole"
    iteration = states.get(total(read_manifest(found.folder).digests), 0)
    if iteration != found.iteration:
        return "silent", f"{found.folder.name} holds another state"
    try:
        run_ranks(2, body, argv, Night("", "", victim=-1, mutation=night.mutation), timeout=LIMIT)
    except RankFailure as failure:
        return "lost", f"the same command does not go on: {failure}"
    last = find_checkpoints(run).native
    if last is None or states.get(total(read_manifest(last.folder).digests)) != 4:
        return "silent", "it ended in another state"
    left = [path.name for path in run.iterdir() if ".tmp" in path.name or ".replaced" in path.name]
    return f"iteration {iteration}", f"left over: {left}" if left else ""
