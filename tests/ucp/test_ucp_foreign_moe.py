"""Stock saves of deepspeed.moe.layer.MoE without ucp.json: read as they were live, experts under their own numbers.

Three truths: the live state of every rank, bit by bit; the same training under other expert parallelisms; by hand.
"""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from ucp.stock_moe import MOMENTS, NUM_STEPS, TAG, Moe, load_universal, train_and_save

from harness.ranks import run_ranks
from megatron.ucp.cli import main
from megatron.ucp.convert import convert
from megatron.ucp.diff import diff
from megatron.ucp.errors import CorruptFileError, MissingFileError, SourceError, UnsupportedCheckpointError
from megatron.ucp.layout import ShardRank
from megatron.ucp.safe_load import load
from megatron.ucp.sources import open_source
from megatron.ucp.sources.foreign.expert_files import split_name
from megatron.ucp.sources.foreign.expert_ranks import ExpertRanks
from megatron.ucp.torch_file import save_streamed
from megatron.ucp.verify import verify

DATA_FIRST = (("use_data_before_expert_parallelism", True),)
FP32_GRADIENTS = (("data_types", {"grad_accum_dtype": "fp32"}),)
CASES = {
    "zero1-ep2-dp2": Moe(2, {"stage": 1}),
    "zero1-ep1-dp2": Moe(2, {"stage": 1}, ep=(1, 1)),
    "zero1-ep2-dp4": Moe(4, {"stage": 1}),
    "zero2-ep4-and-2-dp4": Moe(4, {"stage": 2}, ep=(4, 2)),
    "zero2-ep2-dp4-round-robin": Moe(4, {"stage": 2, "round_robin_gradients": True}),
    "zero1-ep2-dp4-data-first": Moe(4, {"stage": 1}, config=DATA_FIRST),
    "zero1-ep2-dp4-elastic": Moe(4, {"stage": 1, "elastic_checkpoint": True}),
    "zero2-ep2-dp4-bf16": Moe(4, {"stage": 2}, dtype="bfloat16"),
    "zero1-ep2-dp4-bf16-optimizer": Moe(4, {"stage": 1}, dtype="bfloat16", config=FP32_GRADIENTS),
    "zero1-ep2-dp2-tp2": Moe(4, {"stage": 1}, tp=2),
    "zero1-ep2-dp2-tp2-cut-experts": Moe(4, {"stage": 1}, tp=2, is_expert_cut=True),
    "zero1-ep2-dp2-pp2": Moe(4, {"stage": 1}, pp=2),
    "zero0-ep2-dp2": Moe(2, {"stage": 0}, has_frozen=False, is_client=False),
    "zero0-ep4-dp4": Moe(4, {"stage": 0}, ep=(4, 4), experts=(8, 4), has_frozen=False, is_client=False),
    "zero0-ep2-dp4": Moe(4, {"stage": 0}, has_frozen=False, is_client=False),
}
INSIDE = "moe.deepspeed_moe.experts.deepspeed_experts"
FIRST, LAST = "1.moe", "2.moe"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """case -> (folder, live state by rank), trained once."""
    made = {}

    def get(name: str, num_steps: int = NUM_STEPS):
        if (name, num_steps) not in made:
            folder = tmp_path_factory.mktemp(name)
            live = run_ranks(CASES[name].world_size, train_and_save, str(folder), CASES[name], num_steps)
            made[name, num_steps] = folder / TAG, live
        return made[name, num_steps]

    return get


@pytest.fixture(scope="module")
def universal(saved, tmp_path_factory):
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"{name}-u") / "u"
            convert(saved(name)[0], made[name])
        return made[name]

    return get


# -- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_stock_save_is_read_as_it_was_live(name, saved, universal):
    case, (folder, live) = CASES[name], saved(name)
    parameters = open_source(folder).manifest.parameters
    assert {key for _, held in live for key in held} == set(parameters)
    # Under round_robin_gradients DeepSpeed's accessors are wrong; the live weights are right.
    is_wrong = bool(case.zero.get("round_robin_gradients"))
    num_compared = 0
    for tp, held in live:
        for key, states in held.items():
            truth = {"fp32": states["weight"]} if is_wrong else {k: v for k, v in states.items() if k != "weight"}
            for state, value in truth.items():
                found = load(universal(name) / "zero" / key / f"{state}.pt")["param"]
                layout = parameters[key].layout
                found = layout.split(found, ShardRank(tp, case.tp)) if layout.is_cut_over("tp") else found
                assert torch.equal(found, value.float()), (key, state)
                num_compared += 1
    assert num_compared > 60


@pytest.mark.parametrize("name", CASES)
def test_every_expert_is_there_under_its_number(name, saved):
    case, source = CASES[name], open_source(saved(name)[0])
    parameters = source.manifest.parameters
    for layer, num_experts in zip((FIRST, LAST), case.experts, strict=True):
        for inside in ("up.weight", "up.bias", "down.weight", "down.bias", "scale"):
            names = {n for n in parameters if (p := split_name(n)) and p[0] == layer and p[2] == inside}
            rest = INSIDE.removeprefix("moe.")
            assert names == {f"{layer}.{rest}.{number}.{inside}" for number in range(num_experts)}
            for found in names:
                info = parameters[found]
                is_frozen = inside == "scale" and case.has_frozen
                assert info.is_trainable != is_frozen
                assert info.step == (None if is_frozen else NUM_STEPS)
                assert info.states == (("fp32",) if is_frozen else ("fp32", *MOMENTS))
                assert (source.step_object(found) is None) == is_frozen
    if "elastic" not in name and case.is_client and len(set(case.ep)) == 1:
        experts = f"ep_size_{case.ep[0]}"
        assert set(source.manifest.optimizer.groups) == {"decay", "no_decay", experts, f"{experts}.2"}
        rates = {group: values["lr"] for group, values in source.manifest.optimizer.groups.items()}
        assert rates == {"decay": 0.01, "no_decay": 0.02, experts: 0.01, f"{experts}.2": 0.02}
        prefix = f"{FIRST}.{INSIDE.removeprefix('moe.')}.3"
        assert parameters[f"{prefix}.up.weight"].group == experts
        assert parameters[f"{prefix}.up.bias"].group == f"{experts}.2"
    assert source.manifest.topology.ep_size == max(case.ep)
    assert source.manifest.topology.dp_size == case.dp and source.manifest.iteration == NUM_STEPS


ALIKE = [
    ("zero1-ep2-dp2", "zero1-ep1-dp2"),
    ("zero1-ep2-dp2", "zero1-ep2-dp2-pp2"),
    ("zero1-ep2-dp4", "zero2-ep4-and-2-dp4"),
    ("zero1-ep2-dp4", "zero2-ep2-dp4-round-robin"),
    ("zero1-ep2-dp4", "zero1-ep2-dp4-data-first"),
    ("zero1-ep2-dp4", "zero1-ep2-dp4-elastic"),
]


@pytest.mark.parametrize(("left", "right"), ALIKE, ids=["-vs-".join(pair) for pair in ALIKE])
def test_the_same_training_under_another_expert_parallelism_gives_the_same(left, right, universal):
    found = diff(universal(left), universal(right))
    assert found.num_states > 100 and not [line for line in found.lines if "group" not in line]
    assert max((delta.max_delta for delta in found.deltas), default=0.0) < 1e-6


def test_stock_deepspeed_loads_an_ep2_save_under_ep1(saved, universal):
    """Its loader asks for experts by their numbers within a rank, which under ep 1 are the layer's."""
    held = run_ranks(2, load_universal, str(universal("zero1-ep2-dp2")), CASES["zero1-ep1-dp2"])
    num_compared = 0
    for _, live in saved("zero1-ep2-dp2")[1]:
        for name, states in live.items():
            for state in states if MOMENTS[0] in states else ():
                assert all(torch.equal(found[name][state], states[state]) for found in held), (name, state)
                num_compared += 1
    assert num_compared == 2 * 4 * (16 + 12)


@pytest.mark.parametrize("name", ["zero1-ep2-dp4", "zero1-ep2-dp2-tp2-cut-experts", "zero0-ep2-dp4"])
def test_the_other_verbs(name, saved, universal, capsys):
    folder = saved(name)[0]
    assert verify(folder).is_sound and verify(universal(name)).is_sound
    assert diff(folder, universal(name)).is_equal
    assert main(["inspect", str(folder)]) == main(["plan", str(folder), "--dp", "3"]) == 0
    assert f"1.{INSIDE}.3.up.weight" in capsys.readouterr().out


@pytest.mark.parametrize("is_data_first", [False, True], ids=["experts-first", "data-first"])
def test_places_by_hand(is_data_first):
    """DeepSpeed's own picture: 16 ranks, tp 2, ep 4 (groups.py), and the same without tp."""
    cut = ExpertRanks(8, 2, 4, is_cut=True, is_data_first=is_data_first)
    ranks = [[2 * dp + tp for dp, tp in shard] for shard in cut.holders(1)]
    assert ranks == ([[4, 6], [5, 7]] if is_data_first else [[2, 10], [3, 11]])
    whole = ExpertRanks(8, 2, 4, is_cut=False, is_data_first=is_data_first)
    ranks = [2 * dp + tp for dp, tp in whole.holders(1)[0]]
    assert ranks == ([4, 5, 6, 7] if is_data_first else [1, 5, 9, 13])
    for places in (cut, whole):
        for ep in range(4):
            assert {places.ep_rank(dp, tp) for shard in places.holders(ep) for dp, tp in shard} == {ep}


# -- what is refused, by the expert's name --------------------------------------------------------------------------


def expert_file(layer: int, expert: int) -> str:
    return f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"


def edit(path, change) -> None:
    content = load(path, mmap=False)
    change(content)
    save_streamed(content, path)


def exchange(folder, one: str, other: str) -> None:
    (folder / one).rename(folder / "aside")
    (folder / other).rename(folder / one)
    (folder / "aside").rename(folder / other)


def under_another_number(content: dict, number: int) -> dict:
    return {re.sub(r"(deepspeed_experts\.)\d+", rf"\g<1>{number}", key): value for key, value in content.items()}


def rewrite_as_its_own(folder, _):
    """Expert 1's weights under expert 2's name and keys: only the masters tell."""
    save_streamed(under_another_number(load(folder / expert_file(0, 1), mmap=False), 2), folder / expert_file(0, 2))


def zero_file(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def of_another_step(folder, other):
    shutil.copy(other / expert_file(0, 1), folder / expert_file(0, 1))


FAULTS = {
    "missing": (
        lambda f, _: (f / expert_file(0, 2)).unlink(),
        MissingFileError, ["expert 2 of layer 0 (1.moe)", expert_file(0, 2)],
    ),
    "all-missing": (
        lambda f, _: [path.unlink() for path in f.glob("layer_*")],
        MissingFileError, ["[4, 2] experts"],
    ),
    "doubled": (
        lambda f, _: shutil.copy(f / expert_file(0, 1), f / expert_file(0, 2)),
        SourceError, ["expert 2 of layer 0 (1.moe)", expert_file(0, 2), "holds expert 1 of 1.moe"],
    ),
    "doubled-and-rewritten": (
        rewrite_as_its_own,
        SourceError, ["expert 2 of layer 0 (1.moe)", "they are those of expert 1", expert_file(0, 2), zero_file(1)],
    ),
    "two-names-for-one": (
        lambda f, _: shutil.copy(f / expert_file(0, 1), f / "layer_0_expert_01_mp_rank_00_model_states.pt"),
        SourceError, ["expert 1 of layer 0", "layer_0_expert_01_mp_rank_00"],
    ),
    "renumbered": (
        lambda f, _: exchange(f, expert_file(0, 0), expert_file(0, 3)),
        SourceError, ["expert 0 of layer 0 (1.moe)", "holds expert 3 of 1.moe", "holds expert 0 of 1.moe"],
    ),
    "of-another-layer": (
        lambda f, _: exchange(f, expert_file(0, 1), expert_file(1, 1)),
        SourceError, ["expert 1 of layer 0 (1.moe)", "holds expert 1 of 2.moe", "expert 1 of layer 1 (2.moe)"],
    ),
    "one-too-many": (
        lambda f, _: shutil.copy(f / expert_file(0, 1), f / expert_file(0, 4)),
        SourceError, ["expert 4 of layer 0", "1.moe has 4 experts"],
    ),
    "a-layer-too-many": (
        lambda f, _: shutil.copy(f / expert_file(0, 1), f / expert_file(2, 1)),
        SourceError, ["expert 1 of layer 2", "no such layer"],
    ),
    "of-another-step": (of_another_step, SourceError, ["expert 1 of layer 0 (1.moe)", expert_file(0, 1), zero_file(0)]),
    "a-weight-missing": (
        lambda f, _: edit(f / expert_file(1, 1), lambda c: c.pop(f"2.{INSIDE}.1.up.bias")),
        SourceError, ["expert 1 of layer 1 (2.moe)", "up.bias as nothing, expected (10,)"],
    ),
    "a-weight-cut": (
        lambda f, _: edit(f / expert_file(1, 1), lambda c: c.update({f"2.{INSIDE}.1.up.bias": torch.zeros(4)})),
        SourceError, ["expert 1 of layer 1 (2.moe)", "up.bias as (4,), expected (10,)"],
    ),
    "torn": (
        lambda f, _: (f / expert_file(1, 0)).write_bytes((f / expert_file(1, 0)).read_bytes()[:300]),
        CorruptFileError, [expert_file(1, 0)],
    ),
    "optimizer-missing": (
        lambda f, _: (f / zero_file(1)).unlink(),
        MissingFileError, ["zero_pp_rank_1_mp", "expert 2 of layer 0 (1.moe)", "expert 3 of layer 0"],
    ),
    "optimizers-exchanged": (
        lambda f, _: exchange(f, zero_file(0), zero_file(1)),
        SourceError, ["expert 0 of layer 0 (1.moe)", "they are those of expert 2", zero_file(0)],
    ),
    "optimizer-of-another-step": (
        lambda f, other: shutil.copy(other / zero_file(1), f / zero_file(1)),
        SourceError, [zero_file(1), "step"],
    ),
    "a-master-missing": (
        lambda f, _: edit(
            f / zero_file(1),
            lambda c: c["optimizer_state_dict"]["param_slice_mappings"][2].pop(f"1.{INSIDE}.0.up.weight"),
        ),
        SourceError, ["1.moe", "up.weight"],
    ),
    "tables-say-more-experts": (
        lambda f, _: edit(f / "mp_rank_00_model_states.pt", lambda c: c.update(num_experts=[6, 2])),
        UnsupportedCheckpointError, ["experts of layer 0 (1.moe)", "2 of 6 experts on a rank"],
    ),
    "no-numbers": (
        lambda f, _: edit(f / "mp_rank_00_model_states.pt", lambda c: c.update(num_experts=None)),
        UnsupportedCheckpointError, ["which layers"],
    ),
    "no-configuration": (
        lambda f, _: edit(f / "mp_rank_00_model_states.pt", lambda c: c.pop("ds_config")),
        UnsupportedCheckpointError, ["which ranks share experts"],
    ),
    "experts-in-a-dense-group": (
        lambda f, _: edit(f / "mp_rank_00_model_states.pt", lambda c: c["param_shapes"][2].update(
            {"0.column.bias": torch.Size([6])})),
        UnsupportedCheckpointError, ["experts beside dense parameters", "group 2"],
    ),
    "auto-ep": (
        lambda f, _: edit(f / "mp_rank_00_model_states.pt", lambda c: c.update(ds_autoep_layers=[{}])),
        CorruptFileError, ["AutoEP's layers are not described"],
    ),
    "old-names": (
        lambda f, _: (f / expert_file(0, 0)).rename(f / "expert_0_mp_rank_00_model_states.pt"),
        UnsupportedCheckpointError, ["expert_0_mp_rank_00_model_states.pt"],
    ),
}  # fmt: skip


def expp_file(rank: int) -> str:
    return f"expp_rank_{rank}_mp_rank_00_optim_states.pt"


ZERO0_FAULTS = {
    "missing": FAULTS["missing"],
    "renumbered": FAULTS["renumbered"],
    "optimizer-missing": (
        lambda f, _: (f / expp_file(1)).unlink(),
        MissingFileError, [expp_file(1), "expert 2 of layer 0 (1.moe)", "expert 3 of layer 0", "expert 1 of layer 1"],
    ),
    "optimizer-doubled": (
        lambda f, _: shutil.copy(f / expp_file(0), f / expp_file(1)),
        SourceError, [expp_file(1), "the same states", "expert 2 of layer 0 (1.moe)"],
    ),
    "optimizers-exchanged": (
        lambda f, _: exchange(f, expp_file(0), expp_file(1)),
        SourceError, [expp_file(0), "first rank's experts"],
    ),
    "optimizer-of-another-step": (
        lambda f, other: shutil.copy(other / expp_file(1), f / expp_file(1)),
        SourceError, [expp_file(1), "the optimizer's step is 2.0"],
    ),
    "another-order": (
        lambda f, _: edit(f / "mp_rank_00_model_states.pt", lambda c: c.update(
            module=dict(sorted(c["module"].items())))),
        UnsupportedCheckpointError, ["not the order of the weights", "0.column.bias, index 0 in expp_rank_0"],
    ),
    "own-groups": (
        lambda f, _: edit(f / "mp_rank_00_model_states.pt", lambda c: c["optimizer"]["param_groups"][0].update(
            name="decay")),
        UnsupportedCheckpointError, ["nothing names the indices", "decay"],
    ),
}  # fmt: skip


def assert_refused(folder, tmp_path, kind, texts) -> None:
    with pytest.raises(kind) as caught:
        convert(folder, tmp_path / "u")
    for text in texts:
        assert text in str(caught.value)
    assert not (tmp_path / "u").exists() and not (tmp_path / "u.tmp").exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_refused_by_the_expert(fault, saved, tmp_path):
    folder = shutil.copytree(saved("zero1-ep2-dp2")[0], tmp_path / "n")
    plant, kind, texts = FAULTS[fault]
    plant(folder, saved("zero1-ep2-dp2", NUM_STEPS - 1)[0])
    assert_refused(folder, tmp_path, kind, texts)


@pytest.mark.parametrize("fault", ZERO0_FAULTS)
def test_a_planted_fault_in_zero0_is_refused(fault, saved, tmp_path):
    folder = shutil.copytree(saved("zero0-ep2-dp2")[0], tmp_path / "n")
    plant, kind, texts = ZERO0_FAULTS[fault]
    plant(folder, saved("zero0-ep2-dp2", NUM_STEPS - 1)[0])
    assert_refused(folder, tmp_path, kind, texts)


@pytest.mark.parametrize("name", ["zero1-ep2-dp4", "zero1-ep2-dp4-data-first", "zero1-ep2-dp2-tp2-cut-experts"])
def test_a_reader_with_a_wrong_order_of_ranks_is_found_out(name, saved, monkeypatch):
    """The planted fault: every rank has the experts of its neighbour."""
    holders = ExpertRanks.holders
    monkeypatch.setattr(ExpertRanks, "holders", lambda self, rank: holders(self, (rank + 1) % self.ep_size))
    with pytest.raises(SourceError, match=r"expert 0 of layer 0 \(1.moe\).* they are those of expert 2"):
        open_source(saved(name)[0])


ZERO0 = CASES["zero0-ep2-dp2"]
OPEN = {
    "frozen-experts": (replace(ZERO0, has_frozen=True), "frozen or tied"),
    "own-groups": (replace(ZERO0, is_client=True), "nothing names the indices"),
    "bf16": (replace(ZERO0, dtype="bfloat16"), "only ZeRO-0 in fp32"),
    "several-ep-sizes": (replace(ZERO0, ep=(2, 1)), "several ep sizes"),
    "tp2": (replace(ZERO0, tp=2, ep=(1, 1), is_expert_cut=True), "tensor or pipeline parallelism"),
}


@pytest.mark.parametrize("name", OPEN)
def test_what_stock_zero0_leaves_open_is_refused(name, tmp_path):
    case, reason = OPEN[name]
    run_ranks(case.world_size, train_and_save, str(tmp_path), case)
    with pytest.raises(UnsupportedCheckpointError, match=reason):
        open_source(tmp_path / TAG)


def test_what_deepspeed_leaves_out_under_tp_with_whole_experts(tmp_path):
    """Only the first rank of a group of experts writes model states: with ep 1 one for both tp ranks."""
    run_ranks(2, train_and_save, str(tmp_path), Moe(2, {"stage": 1}, ep=(1, 1), tp=2))
    with pytest.raises(MissingFileError, match="mp_rank_01_model_states.pt"):
        open_source(tmp_path / TAG)
