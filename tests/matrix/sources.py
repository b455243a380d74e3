"""Sources of a matrix, each trained, saved and converted when it is first asked for; and a Target that takes many.

sources = Sources(folder, data, MODEL)
take_every_source(target, [source, ...], {source}, sources, tmp_path)
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from harness.ranks import run_ranks
from matrix.cells import Cell
from matrix.recording import Curves, command_line, train
from matrix.taking import assert_same_tensors, take_all
from megatron.ucp.convert import convert

NUM_STEPS = 3
TAG = f"global_step{NUM_STEPS}"


class Source(NamedTuple):
    native: Path
    universal: Path
    curves: Curves


class Sources:
    """By cell. `model` is the flags of the model that all of them are of; `made`: those that are there already."""

    def __init__(
        self, folder: Path, data: Path, model: Mapping[str, object], made: Mapping[Cell, Source] | None = None
    ):
        self.folder, self.data, self.model, self._made = folder, data, model, dict(made or {})

    def __getitem__(self, source: Cell) -> Source:
        if source not in self._made:
            folder = self.folder / source.name
            flags = {"iters": NUM_STEPS, "save": folder, "save_interval": NUM_STEPS, **source.flags}
            curves = run_ranks(source.world_size, train, command_line(self.data, **self.model, **flags))[0]
            convert(folder / TAG, folder / f"{TAG}_universal", num_workers=1)
            self._made[source] = Source(folder / TAG, folder / f"{TAG}_universal", curves)
        return self._made[source]


def take_every_source(
    target: Cell, wanted: Sequence[Cell], saved: Collection[Cell], sources: Sources, folder: Path
) -> None:
    """Another run, with other weights, loads each Source directly, its own state being noise before. Those in `saved`
    it loads from their universal folders too; what it then has it saves, and that is converted again and held against
    the Source's own universal folder, tensor by tensor. (A universal folder has no topology: what is in each is the
    Source's by digest, and each Target reads some.)"""
    assert set(saved) & set(wanted)
    plans, taken_from = [], []
    for source in wanted:
        made = sources[source]
        assert json.loads((made.universal / "ucp.json").read_text())["digests"] == made.curves.digests, source.name
        plans.append(("direct", str(made.native), None))
        taken_from.append(source)
        if source in saved:
            plans.append(("universal", str(made.universal), str(folder / source.name)))
            taken_from.append(source)
    num_samples = NUM_STEPS * sources.model["global_batch_size"]
    argv = command_line(sources.data, **sources.model, **target.flags, seed=99)
    for by_rank in run_ranks(target.world_size, take_all, argv, plans):
        for source, (kind, _, _), taken in zip(taken_from, plans, by_rank, strict=True):
            where = f"{kind} from {source.name}"
            assert taken.digests == sources[source].curves.digests, where
            assert taken.steps <= {float(NUM_STEPS)}, where
            assert (taken.iteration, taken.samples) == (NUM_STEPS, num_samples), where
    for source, (_, _, again) in zip(taken_from, plans, strict=True):
        if again is not None:
            convert(Path(again) / TAG, Path(again) / "universal", num_workers=1)
            assert_same_tensors(sources[source].universal, Path(again) / "universal", at_least=40)
