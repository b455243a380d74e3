"""The plan against plain code that follows every single element from the Target's rank to the Source's file."""

import math
from collections import Counter

import pytest
import torch
from ucp.synthetic import make_state, model, write_native

from megatron.ucp.convert import convert
from megatron.ucp.layout import ShardRank
from megatron.ucp.plan import plan
from megatron.ucp.sources import Source, open_source
from megatron.ucp.topology import Topology

STATE = make_state(model(), seed=4)
SOURCES = {
    "dp3": (Topology(dp_size=3), 1),
    "tp2-dp2": (Topology(tp_size=2, dp_size=2), 1),
    "tp2-pp2-zero0": (Topology(tp_size=2, pp_size=2), 0),
    "dp2-zero3": (Topology(dp_size=2), 3),
    "universal": (Topology(tp_size=2), 1),
}
TARGETS = [Topology(), Topology(dp_size=5), Topology(2, 2, 2), Topology(dp_size=2, sp_size=2), Topology(3, 1, 2)]


def element_by_element(source: Source, target: Topology, zero_stage: int) -> list[Counter]:
    """Elements by file, of each rank of the Target."""
    parameters = source.manifest.parameters
    names = list(parameters)
    files: dict[tuple[str, str, int], str] = {}
    for name, info in parameters.items():
        for state in info.states:
            for piece in source.pieces(name, state):
                for start, _, length in piece.runs.tolist() if piece.copy == 0 else ():
                    for index in range(start, start + length):
                        files[name, state, index] = piece.file.relative_to(source.folder).as_posix()
    reads = []
    for rank in range(target.world_size):
        at = target.coords(rank)
        first, last = (round(i * len(names) / target.pp_size) for i in (at.pp, at.pp + 1))
        shard = ShardRank(at.tp, target.tp_size, target.ep_rank(at), target.ep_size)
        groups: dict[str, list[tuple[str, int]]] = {}
        for name in names[first:last]:
            info = parameters[name]
            layout = info.layout.without_padding()
            whole = torch.arange(1, layout.numel + 1).reshape(layout.shape)  # 0 is what no element comes to
            held = [(name, index - 1) for index in layout.split(whole, shard).reshape(-1).tolist()]
            groups.setdefault(info.group if info.is_trainable else f"frozen {name}", []).extend(held)
        counter: Counter = Counter()
        for group, elements in groups.items():
            size, index = len(elements), 0
            if zero_stage and not group.startswith("frozen"):
                size, index = math.ceil(len(elements) / target.zero_size), target.zero_rank(at)
            for name, element in elements[index * size : (index + 1) * size]:
                counter.update(files[name, state, element] for state in parameters[name].states if element >= 0)
        reads.append(counter)
    return reads


@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize("source", SOURCES)
def test_the_plan_counts_every_element_once(source, zero_stage, tmp_path):
    topology, of_source = SOURCES[source]
    write_native(tmp_path / "n", STATE, topology, of_source)
    if source == "universal":
        convert(tmp_path / "n", tmp_path / "u")
    opened = open_source(tmp_path / ("u" if source == "universal" else "n"))
    for target in TARGETS:
        found = plan(opened, target, zero_stage)
        expected = element_by_element(opened, target, zero_stage)
        for reads, counted in zip(found, expected, strict=True):
            assert {file: num_bytes // 4 for file, num_bytes in reads.files.items()} == dict(counted), (
                target,
                reads.rank,
            )
            assert reads.num_bytes == 4 * counted.total()
