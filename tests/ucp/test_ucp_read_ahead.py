"""Of all that is wanted the system is told beforehand, but not of all at once."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from ucp.synthetic import make_state, model, write_native

from megatron.ucp import read_ahead as module
from megatron.ucp import stored
from megatron.ucp.convert import convert
from megatron.ucp.execute import gather
from megatron.ucp.layout import ShardRank
from megatron.ucp.read_ahead import read_ahead, spans
from megatron.ucp.runs import numel, shard_runs
from megatron.ucp.sources import open_source
from megatron.ucp.topology import Topology


@pytest.mark.parametrize("seed", range(20))
def test_spans_hold_the_runs_and_no_large_gap(seed):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 3000, 50)
    starts = np.cumsum(generator.choice([0, 5, 1 << 16, 1 << 17, 1 << 19], 50) + np.concatenate([[7], sizes[:-1]]))
    order = generator.permutation(50)
    found = spans(starts[order], sizes[order])
    held = [any(a <= start and start + size <= b for a, b in found) for start, size in zip(starts, sizes, strict=True)]
    assert all(held)
    gaps = [start - stop for (_, stop), (start, _) in zip(found, found[1:])]
    assert all(gap > 1 << 17 for gap in gaps)
    inner = sum(stop - start for start, stop in found) - int(sizes.sum())
    assert inner <= (50 - len(found)) * (1 << 17)
    assert spans(np.array([], int), np.array([], int)) == []


@pytest.mark.parametrize("kind", ["native", "universal"])
@pytest.mark.parametrize("ahead", [0, 20_000, 1 << 28])
def test_the_system_is_told_of_what_is_copied_before_it_is(kind, ahead, tmp_path, monkeypatch):
    folder = tmp_path / "global_step3"
    write_native(folder, make_state(model()), Topology(tp_size=2, dp_size=2), 1)
    if kind == "universal":
        convert(folder, folder := tmp_path / "universal")
    monkeypatch.setattr(stored, "_READ", 0)
    monkeypatch.setattr(module, "AHEAD", ahead)
    told: list[tuple[str, int, int]] = []
    will_need = stored.MappedFile.will_need

    def recorded(self, start: int, stop: int) -> None:
        told.append((str(self.path), start, stop))
        will_need(self, start, stop)

    monkeypatch.setattr(stored.MappedFile, "will_need", recorded)
    source = open_source(folder)
    wanted = list(_wanted(source))
    told_of = []
    for number, (name, state, runs, out) in enumerate(read_ahead(source, wanted)):
        assert wanted[number][:2] == (name, state)
        copied = _copied(monkeypatch, source, name, state, runs, out)
        assert copied and all(any(f == g and a <= start and stop <= b for g, a, b in told) for f, start, stop in copied)
        told_of.append(len(told))
    assert number == len(wanted) - 1
    if ahead == 0:
        assert told_of[0] < told_of[-1]  # not all at once
    else:
        assert (told_of[0] == told_of[-1]) == (ahead == 1 << 28)


@pytest.mark.parametrize("kind", ["native", "universal"])
def test_the_system_is_told_of_a_files_ends_before_it_is_opened(kind, tmp_path, monkeypatch):
    folder = tmp_path / "global_step3"
    write_native(folder, make_state(model()), Topology(tp_size=2, dp_size=2), 1)
    if kind == "universal":
        convert(folder, folder := tmp_path / "universal")
    monkeypatch.setattr(module, "FILES_AHEAD", 3)
    events: list[tuple[str, Path]] = []
    tell_ends = module._tell_ends
    monkeypatch.setattr(module, "_tell_ends", lambda path: (events.append(("told", path)), tell_ends(path)))
    source = open_source(folder)
    read_tensor = type(source).tensor

    def opened(self, piece):
        events.append(("opened", piece.file))
        return read_tensor(self, piece)

    monkeypatch.setattr(type(source), "tensor", opened)
    for name, state, runs, _ in read_ahead(source, list(_wanted(source))):
        events.append(("given", Path(name) / state))
        assert numel(runs)
    told = [path for event, path in events if event == "told"]
    assert len(told) == len(set(told)) and set(told) == {path for event, path in events if event == "opened"}
    for path in told:
        assert events.index(("told", path)) < events.index(("opened", path))
    if kind == "universal":  # some files on, not all
        first = events.index(("opened", told[0]))
        assert [event for event, _ in events[:first]] == ["told"] * 4


def test_what_cannot_be_opened_is_left_to_whoever_reads_it(tmp_path):
    module._tell_ends(tmp_path / "absent")
    module._tell_ends(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    module._tell_ends(tmp_path / "pipe")  # and is not waited for


def _wanted(source):
    for name, info in source.manifest.parameters.items():
        shard = ShardRank(1, 2)
        size = math.prod(info.layout.shard_shape(shard))
        runs = shard_runs(info.layout, shard, 0, size)
        for state in info.states:
            yield name, state, runs, np.zeros(size, np.float32)


def _copied(monkeypatch, source, name, state, runs, out) -> list[tuple[str, int, int]]:
    """(file, first byte, byte after the last) of what a gather reads: what it says that it needs no longer."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(stored.MappedFile, "let_go", lambda self, start, stop: seen.append((str(self.path), start, stop)))
        gather(source, name, state, source.pieces(name, state), runs, out)
    return seen
