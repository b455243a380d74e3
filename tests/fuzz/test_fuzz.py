"""Whatever is damaged in a checkpoint, everything that reads it tells it or gives what was saved; and the fuzz that
says so sees it when a check of ours is taken away."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fuzz.bases import Base, make_bases, target_flags

from harness.ranks import run_ranks

SEED = 0
SEEDS_OF_MUTATIONS = range(8)
PROCESSES = 2
LEAST = 2000
"""Cases; fewer would mean that a table of faults was lost."""
TIMEOUT = 1200


@pytest.fixture(scope="module")
def place():
    """In memory where there is such a disk: the fuzz writes thousands of small folders."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=parent))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def bases(place) -> tuple[dict[str, Base], Path]:
    return make_bases(place)


def _judge(bases: dict[str, Base], data: Path, scratch: Path):
    from fuzz.judge import Judge

    from matrix.recording import build

    logging.getLogger().handlers.clear()
    logging.lastResort = None
    scratch.mkdir()
    return Judge(bases, build(target_flags(data), 0, 1), scratch)


def _violations(
    rank: int, world_size: int, bases: dict[str, Base], data: Path, scratch: Path, part: int
) -> tuple[list[str], Counter]:
    """The body of one process: its share of the faults, one line for each violation, and how many of which base."""
    from fuzz.faults import all_faults

    judge = _judge(bases, data, scratch)
    mine = all_faults(bases, SEED)[part::PROCESSES]
    lines = [f"{f.base} | {f.name}: {what}" for f in mine for what in judge.violations(f)]
    return lines, Counter(fault.base for fault in mine)


def test_every_damage_is_told_or_does_no_harm(bases, place):
    by_name, data = bases

    def run(part: int):
        return run_ranks(1, _violations, by_name, data, place / f"part{part}", part, timeout=TIMEOUT)[0]

    with ThreadPoolExecutor(PROCESSES) as pool:
        parts = list(pool.map(run, range(PROCESSES)))
    lines = [line for found, _ in parts for line in found]
    assert not lines, f"{len(lines)} violations:\n" + "\n".join(lines[:40])
    counts = sum((count for _, count in parts), Counter())
    assert set(counts) == set(by_name) and min(counts.values()) > 40
    assert sum(counts.values()) >= LEAST


def _seen(
    rank: int, world_size: int, bases: dict[str, Base], data: Path, scratch: Path
) -> dict[str, tuple[int, list[str]]]:
    """By mutation: how many faults were tried, and what the first that was not told looked like."""
    from fuzz.faults import all_faults
    from fuzz.mutations import MUTATIONS

    judge = _judge(bases, data, scratch)
    # By name, which says which value was chosen: several seeds try more of them.
    every = list({(f.base, f.name): f for seed in SEEDS_OF_MUTATIONS for f in all_faults(bases, seed)}.values())
    found = {}
    for mutation in MUTATIONS:
        chosen = [fault for fault in every if mutation.applies_to(fault)]
        assert not any(judge.violations(fault) for fault in chosen[:1]), mutation.name
        found[mutation.name] = (len(chosen), [])
        with mutation.applied():
            for fault in chosen:
                if violations := judge.violations(fault):
                    found[mutation.name] = (len(chosen), [fault.name, *violations])
                    break
    return found


def test_without_one_of_our_checks_the_fuzz_finds_it(bases, place):
    by_name, data = bases
    found = run_ranks(1, _seen, by_name, data, place / "mutations", timeout=TIMEOUT)[0]
    unseen = [f"{name}: {tried} faults tried" for name, (tried, violations) in found.items() if not violations]
    assert not unseen, "the fuzz does not see that these checks are gone:\n" + "\n".join(unseen)
