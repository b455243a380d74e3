"""Any Source to any Target for LLaMA, BLOOM, GPT-NeoX and mixtures of experts, as in test_any_to_any.py for GPT."""

from __future__ import annotations

import pytest

from matrix.cells import Cell, cell
from matrix.families import FIG_9, MODELS, MOE, PAIRS, SOURCES, SQUARES, TARGETS, sources_of
from matrix.sources import Sources, take_every_source
from megatron.ucp.plan import plan
from megatron.ucp.sources import open_source
from megatron.ucp.topology import Topology


@pytest.fixture(scope="module")
def sources(tmp_path_factory, data) -> dict[str, Sources]:
    """By model."""
    return {name: Sources(tmp_path_factory.mktemp(name), data, model) for name, model in MODELS.items()}


def test_the_matrix_is_whole():
    """A table that lost its rows would pass everything."""
    assert len(MOE) == 36 and len(FIG_9) == 4
    assert len(PAIRS) >= 340
    for kv in (1, 2, 3, 8):
        assert {c.tp for c in SQUARES[f"{kv} key/value heads on 1 to 4 tp ranks"]} == {1, 2, 3, 4}
    moe = [(a, b) for (a, b), family in PAIRS.items() if family == "experts"]
    for degree, values in (("ep", (1, 2, 4)), ("tp", (1, 2)), ("pp", (1, 2)), ("zero", (0, 1, 2, 3))):
        met = {(getattr(a, degree), getattr(b, degree)) for a, b in moe}
        assert met == {(one, other) for one in values for other in values}, degree
    assert all(a.model == b.model for a, b in PAIRS)
    assert all(cell(c.name) == c for c in (*SOURCES, *TARGETS))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"to-{target.name}")
def test_every_source_into(target: Cell, sources, tmp_path):
    wanted = sources_of(target)
    saved = {source for source in wanted if PAIRS[source, target] in ("figure 8", "figure 9")} | {wanted[-1]}
    take_every_source(target, wanted, saved, sources[target.model], tmp_path)


@pytest.mark.parametrize("model", MODELS)
def test_sources_trained_the_same_trajectory(model: str, sources):
    """fp32: one trajectory and one grad norm under every topology, to rounding."""
    cells = [c for c in dict.fromkeys((*SOURCES, *TARGETS)) if c.model == model]
    reference = sources[model][cells[0]].curves
    assert len(cells) > 1 and len(reference.losses) == 3
    for source in cells[1:]:
        curves = sources[model][source].curves
        for step, loss in curves.losses.items():
            assert loss == pytest.approx(reference.losses[step], abs=2e-6), source.name
            assert curves.grad_norms[step] == pytest.approx(reference.grad_norms[step], rel=2e-5), source.name


def test_plan_deals_experts_to_the_ranks_of_the_target(sources):
    """ZeRO-1: everything is read once. ZeRO-0: all of what is not experts, and half of these, by each rank."""
    source = open_source(sources["moe"][cell("moe-tp1pp1dp4ep4-z1")].native)
    sizes = {name: 4 * info.layout.numel * len(info.states) for name, info in source.manifest.parameters.items()}
    of_experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert 0 < of_experts < sum(sizes.values())
    target = Topology(dp_size=4, ep_size=2)
    assert sum(rank.num_bytes for rank in plan(source, target, zero_stage=1)) == sum(sizes.values())
    for rank in plan(source, target, zero_stage=0):
        assert rank.num_bytes == sum(sizes.values()) - of_experts // 2
