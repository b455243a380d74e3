"""Mixtures of experts train as in one plain process, whatever is beside expert parallelism: precisions, loss scales,
offload, recomputation, capacity, optimizers, frozen parameters, and a rank that no token comes to.

The reference is this code without any parallelism, which tests/architecture holds against plain torch.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from harness.ranks import RankFailure, run_ranks
from matrix.cells import Cell, cell
from matrix.families import MODELS
from matrix.recording import Curves, allow_fp16, build, command_line, curves, train
from matrix.taking import take_all
from megatron.ucp.convert import convert

NUM_STEPS = 3
BF16 = {"bf16": True}
SUMMED_IN_FP32 = {"bf16": True, "accumulate_allreduce_grads_in_fp32": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform"}


def line(data: Path, cell: Cell, frozen: tuple[str, ...] = (), **flags) -> list[str]:
    freeze = ["--freeze-parameters", *frozen] if frozen else []
    return [*command_line(data, **{**MODELS[cell.model], **cell.flags, "iters": NUM_STEPS, **flags}), *freeze]


@pytest.fixture(scope="module")
def run_of(data):
    """By rank what a body gives; each run made once. A hang is found soon."""
    made: dict[tuple, list] = {}

    def get(cell: Cell, body=train, args: tuple = (), **flags) -> list:
        argv = line(data, cell, **flags)
        key = body.__name__, cell.world_size, args, tuple(argv)
        if key not in made:
            made[key] = run_ranks(cell.world_size, body, argv, *args, timeout=60)
        return made[key]

    return get


def alone(cell: Cell, low_precision: bool = False) -> Cell:
    """One plain process."""
    return Cell(model=cell.model, how="plain", zero=int(low_precision))


def assert_near(found: Curves, truth: Curves, loss: float = 2e-6, norm: float = 2e-5) -> None:
    assert len(truth.losses) >= NUM_STEPS
    for step in truth.losses:
        assert found.losses[step] == pytest.approx(truth.losses[step], abs=loss), step
        assert found.grad_norms[step] == pytest.approx(truth.grad_norms[step], rel=norm), step


def assert_near_in_bf16(found: Curves, truth: Curves) -> None:
    """Measured: losses to 1.5e-4, norms to 2e-3, the first one to 4e-4."""
    assert_near(found, truth, loss=1e-3, norm=1e-2)
    assert found.grad_norms[1] == pytest.approx(truth.grad_norms[1], rel=1e-3)


# -- what is beside expert parallelism --------------------------------------------------------------------------------

CASES = {
    "several-sequences-each": ("moe-tp1pp1dp2ep2-z3", {"micro_batch": 2}),
    "recomputed": ("moe-tp2pp1dp2ep2-cut-z3 moe-tp1pp2dp2ep2-z1", FULL),
    "recomputed-in-part": ("moe-tp1pp1dp2ep2-z1", {"recompute_granularity": "selective"}),
    "capacity": (
        "moe-tp1pp1dp1sp2ep2-z1 moe-tp1pp2dp2ep2-z1 moe-tp2pp1dp1-cut-z1 gptmoe-tp1pp1dp2sp2ep4-z2",
        {"moe_train_capacity_factor": 1.0},
    ),
    "sigmoid": ("moe-tp2pp1dp2ep2-cut-z3", {"moe_router_score_function": "sigmoid"}),
    "sgd": ("moe-tp2pp1dp2ep2-z1", {"optimizer": "sgd"}),
    "lion": ("moe-tp1pp1dp2ep2-z3", {"optimizer": "lion", "lr": 2e-3}),
    "adagrad": ("moe-tp1pp1dp2ep2-z0", {"optimizer": "adagrad"}),
}
TABLE = [(name, cell(it)) for name, (cells, _) in CASES.items() for it in cells.split()]


@pytest.mark.parametrize("name, target", TABLE, ids=lambda it: it.name if isinstance(it, Cell) else it)
def test_as_in_one_process(name: str, target: Cell, run_of):
    flags = CASES[name][1]
    assert_near(run_of(target, **flags)[0], run_of(alone(target), **flags)[0])


def test_each_case_is_another_training(run_of):
    """The table above would pass if a flag had no effect: tokens are dropped, scores and optimizers are others."""
    usual = run_of(alone(cell("moe-tp1pp1dp1-z0")))[0]
    for name in ("capacity", "sigmoid", "sgd", "lion", "adagrad"):
        found = run_of(alone(cell("moe-tp1pp1dp1-z0")), **CASES[name][1])[0]
        assert max(abs(found.losses[step] - loss) for step, loss in usual.losses.items()) > 1e-5, name
    assert min(usual.grad_norms.values()) > 0.5, "clipping must have something to do"


@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_optimizers_of_matrices_are_refused(optimizer: str, data):
    with pytest.raises(RankFailure, match=f"--optimizer {optimizer} does not know experts"):
        run_ranks(1, train, line(data, cell("moe-tp1pp1dp1-z0"), optimizer=optimizer))


JITTERED = ("moe-tp1pp1dp2ep2-z3", "moe-tp2pp1dp1-z0", "moe-tp2pp1dp2ep2-cut-z1")


@pytest.mark.parametrize("target", map(cell, JITTERED), ids=lambda it: it.name)
def test_noise_of_the_router(target: Cell, run_of):
    """Equal on all tp ranks, whose copies would drift apart otherwise; and again where a block is recomputed."""
    flags = {"moe_router_jitter": 0.1, "hidden_dropout": 0.1, "iters": 2}
    once, again = run_of(target, **flags)[0], run_of(target, **flags, **FULL)[0]
    assert once == again
    assert once.losses != run_of(target, **{**flags, "moe_router_jitter": 0.0})[0].losses


@pytest.mark.parametrize(
    "target",
    map(cell, ("moe-tp2pp1dp2ep2-z1", "gptmoe-tp1pp2dp2ep2-z1", "moe-tp1pp1dp2ep2-z3")),
    ids=lambda it: it.name,
)
def test_offloaded_optimizer(target: Cell, run_of, tmp_path):
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}))
    assert_near(run_of(target, deepspeed_config=config)[0], run_of(alone(target))[0])


# -- low precision ----------------------------------------------------------------------------------------------------

LOW = {
    "bf16": ("moe-tp1pp1dp2ep2-z1 moe-tp2pp1dp2ep2-cut-z2 moe-tp2pp1dp2ep2-z3 gptmoe-tp1pp2dp2ep2-z1", BF16),
    "summed-in-fp32": (
        "moe-tp1pp1dp2ep2-z1 moe-tp2pp1dp2ep2-z1 moe-tp1pp2dp2ep2-z1 gptmoe-tp1pp2dp2ep2-z1",
        SUMMED_IN_FP32,
    ),
}
LOW_TABLE = [(name, cell(it)) for name, (cells, _) in LOW.items() for it in cells.split()]


@pytest.mark.parametrize("name, target", LOW_TABLE, ids=lambda it: it.name if isinstance(it, Cell) else it)
def test_in_bf16(name: str, target: Cell, run_of):
    """gptmoe's first stage has no experts, of which BF16_Optimizer would sum a norm on the other one alone."""
    assert_near_in_bf16(run_of(target, **LOW[name][1])[0], run_of(alone(target, True), **BF16)[0])


TWO_BLOCKS = {"num_layers": 2, "expert_interval": 2, "global_batch_size": 12, "iters": 6}
TIED = {
    "moe": ("gptmoe-tp1pp2dp4ep2-z1", {}),
    "moe-zero0": ("gptmoe-tp1pp2dp4ep2-z0", {}),
    "bf16": ("gptmoe-tp1pp2dp4-z1", BF16),
    "summed-in-fp32": ("gptmoe-tp1pp2dp4ep2-z1", SUMMED_IN_FP32),
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_weight_stays_one(name: str, run_of):
    """`train` takes the state's digest, which refuses copies that differ. Sums of more than two depend on their order,
    which is another one on each stage."""
    target, flags = cell(TIED[name][0]), TIED[name][1]
    is_low = bool(flags)
    found = run_of(target, **TWO_BLOCKS, **flags)[0]
    truth = run_of(alone(target, is_low), **TWO_BLOCKS, **(BF16 if is_low else {}))[0]
    (assert_near_in_bf16 if is_low else assert_near)(found, truth)


SCALED = {"fp16": True, "initial_loss_scale": 2.0**12, "hysteresis": 1, "moe_loss_coeff": 1.0, "iters": 4}
"""The router's losses weigh as much as the rest."""


def _in_fp16(rank: int, world_size: int, argv: list[str], fault: str = "") -> tuple[Curves, list]:
    """What was seen, and (loss scale, whether it was skipped) of each step. In the second one expert of the last
    expert-parallel rank overflows."""
    from megatron.training import loop

    allow_fp16()
    run = build(argv, rank, world_size)
    if fault == "router's losses unscaled":
        loop.backward_scale = lambda engine: 1.0 / engine.gradient_accumulation_steps()
    if run.live.context.ep_rank == run.live.context.ep_size - 1:
        experts = [p for name, p in run.live.engine.module.named_parameters() if "experts.dense_4h_to_h" in name]
        experts[-1].register_hook(lambda grad: grad * (torch.inf if run.progress.iteration == 1 else 1.0))
    loop.fit(run)
    return curves(run, None), [(step.loss_scale, step.is_skipped) for step in run.run_log.steps]


SCALED_CELLS = ("moe-tp1pp1dp2ep2-z1", "moe-tp2pp1dp2ep2-z2", "moe-tp1pp1dp2ep2-z3")


@pytest.mark.parametrize("target", map(cell, SCALED_CELLS), ids=lambda it: it.name)
def test_in_fp16(target: Cell, run_of):
    """The router's losses are scaled as the loss is; what overflows on one expert-parallel rank is skipped by all."""
    truth, seen = run_of(alone(target, True), _in_fp16, **SCALED)[0]
    assert seen == [(4096.0, False), (4096.0, True), (2048.0, False), (2048.0, False)]
    for found, seen_here in run_of(target, _in_fp16, **SCALED):
        assert seen_here == seen
        assert found.grad_norms[1] == pytest.approx(truth.grad_norms[1], rel=1e-3)
        for step, loss in truth.losses.items():
            assert found.losses[step] == pytest.approx(loss, abs=1e-3)
    whole = run_of(alone(target), moe_loss_coeff=1.0)[0]
    assert truth.grad_norms[1] == pytest.approx(whole.grad_norms[1], rel=1e-3)


def test_planted_fault_unscaled_losses_of_the_router(run_of):
    target = alone(cell("moe-tp1pp1dp1-z1"), True)
    right, wrong = (run_of(target, _in_fp16, args, **SCALED)[0][0] for args in ((), ("router's losses unscaled",)))
    assert abs(wrong.grad_norms[1] / right.grad_norms[1] - 1) > 5e-3


# -- a rank without tokens --------------------------------------------------------------------------------------------


def _starved(rank: int, world_size: int, argv: list[str]) -> tuple[Curves, int]:
    """A router of zeros sends every token to the same expert. With it, how many rows came to this rank's experts."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    from megatron.layers.experts import Experts
    from megatron.training.loop import fit

    run = build(argv, rank, world_size)
    module, rows = run.live.engine.module, [0]
    routers = [param for name, param in module.named_parameters() if name.endswith("router.weight")]
    with GatheredParameters(routers, modifier_rank=0), torch.no_grad():
        for param in routers:
            param.zero_()
    for layer in module.modules():
        if isinstance(layer, Experts):
            layer.register_forward_pre_hook(lambda _, inputs: rows.append(sum(inputs[1])))
    fit(run)
    return curves(run, None), sum(rows)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_rank_that_no_token_comes_to(zero: int, run_of):
    target = Cell(dp=2, ep=2, zero=zero, model="moe")
    flags = {"num_experts": 2, "topk": 1, "frozen": ("*.router.weight",), "bf16": zero == 2}
    (found, rows), (_, others) = run_of(target, _starved, **flags)
    truth, all_rows = run_of(alone(target, zero == 2), _starved, **flags)[0]
    assert sorted((rows, others)) == [0, all_rows]
    (assert_near_in_bf16 if zero == 2 else assert_near)(found, truth)


# -- frozen -----------------------------------------------------------------------------------------------------------

FROZEN = {
    "experts": ("layers.*.mlp.experts.*",),
    "experts-of-the-first-stage": ("layers.1.mlp.experts.*",),
    "one-of-their-matrices": ("layers.*.mlp.experts.dense_h_to_4h",),
    "all-but-experts": (
        "embedding.*",
        "*norm*",
        "*attention*",
        "*lm_head*",
        "*router*",
        "*shared*",
        "layers.[02].mlp*",
    ),
}
CLIPPED = {"clip_grad": 0.005}
"""Below the norm of the experts' gradients alone, which is a hundredth of all. Where they alone are trained, it is the
norm, and nothing can hide in it."""
FROZEN_CELLS = {
    "moe-tp1pp1dp2ep2-z0": FROZEN,
    "moe-tp2pp1dp2ep2-z1": ("experts", "all-but-experts"),
    "moe-tp1pp2dp2ep2-z1": ("experts-of-the-first-stage", "one-of-their-matrices", "all-but-experts"),
    "moe-tp2pp1dp2ep2-z3": ("experts", "experts-of-the-first-stage", "all-but-experts"),
}
FROZEN_TABLE = [(how, cell(name)) for name, ways in FROZEN_CELLS.items() for how in ways]


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """(native folder, universal folder, what was seen), each made once."""
    made: dict[tuple, tuple[Path, Path, Curves]] = {}

    def get(target: Cell, how: str) -> tuple[Path, Path, Curves]:
        if (target, how) not in made:
            folder = tmp_path_factory.mktemp(how)
            argv = line(data, target, FROZEN[how], save=folder, **CLIPPED)
            seen = run_ranks(target.world_size, train, argv, timeout=60)[0]
            native, universal = folder / f"global_step{NUM_STEPS}", folder / "universal"
            convert(native, universal, num_workers=1)
            made[target, how] = native, universal, seen
        return made[target, how]

    return get


@pytest.mark.parametrize("how, target", FROZEN_TABLE, ids=lambda it: it.name if isinstance(it, Cell) else it)
def test_frozen_as_in_one_process(how: str, target: Cell, saved, run_of):
    found, truth = saved(target, how)[2], run_of(alone(target), frozen=FROZEN[how], **CLIPPED)[0]
    assert_near(found, truth)
    is_frozen = {name for name, digests in truth.digests.items() if set(digests) == {"fp32"}}
    assert is_frozen and len(is_frozen) < len(truth.digests)
    for name in is_frozen:
        assert found.digests[name] == truth.digests[name], name


@pytest.mark.parametrize("target", map(cell, FROZEN_CELLS), ids=lambda it: it.name)
@pytest.mark.parametrize("how", ["experts", "experts-of-the-first-stage"])
def test_frozen_any_to_any(how: str, target: Cell, saved, data):
    sources = [cell(name) for name, ways in FROZEN_CELLS.items() if how in ways]
    plans = [(kind, str(saved(source, how)[i])) for source in sources for i, kind in enumerate(("direct", "universal"))]
    for by_rank in run_ranks(target.world_size, take_all, line(data, target, FROZEN[how]), plans):
        for found, (source, _) in zip(by_rank, ((s, i) for s in sources for i in range(2)), strict=True):
            assert found.digests == saved(source, how)[2].digests, source.name


ONLY_EXPERTS = {"frozen": FROZEN["all-but-experts"], **CLIPPED}


@pytest.mark.parametrize("target", map(cell, ("moe-tp2pp1dp2ep2-z1", "moe-tp1pp2dp2ep2-z1")), ids=lambda it: it.name)
def test_frozen_with_sums_in_fp32(target: Cell, run_of):
    """Of what is not experts there is nothing to train, and BF16_Optimizer stops at an empty norm."""
    found, truth = (
        run_of(target, **ONLY_EXPERTS, **SUMMED_IN_FP32)[0],
        run_of(alone(target, True), **ONLY_EXPERTS, **BF16)[0],
    )
    assert_near_in_bf16(found, truth)
    assert min(truth.grad_norms.values()) > 2 * CLIPPED["clip_grad"]


def _without_word_of_tp(rank: int, world_size: int, argv: list[str]) -> Curves:
    from deepspeed.utils import groups

    from megatron.training.loop import fit

    run = build(argv, rank, world_size)
    groups.expert_tensor_parallel_world_size = 1
    fit(run)
    return curves(run, None)


def test_planted_fault_a_norm_without_the_other_tp_ranks_experts(run_of):
    target = cell("moe-tp2pp1dp2ep2-z1")
    truth = run_of(alone(target, True), **ONLY_EXPERTS, **BF16)[0]
    found = run_of(target, _without_word_of_tp, **ONLY_EXPERTS, **SUMMED_IN_FP32)[0]
    assert found.grad_norms[1] / truth.grad_norms[1] < 0.9
