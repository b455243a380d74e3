"""Programs of plain DeepSpeed with `install()`: every ZeRO stage to every other, on other numbers of ranks.

The truth is the state of the saving engine, gathered from the live tensors before the save, and the run that never
stopped. Beside it stands what stock DeepSpeed does with the same folder: it refuses, or goes on with something else.
"""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from ucp_deepspeed.plain_program import OPTIMIZERS, TAG, differences, engine_of, resume, save, step
from ucp_deepspeed.seen import Seen, raised_by_deepspeed

from harness.ranks import RankFailure, run_ranks

BF16 = {"bf16": {"enabled": True}}
CELLS = [(stage, ranks) for stage in (0, 1, 2, 3) for ranks in (1, 2, 3, 4)]
"""(ZeRO stage, ranks) of Sources. ZeRO-0 in fp32: in bf16 DeepSpeed keeps its optimizer's state in another form."""
TARGETS = [(stage, ranks) for stage in (0, 1, 2, 3) for ranks in (1, 2, 3, 4)]


class Saved(NamedTuple):
    folder: Path
    seen: Seen


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[..., Saved]:
    """Made when it is first asked for. Not `installs`: by stock DeepSpeed, so without a ucp.json."""

    @functools.cache
    def make(stage: int, ranks: int, is_bf16: bool = False, installs: bool = True) -> Saved:
        folder = tmp_path_factory.mktemp(f"zero{stage}dp{ranks}")
        seen = run_ranks(ranks, save, str(folder), stage, BF16 if is_bf16 else {}, installs)
        assert (folder / TAG / "ucp.json").is_file() == installs
        return Saved(folder, seen[0])

    return make


@pytest.mark.parametrize(
    "target, is_bf16",
    [(target, False) for target in TARGETS] + [(target, True) for target in TARGETS if target[0]],
    ids=lambda value: f"to-zero{value[0]}dp{value[1]}" if isinstance(value, tuple) else "bf16" if value else "fp32",
)
def test_every_stage_and_size_into(target: tuple[int, int], is_bf16: bool, saved):
    there = [saved(*source, is_bf16) for source in CELLS if source[0] or not is_bf16]
    there += [saved(stage, 2 + stage % 2, is_bf16, installs=False) for stage in (0, 1, 2, 3) if stage or not is_bf16]
    folders = [str(made.folder) for made in there]
    for by_rank in run_ranks(target[1], resume, folders, target[0], BF16 if is_bf16 else {}):
        for made, found in zip(there, by_rank, strict=True):
            assert not differences(found, made.seen)
            # Topologies differ in the order of sums alone; bf16 rounds gradients as they are summed.
            assert found.losses == pytest.approx(made.seen.losses, abs=2e-2 if is_bf16 else 2e-6)


@pytest.mark.parametrize("named", sorted(set(OPTIMIZERS) - {"Odd"}))
@pytest.mark.parametrize("installs", [True, False], ids=["saved with install", "saved by stock"])
def test_any_optimizer_whose_state_can_be_cut(named: str, installs: bool, tmp_path):
    folder, more = tmp_path / "run", {"named": named}
    there = run_ranks(2, save, str(folder), 2, more, installs)[0]
    for stage, ranks in ((1, 3), (3, 1)):
        for [found] in run_ranks(ranks, resume, [str(folder)], stage, more):
            assert not differences(found, there)
            assert found.losses == pytest.approx(there.losses, abs=2e-6)


OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}
ALIGNED = {"zero_optimization": {"parameter_alignment": True}, "width": 21}
SETTINGS = {
    "from CPU offload": ((2, 2, OFFLOAD), (1, 3, {})),
    "to CPU offload": ((1, 2, {}), (2, 3, OFFLOAD)),
    "ZeRO-3 in small sub-groups": ((3, 2, {"zero_optimization": {"sub_group_size": 500}}), (3, 3, {})),
    "to small sub-groups": ((3, 2, {}), (3, 1, {"zero_optimization": {"sub_group_size": 500}})),
    "from round_robin_gradients": ((2, 3, {"zero_optimization": {"round_robin_gradients": True}}), (2, 2, {})),
    "to round_robin_gradients": ((2, 2, {}), (2, 3, {"zero_optimization": {"round_robin_gradients": True}})),
    "from parameter_alignment": ((2, 3, ALIGNED), (1, 2, {"width": 21})),
    "to parameter_alignment": ((3, 2, {"width": 21}), (2, 3, ALIGNED)),
    "gathered weights": ((3, 2, {"zero_optimization": {"stage3_param_persistence_threshold": 0}}), (1, 1, {})),
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("installs", [True, False], ids=["saved with install", "saved by stock"])
def test_settings_of_deepspeed(case: str, installs: bool, tmp_path):
    source, target = SETTINGS[case]
    folder = tmp_path / "run"
    there = run_ranks(source[1], save, str(folder), source[0], source[2], installs)[0]
    for [found] in run_ranks(target[1], resume, [str(folder)], target[0], target[2]):
        assert not differences(found, there)
        assert found.losses == pytest.approx(there.losses, abs=2e-6)


@pytest.mark.parametrize("source, target", [((1, 2), (1, 1)), ((2, 2), (3, 2)), ((3, 2), (3, 1)), ((3, 3), (1, 3))])
def test_stock_deepspeed_beside_it(source: tuple[int, int], target: tuple[int, int], saved):
    """Without the one line the same resume fails, or ends with another state."""
    made = saved(*source)
    try:
        [found] = run_ranks(target[1], resume, [str(made.folder)], target[0], {}, False)[0]
    except RankFailure as error:
        assert raised_by_deepspeed(error)
        return
    assert differences(found, made.seen)


def _with_a_date(rank: int, world_size: int, folder: str, is_trusted: bool) -> dict:
    import datetime

    engine = engine_of(1, world_size, 0, {}, True)
    step(engine, 0, rank, world_size)
    engine.save_checkpoint(folder, client_state={"when": datetime.datetime(2026, 1, 2), "epoch": 3})
    if is_trusted:
        torch.serialization.add_safe_globals([datetime.datetime])
    return {key: str(value) for key, value in engine.load_checkpoint(folder)[1].items() if key in ("when", "epoch")}


def test_client_state_makes_no_class_that_is_not_trusted(tmp_path):
    [found] = run_ranks(1, _with_a_date, str(tmp_path / "a"), False)
    assert found == {"epoch": "3"}
    [found] = run_ranks(1, _with_a_date, str(tmp_path / "b"), True)
    assert found == {"epoch": "3", "when": "2026-01-02 00:00:00"}


def test_planted_fault_is_found_by_the_comparison(saved):
    """One moment of one parameter."""
    made = saved(1, 2)
    other = copy.deepcopy(made.seen)
    other.client_state = {"epoch": 4, "note": ["a", 1.5]}
    assert not differences(other, made.seen)
    other.state["norm.weight", "exp_avg"][0] += 1e-3
    assert differences(other, made.seen) == ["state ('norm.weight', 'exp_avg')"]


def test_planted_fault_raised_by_deepspeed():
    story = "rank 0 raised: X\nTraceback (most recent call last):\n{}\nX: no\n--- end"
    ours, stock = '  File "/a/tests/b.py", line 1, in f', '  File "/a/site-packages/deepspeed/c.py", line 2, in g'
    assert raised_by_deepspeed(RankFailure(story.format(f"{ours}\n{stock}")))
    assert not raised_by_deepspeed(RankFailure(story.format(f"{stock}\n{ours}")))
    assert not raised_by_deepspeed(RankFailure("did not end in time"))


def test_planted_fault_a_changed_checkpoint_is_refused(saved, tmp_path):
    """One byte of one moment is another in the file, whose size and form are as they were: the digest of the state
    says which."""
    made = saved(1, 2)
    folder = tmp_path / TAG
    shutil.copytree(made.folder / TAG, folder)
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(path, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]
    moment = content.get("state", content)[0]["exp_avg"].numpy().tobytes()
    raw = bytearray(path.read_bytes())
    assert raw.count(moment) == 1
    raw[raw.index(moment) + 21] ^= 1
    path.write_bytes(raw)
    (tmp_path / "latest").write_text(TAG)
    with pytest.raises(RankFailure, match=r"1 digests differ: \S+ \(exp_avg\).*Files changed since .*: zero_pp"):
        run_ranks(1, resume, [str(tmp_path)], 1, {})
