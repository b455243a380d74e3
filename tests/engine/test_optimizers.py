"""Every optimizer trains as plain torch does, under every topology, and its state goes on under every other.

The truth of a trajectory is a loop over the same batches in one process: torch's own optimizer, or the paper's
equations written out. A resume is proven by digests (bitwise) and by the losses of the run that never stopped; the
Target is full of noise before. What cannot be carried, or would train differently elsewhere, must be refused by name.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from harness.ranks import RankFailure, run_ranks
from matrix.cells import Cell
from matrix.recording import build, command_line, train
from matrix.taking import take_all
from megatron.config.errors import ConfigError
from megatron.engine import optimizers
from megatron.engine.optimizer_probe import is_elementwise, kept_states
from megatron.ucp.convert import convert
from megatron.ucp.diff import diff
from megatron.ucp.manifest import manifest_bytes
from megatron.ucp.verify import verify

NUM_STEPS, HALF = 6, 3
CONSTANT = {"lr_decay_style": "constant", "lr_warmup_iters": 0}
FLAGS = {
    "decoupled": {"decoupled_lr": 3e-2, "decoupled_min_lr": 2e-3},
    "lion": {"optimizer": "lion", "lr": 2e-3},
    "adagrad": {"optimizer": "adagrad"},
    "muon": {"optimizer": "muon"},
    # Relative to the weights' own size.
    "adafactor": {"optimizer": "adafactor", "lr": 0.5},
}


# -- one step, against equations ------------------------------------------------------------------------------------


def _steps(optimizer: torch.optim.Optimizer, param: torch.nn.Parameter, num_steps: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return param.detach()


def _first(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def test_lion_against_the_papers_equations():
    lr, beta1, beta2, decay = 1e-2, 0.9, 0.99, 0.1
    theta, m = _first(7).detach().double(), torch.zeros(7, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        g = torch.randn(7, generator=generator).double()
        c = beta1 * m + (1 - beta1) * g
        theta = theta - lr * (torch.sign(c) + decay * theta)
        m = beta2 * m + (1 - beta2) * g
    param = _first(7)
    ours = _steps(optimizers.Lion([param], lr, (beta1, beta2), decay), param)
    assert torch.allclose(ours.double(), theta, atol=1e-6)


def test_adagrad_against_torch():
    ours, theirs = _first(5, 3), _first(5, 3)
    _steps(optimizers.Adagrad([ours], 1e-2, weight_decay=0.1), ours)
    _steps(torch.optim.Adagrad([theirs], 1e-2, weight_decay=0.1), theirs)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(6, 6), (12, 4), (4, 12)], ids=str)
def test_muon_against_torch(shape):
    ours, theirs = _first(*shape), _first(*shape)
    groups = [{"name": "matrices", "params": [ours]}]
    _steps(optimizers.Muon(groups, torch.bfloat16, 0.95, lr=1e-2, weight_decay=0.1), ours)
    _steps(torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), theirs)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_muon_refuses_pieces_of_matrices_that_nobody_put_together():
    flat = _first(12)
    optimizer = optimizers.Muon([{"name": "matrices", "params": [flat]}], torch.float32, 0.95, lr=1e-2)
    with pytest.raises(optimizers.NotAttachedError, match=r"shape \(12,\)"):
        _steps(optimizer, flat)


# -- trajectories, against plain torch ------------------------------------------------------------------------------


def _quintic(matrix: torch.Tensor) -> torch.Tensor:
    """Muon's orthogonalisation as its author describes it, in double precision, of one plain matrix."""
    x = matrix / matrix.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return x * 0.2 * math.sqrt(max(matrix.shape))


class _MuonTruth:
    def __init__(self, named, lr: float, decay: float) -> None:
        self.lr, self.decay = lr, decay
        self.matrices = {n: p for n, p in named.items() if n.startswith("layers") and p.dim() == 2}
        self.momenta = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in self.matrices.items()}
        self.others = _torch_adamw({n: p for n, p in named.items() if n not in self.matrices}, lr, decay)

    def step(self) -> None:
        self.others.step()
        for name, param in self.matrices.items():
            g, m = param.grad.double(), self.momenta[name]
            m.copy_(0.95 * m + 0.05 * g)
            blend = 0.95 * m + 0.05 * g
            parts = blend.chunk(3) if "query_key_value" in name else [blend]
            update = torch.cat([_quintic(part) for part in parts])
            param.data.copy_(param.data.double() * (1 - self.lr * self.decay) - self.lr * update)


class _LionTruth:
    def __init__(self, named, lr: float, decay: float) -> None:
        self.lr, self.decay = lr, decay
        self.params = [(p, torch.zeros_like(p), decay if p.dim() > 1 else 0.0) for p in named.values()]

    def step(self) -> None:
        for param, m, decay in self.params:
            c = 0.9 * m + 0.1 * param.grad
            param.data = param.data - self.lr * (torch.sign(c) + decay * param.data)
            m.copy_(0.99 * m + 0.01 * param.grad)


def _split(named, decay: float) -> list[dict]:
    matrices = [p for p in named.values() if p.dim() > 1]
    vectors = [p for p in named.values() if p.dim() == 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def _torch_adamw(named, lr: float, decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_split(named, decay), lr=lr)


def _decoupled(named, lr: float, decay: float) -> torch.optim.Optimizer:
    words = "embedding.word_embeddings.weight"
    groups = _split({n: p for n, p in named.items() if n != words}, decay)
    return torch.optim.AdamW([*groups, {"params": [named[words]], "weight_decay": decay, "lr": 3e-2}], lr=lr)


TRUTHS = {
    "decoupled": _decoupled,
    "lion": _LionTruth,
    "adagrad": lambda named, lr, decay: torch.optim.Adagrad(_split(named, decay), lr=lr),
    "muon": _MuonTruth,
    "adafactor": lambda named, lr, decay: torch.optim.Adafactor(_split(named, decay), lr=lr),
}


def _plain_losses(rank: int, world_size: int, argv: list[str], name: str) -> dict[int, float]:
    """No engine, no schedule, no group of ours: the model, the batches, and a loop."""
    run = build(argv, rank, world_size)
    model, optimizer = run.live.engine.module, run.config.optimizer
    named = dict(model.named_parameters())
    truth = TRUTHS[name](named, optimizer.lr, optimizer.weight_decay)
    batches, losses = run.batches.train(0), {}
    for step in range(1, NUM_STEPS + 1):
        micro = [next(batches) for _ in range(run.config.run.global_batch_size)]
        model.zero_grad()
        each = [model(b["tokens"], b["labels"], b["loss_mask"]) for b in micro]
        mean = sum(each) / len(each)
        mean.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), optimizer.clip_grad)
        truth.step()
        losses[step] = float(mean)
    return losses


ELEMENTWISE = (Cell(dp=2, zero=1), Cell(tp=2, zero=1))
ALIKE = {
    "decoupled": (Cell(dp=2, zero=1), Cell(dp=2, zero=3)),
    "lion": ELEMENTWISE,
    "adagrad": ELEMENTWISE,
    "muon": (*ELEMENTWISE, Cell(dp=2), Cell(dp=2, zero=2), Cell(dp=2, zero=3), Cell(tp=2, pp=2, zero=1)),
    "adafactor": (Cell(dp=2), Cell(pp=2)),
}


@pytest.mark.parametrize("name", TRUTHS)
def test_the_same_training_as_plain_torch_under_every_topology(name: str, data):
    flags = {"iters": NUM_STEPS, **FLAGS[name], **CONSTANT}
    truth = run_ranks(1, _plain_losses, command_line(data, no_pipeline_parallel=True, **flags), name)[0]
    assert truth[NUM_STEPS] < truth[1] - 0.05
    for cell in ALIKE[name]:
        losses = run_ranks(cell.world_size, train, command_line(data, **cell.flags, **flags))[0].losses
        assert losses == pytest.approx(truth, abs=1e-5), cell.name


def _train_without_sums(rank: int, world_size: int, argv: list[str]) -> dict[int, float]:
    """Every rank orthogonalises what its own ZeRO partition has of a matrix."""
    import torch.distributed as dist

    dist.reduce = lambda *args, **kwargs: None
    return train(rank, world_size, argv).losses


def test_planted_fault_muon_of_partitions(data):
    flags = {"iters": NUM_STEPS, **FLAGS["muon"], **CONSTANT}
    argv = command_line(data, zero=1, **flags)
    right = run_ranks(2, train, argv)[0].losses
    wrong = run_ranks(2, _train_without_sums, argv)[0]
    assert abs(wrong[NUM_STEPS] - right[NUM_STEPS]) > 1e-3


# -- resuming -------------------------------------------------------------------------------------------------------

SOURCE = Cell(dp=2, zero=1)
TARGETS = (Cell(), Cell(dp=2, zero=3), Cell(tp=2, zero=1))


def _source(folder: Path, data: Path, cell: Cell, **flags) -> tuple[list[tuple[str, str]], dict, dict[int, float]]:
    """(plans for a Target, digests at the save, losses of the run that never stopped)."""
    argv = command_line(data, **cell.flags, iters=NUM_STEPS, save=folder, save_interval=HALF, **flags)
    whole = run_ranks(cell.world_size, train, argv)[0]
    native, universal = folder / f"global_step{HALF}", folder / f"global_step{HALF}_universal"
    convert(native, universal, num_workers=1)
    assert verify(native).is_sound and verify(universal).is_sound
    assert diff(native, universal, trust_digests=False).is_equal
    digests = json.loads((native / "ucp.json").read_text())["digests"]
    return [("direct", str(native)), ("universal", str(universal))], digests, whole.losses


def _saving(folder: Path) -> list[str]:
    return ["--exit-interval", str(HALF), "--save", str(folder), "--save-interval", "1000"]


def _resume(cell: Cell, argv: list[str], plans, digests: dict, losses: dict[int, float]) -> None:
    """Each plan into noise, then on from the last."""
    for taken in run_ranks(cell.world_size, take_all, argv, plans, None, True):
        assert [each.digests for each in taken] == [digests] * len(plans), cell.name
        assert all(each.iteration == HALF for each in taken)
        after = {step: losses[step] for step in range(HALF + 1, NUM_STEPS + 1)}
        assert taken[-1].losses == pytest.approx(after, abs=5e-6), cell.name


STATES = {
    "decoupled": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "adagrad": ("sum",),
    "muon": ("momentum_buffer",),
}


@pytest.mark.parametrize("name", STATES)
def test_goes_on_under_another_topology(name: str, data, tmp_path):
    plans, digests, losses = _source(tmp_path, data, SOURCE, **FLAGS[name])
    assert set(digests["layers.0.mlp.dense_4h_to_h.weight"]) == {"fp32", *STATES[name]}
    for cell in TARGETS:
        argv = command_line(data, **cell.flags, iters=NUM_STEPS, **FLAGS[name])
        _resume(cell, argv, plans, digests, losses)


def test_adafactor_carries_its_factored_states_whole(data, tmp_path):
    plans, digests, losses = _source(tmp_path, data, Cell(dp=2), **FLAGS["adafactor"])
    assert set(digests["layers.0.mlp.dense_4h_to_h.weight"]) == {"fp32", "row_var", "col_var"}
    assert set(digests["final_norm.bias"]) == {"fp32", "variance"}
    for cell in (Cell(), Cell(pp=2)):
        argv = command_line(data, **cell.flags, iters=NUM_STEPS, **FLAGS["adafactor"])
        _resume(cell, argv, plans, digests, losses)


def _in_json(folder: Path, kind: str, stage: int, **params) -> dict[str, Path]:
    """The flag for a DeepSpeed JSON that names an optimizer."""
    path = folder / f"{kind}-{stage}.json"
    block = {"type": kind, "params": params}
    path.write_text(json.dumps({"optimizer": block, "zero_optimization": {"stage": stage}}))
    return {"deepspeed_config": path}


def test_numbers_of_the_optimizer_are_carried_by_name(data, tmp_path):
    """NAdam's product of its momenta: DeepSpeed builds it from its JSON, and nothing here knows it."""
    plans, digests, losses = _source(tmp_path / "save", data, SOURCE, **_in_json(tmp_path, "NAdam", 1))
    for cell in (Cell(), Cell(dp=2, zero=3)):
        argv = command_line(data, **cell.flags, iters=NUM_STEPS, **_in_json(tmp_path, "NAdam", cell.zero))
        _resume(cell, argv, plans, digests, losses)
    # Without it the load is refused, by name; with another the losses go elsewhere.
    manifest = Path(plans[1][1]) / "ucp.json"
    known = json.loads(manifest.read_text())
    argv = command_line(data, iters=NUM_STEPS, **_in_json(tmp_path, "NAdam", 0))
    for info in known["parameters"].values():
        info["scalars"]["mu_product"] *= 0.5
    manifest.write_bytes(manifest_bytes(known))
    elsewhere = run_ranks(1, take_all, argv, plans[1:], None, True)[0][0]
    assert abs(elsewhere.losses[NUM_STEPS] - losses[NUM_STEPS]) > 1e-4
    for info in known["parameters"].values():
        info["scalars"] = {}
    manifest.write_bytes(manifest_bytes(known))
    with pytest.raises(RankFailure, match=r"'mu_product'\] are needed, the Source has \['exp_avg', 'exp_avg_sq'\]"):
        run_ranks(1, take_all, argv, plans[1:])


@pytest.mark.parametrize("kind", ["AdamW", "Adagrad", "Lion"])
def test_optimizers_of_the_deepspeed_json(kind: str, data, tmp_path):
    """The same as the flag's, groups and all: stock DeepSpeed's Adagrad forgets which group does not decay."""
    params = {"AdamW": {"torch_adam": True}, "Adagrad": {"eps": 1e-10}, "Lion": {}}[kind]
    flag = {"AdamW": "adam"}.get(kind, kind.lower())
    by_flag = run_ranks(2, train, command_line(data, zero=1, lr=2e-3, optimizer=flag, fused_kernels="torch"))[0]
    by_json = run_ranks(2, train, command_line(data, zero=1, lr=2e-3, **_in_json(tmp_path, kind, 1, **params)))[0]
    assert (by_json.losses, by_json.digests) == (by_flag.losses, by_flag.digests)


# -- where an Adam counts its steps ---------------------------------------------------------------------------------


class _Adam(torch.optim.Optimizer):
    """AdamW's equations, its steps counted somewhere."""

    def __init__(self, groups, lr: float = 1e-2, weight_decay: float = 0.1) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for param in params:
                if "exp_avg" not in self.state[param]:
                    self.make(group, self.state[param], param)
            if params:
                step = self.count(group, [self.state[p] for p in params])
            for param, number in zip(params, step if isinstance(step, list) else [step] * len(params)):
                m, v = self.state[param]["exp_avg"], self.state[param]["exp_avg_sq"]
                m.lerp_(param.grad, 0.1)
                v.mul_(0.999).addcmul_(param.grad, param.grad, value=0.001)
                size = group["lr"] / (1 - 0.9**number)
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.addcdiv_(m, (v / (1 - 0.999**number)).sqrt().add_(1e-8), value=-size)

    def make(self, group, state, param) -> None:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)


class CountsInNumbers(_Adam):
    """As DeepSpeedCPUAdam: a Python number for each tensor."""

    def make(self, group, state, param) -> None:
        super().make(group, state, param)
        state["step"] = 0

    def count(self, group, states) -> list[int]:
        for state in states:
            state["step"] += 1
        return [state["step"] for state in states]


class CountsInTheGroup(_Adam):
    """As Apex's FusedAdam."""

    def count(self, group, states) -> int:
        group["step"] = group.get("step", 0) + 1
        return group["step"]


class CountsInTheLast(_Adam):
    """As DeepSpeed's FusedAdam: for all tensors of a group in the state of the last."""

    def make(self, group, state, param) -> None:
        super().make(group, state, param)
        state["step"] = group.setdefault("step", 0)

    def count(self, group, states) -> int:
        states[-1]["step"] += 1
        return states[-1]["step"]


class KeepsAHistogram(CountsInNumbers):
    """A state that is neither the parameter's shape nor a number."""

    def make(self, group, state, param) -> None:
        super().make(group, state, param)
        state["histogram"] = torch.zeros(3)


class TrustsRatios(CountsInNumbers):
    """As LAMB and LARS: a step as large as the tensor that is stepped."""

    def step(self, closure=None) -> None:
        before = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}
        super().step(closure)
        with torch.no_grad():
            for param, old in before.items():
                param.copy_(old + (param - old) * old.norm() / (param - old).norm().clamp(min=1e-12))


STAND_INS = {c.__name__: c for c in (CountsInNumbers, CountsInTheGroup, CountsInTheLast, KeepsAHistogram, TrustsRatios)}


def _with_stand_in(rank: int, world_size: int, kind: str | None, body: str, *arguments):
    """Another rank body, with --optimizer adam being a stand-in."""
    from megatron.engine import engine

    if kind is not None:
        engine.build_optimizer = lambda config, groups, *_: STAND_INS[kind](groups)
    return {"train": train, "take_all": take_all, "save": _save_at_the_end}[body](rank, world_size, *arguments)


HOMES = {"CountsInNumbers": "state", "CountsInTheGroup": "group", "CountsInTheLast": "last"}


@pytest.mark.parametrize("kind", HOMES)
def test_the_step_is_found_wherever_an_adam_counts_it(kind: str, data, tmp_path):
    """To torch's AdamW and back, through a run of theirs under ZeRO-0, where a group has many tensors."""
    flags = {"iters": NUM_STEPS}
    whole = run_ranks(1, train, command_line(data, **flags))[0].losses
    params = [_first(3), _first(4)]
    optimizer = STAND_INS[kind]([{"params": params}])
    assert kept_states(optimizer, optimizer.param_groups[0], params[0]).step_home == HOMES[kind]
    assert not optimizer.state and "step" not in optimizer.param_groups[0]
    journey = ((None, Cell(zero=1), 2), (kind, Cell(), 4), (None, Cell(zero=1), NUM_STEPS))
    load: list[str] = []
    for number, (by, cell, until) in enumerate(journey):
        save = tmp_path / str(number)
        argv = [*command_line(data, **cell.flags, **flags, exit_interval=until, save=save), *load]
        losses = run_ranks(1, _with_stand_in, by, "train", argv)[0].losses
        assert losses == pytest.approx({step: whole[step] for step in losses}, abs=2e-6)
        saved = json.loads((save / f"global_step{until}" / "ucp.json").read_text())
        assert {info["step"] for info in saved["parameters"].values()} == {float(until)}
        assert not any("step" in group for group in saved["optimizer"]["groups"].values())
        load = ["--load", str(save)]


# -- what cannot be carried, or would train differently, is refused -------------------------------------------------


def _save_at_the_end(rank: int, world_size: int, argv: list[str], folder: str):
    from megatron.checkpoint.saving import save
    from megatron.training.loop import fit

    run = build(argv, rank, world_size)
    progress = fit(run)
    save(run.live, Path(folder), progress)


HISTOGRAM = r"the state 'histogram' that KeepsAHistogram keeps of .* cannot be cut .*float32 of shape \(3,\) under .*"


def test_a_state_that_cannot_be_cut_is_refused_before_training(data, tmp_path):
    argv = command_line(data, zero=1, iters=2)
    for rank in (0, 1):  # on every rank
        with pytest.raises(RankFailure, match=rf"rank {rank} raised: UnsupportedOptimizerError: {HISTOGRAM}ZeRO-1"):
            run_ranks(2, _with_stand_in, "KeepsAHistogram", "train", [*argv, *_saving(tmp_path / "save")])
    assert len(run_ranks(2, _with_stand_in, "KeepsAHistogram", "train", argv)[0].losses) == 2
    with pytest.raises(RankFailure, match=HISTOGRAM):
        run_ranks(2, _with_stand_in, "KeepsAHistogram", "save", argv, str(tmp_path / "save"))
    assert not (tmp_path / "save").exists()


def test_a_state_of_another_shape_is_refused_at_the_load(data, tmp_path):
    argv = command_line(data, iters=2)
    run_ranks(1, _with_stand_in, "KeepsAHistogram", "train", [*argv, *_saving(tmp_path)])
    plan = [("direct", str(tmp_path / "global_step2"))]
    assert run_ranks(1, _with_stand_in, "KeepsAHistogram", "take_all", argv, plan)[0][0].iteration == 2
    with pytest.raises(RankFailure, match=HISTOGRAM):
        run_ranks(2, _with_stand_in, "KeepsAHistogram", "take_all", command_line(data, zero=1, iters=2), plan)
    with pytest.raises(RankFailure, match=r"\['exp_avg', 'exp_avg_sq'\] are needed, .* 'histogram'\]"):
        run_ranks(1, take_all, argv, plan)


def test_arithmetic_that_depends_on_the_cut_is_refused(data):
    param = _first(6)
    for kind, is_fine in (("CountsInTheLast", True), ("TrustsRatios", False)):
        optimizer = STAND_INS[kind]([{"params": [param], "name": "decay"}])
        assert is_elementwise(optimizer, optimizer.param_groups[0], param) is is_fine
    assert len(run_ranks(2, _with_stand_in, "TrustsRatios", "train", command_line(data, iters=2))[0].losses) == 2
    for flags in ({"zero": 1}, {"tp": 2}):
        with pytest.raises(RankFailure, match="TrustsRatios steps a part of a parameter in another way than the whole"):
            run_ranks(2, _with_stand_in, "TrustsRatios", "train", command_line(data, **flags, iters=2))


@pytest.mark.parametrize(
    "flags, told",
    [
        ({"optimizer": "adafactor", "zero": 1}, "Adafactor needs whole matrices"),
        ({"optimizer": "adafactor", "tp": 2}, "--tensor-model-parallel-size 2 --zero-stage 0 in fp32"),
        ({"optimizer": "adafactor", "bf16": True}, "bf16 and fp16 are run under ZeRO-1"),
        ({"optimizer": "muon", "num_experts": 4}, "muon does not know experts"),
        ({"decoupled_lr": 1e-4}, "from --decoupled-lr 0.0001 to 0.001"),
        ({"decoupled_min_lr": 1e-4}, "--decoupled-min-lr without --decoupled-lr"),
        ({"optimizer": "lion", "lion_beta2": 1.0}, "--lion-beta2 is out of range"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_refused_before_there_is_a_process_group(flags: dict, told: str, data):
    from megatron.config.arguments import parse

    with pytest.raises(ConfigError, match=told):
        parse(command_line(data, **flags)).config.validate(2)


# -- parameter groups -----------------------------------------------------------------------------------------------


def _groups(rank: int, world_size: int, argv: list[str], plans) -> list[dict]:
    """By group name: (lr, weight decay) after each load, and what the optimizer uses in the step that follows."""
    from megatron.checkpoint.loading import load
    from megatron.checkpoint.resume import ResumePlan, open_planned
    from megatron.training.loop import fit

    run = build(argv, rank, world_size)
    used: dict[str, set] = {}
    step = type(run.live.state.base).step

    def spied(optimizer, *args, **kwargs):
        for group in optimizer.param_groups:
            if group["params"]:
                used.setdefault(group["name"], set()).add((group["lr"], group["weight_decay"]))
        return step(optimizer, *args, **kwargs)

    found = []
    for kind, folder in plans:
        for group in run.live.state.base.param_groups:
            group |= {"lr": 7.0, "weight_decay": 7.0, "betas": (0.7, 0.7)}
        run.progress = load(run.live, open_planned(ResumePlan(kind, Path(folder), "")))
        groups = run.live.state.base.param_groups
        found.append({g["name"]: (g["lr"], g["weight_decay"], g["betas"]) for g in groups})
    type(run.live.state.base).step = spied
    fit(run)
    return [*found, used]


def test_two_param_groups_under_zero3_each_keeps_its_own_weight_decay_and_lr(data, tmp_path):
    """Stock DeepSpeed gives the first group's to all (zero/stage3.py, load_hp_checkpoint_state_from_checkpoint_dir)."""
    flags = {"iters": HALF + 1, "exit_interval": 1000, **CONSTANT, **FLAGS["decoupled"], "adam_beta2": 0.99}
    argv = command_line(data, zero=3, save=tmp_path, **{**flags, "exit_interval": HALF})
    run_ranks(2, train, argv)
    universal = tmp_path / f"global_step{HALF}_universal"
    convert(tmp_path / f"global_step{HALF}", universal, num_workers=1)
    plans = [("direct", str(tmp_path / f"global_step{HALF}")), ("universal", str(universal))]
    own = {"decay": (1e-2, 0.1), "no_decay": (1e-2, 0.0), "decoupled": (3e-2, 0.1)}
    # Two stages lack the group of the word embedding: what a group has does not depend on its index.
    for cell in (Cell(dp=2, zero=3), Cell(dp=2, zero=1), Cell(pp=4, zero=1)):
        by_rank = run_ranks(cell.world_size, _groups, command_line(data, **cell.flags, **flags), plans)
        for *loaded, used in by_rank:
            for groups in loaded:
                assert groups == {name: (*own[name], (0.9, 0.99)) for name in groups}
            assert used == {name: {own[name]} for name in loaded[0]}
        assert {name for *_, used in by_rank for name in used} == set(own)
    assert "decoupled" not in by_rank[1][0]  # a middle stage


def _first_group_for_all(rank: int, world_size: int, argv: list[str], plans):
    """As stock DeepSpeed's ZeRO-3 does on a universal load."""
    from megatron.engine.engine_state import EngineState

    restore = EngineState.set_hyper_parameters

    def first_for_all(state, groups) -> None:
        first = groups[state.base.param_groups[0]["name"]]
        restore(state, {group["name"]: first for group in state.base.param_groups})

    EngineState.set_hyper_parameters = first_for_all
    return take_all(rank, world_size, argv, plans, None, True)[0].losses


def test_planted_fault_the_first_groups_values_for_all(data, tmp_path):
    argv = command_line(data, zero=3, iters=NUM_STEPS, weight_decay=2.0)
    right = run_ranks(2, train, argv)[0].losses
    run_ranks(2, train, [*argv, *_saving(tmp_path)])
    plan = [("direct", str(tmp_path / f"global_step{HALF}"))]
    wrong = run_ranks(2, _first_group_for_all, argv, plan)[0]
    assert abs(wrong[NUM_STEPS] - right[NUM_STEPS]) > 1e-5


def test_a_group_that_the_source_lacks_is_named(data, tmp_path):
    flags = {"iters": NUM_STEPS}
    run_ranks(1, train, [*command_line(data, **flags), *_saving(tmp_path)])
    argv = command_line(data, **flags, **FLAGS["decoupled"], load=tmp_path)
    with pytest.raises(RankFailure, match=r"groups the Source lacks: \['decoupled'\] \(it has \['decay', 'no_decay'\]"):
        run_ranks(1, train, argv)
    curves = run_ranks(1, train, [*argv, "--override-opt_param-scheduler"])[0]
    assert sorted(curves.losses) == [4, 5, 6]
