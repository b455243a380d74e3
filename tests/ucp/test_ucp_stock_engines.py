"""What we convert, in stock DeepSpeed engines: every ZeRO stage to every other, on another number of ranks.

Both programs are plain `deepspeed.initialize` over a `torch.nn.Module`. The truth is the state of the saving engine,
gathered from the live tensors before the save.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from harness.ranks import run_ranks
from matrix.stock import stock_convert
from megatron.ucp.convert import convert
from megatron.ucp.diff import diff
from megatron.ucp.errors import UcpError
from megatron.ucp.sources import open_source
from megatron.ucp.sources.foreign.universal import STAGE3_MODEL
from megatron.ucp.sources.universal import OPTIMIZER_FILE
from megatron.ucp.verify import verify

BATCH, WIDTH, STEPS = 12, 20, 3
TAG = "global_step3"
STATES = ("exp_avg", "exp_avg_sq")


class Net(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, 7, bias=False)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(x)


@dataclass
class Seen:
    state: dict = field(default_factory=dict)
    """(name, "fp32" or a moment) -> tensor"""
    steps: set = field(default_factory=set)
    groups: list = field(default_factory=list)
    loss: float = 0.0
    loss_scale: float = 1.0


def _engine(stage: int, world_size: int, seed: int, with_groups: bool, lr: float, more: dict):
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if "fp16" in more:  # the CPU can add in it, DeepSpeed only thinks that it should not
        get_accelerator().is_fp16_supported = lambda: True
    net = Net(seed)
    parameters = list(net.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups if with_groups else parameters, lr=lr)
    config = {"train_micro_batch_size_per_gpu": BATCH // world_size, "zero_optimization": {"stage": stage}, **more}
    config["zero_optimization"] |= {"stage": stage}
    return deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]


def _batch(step: int, rank: int, world_size: int) -> torch.Tensor:
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step)).chunk(world_size)[rank]


def _step(engine, step: int, rank: int, world_size: int) -> float:
    batch = _batch(step, rank, world_size).to(next(engine.module.parameters()).dtype)
    loss = (engine(batch).float() - 1).square().mean()
    engine.backward(loss)
    engine.step()
    mean = loss.detach().clone()
    torch.distributed.all_reduce(mean)
    return float(mean) / world_size


def _seen(engine) -> Seen:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    seen = Seen()
    stage = engine.zero_optimization_stage()
    base = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    names = {param: name for name, param in engine.module.named_parameters()}
    if stage == 0:
        for param, name in names.items():
            seen.state[name, "fp32"] = param.detach().clone()
            seen.state |= {(name, key): base.state[param][key].clone() for key in STATES}
    elif stage == 3:
        for param, name in names.items():
            seen.state[name, "fp32"] = safe_get_full_fp32_param(param).clone()
            seen.state |= {(name, key): safe_get_full_optimizer_state(param, key).clone() for key in STATES}
    else:  # DeepSpeed's accessors know the moments of the first parameter group only
        for flat, group in zip(engine.optimizer.single_partition_of_fp32_groups, engine.optimizer.bit16_groups):
            for key in ("fp32", *STATES):
                part = flat.detach() if key == "fp32" else base.state[flat][key]
                parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size())]
                torch.distributed.all_gather(parts, part.contiguous())
                whole = torch.cat(parts)[: sum(p.numel() for p in group)]
                for param, values in zip(group, whole.split([p.numel() for p in group])):
                    seen.state[names[param], key] = values.view(param.shape).clone()
    seen.steps = {float(state["step"]) for state in base.state.values()}
    seen.loss_scale = float(engine.optimizer.loss_scale) if stage else 1.0
    seen.groups = [(group["lr"], group["weight_decay"]) for group in base.param_groups]
    return seen


def _save(rank: int, world_size: int, folder: str, stage: int, with_groups: bool, more: dict):
    engine = _engine(stage, world_size, 0, with_groups, 1e-2, more)
    for step in range(STEPS):
        _step(engine, step, rank, world_size)
    seen = _seen(engine)
    engine.save_checkpoint(folder, tag=TAG)
    seen.loss = _step(engine, STEPS, rank, world_size)
    return seen


def _load(rank: int, world_size: int, folder: str, stage: int, with_groups: bool, more: dict | None = None):
    """Into an engine of other weights and another learning rate, that has already taken a step."""
    more = {"checkpoint": {"load_universal": True}, "zero_optimization": {}} | (more or {})
    engine = _engine(stage, world_size, 7, with_groups, 3e-4, more)
    _step(engine, 50, rank, world_size)
    path, _ = engine.load_checkpoint(folder, tag=f"{TAG}_universal")
    assert path is not None and engine.global_steps == STEPS
    seen = _seen(engine)
    seen.loss = _step(engine, STEPS, rank, world_size)
    return seen


SOURCES = {
    "zero0": (0, {}),
    "zero1": (1, {}),
    "zero2": (2, {}),
    "zero3": (3, {}),
    "zero3-by-stock": (3, {}),
    "zero1-elastic": (1, {"zero_optimization": {"elastic_checkpoint": True}}),
    "zero2-elastic": (2, {"zero_optimization": {"elastic_checkpoint": True}}),
}


@pytest.fixture(scope="module", params=[True, False], ids=["groups", "one-group"])
def with_groups(request) -> bool:
    return request.param


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory, with_groups) -> tuple[Path, Seen, str]:
    stage, more = SOURCES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    more = {"zero_optimization": {}} | more
    seen = run_ranks(2, _save, str(folder), stage, with_groups, more)[0]
    native = folder / TAG
    if "by-stock" in request.param:  # DeepSpeed's own universal folder, converted again
        run_ranks(1, stock_convert, str(folder / TAG), str(folder / "theirs"))
        native = folder / "theirs"
    convert(native, folder / f"{TAG}_universal", num_workers=1)
    return folder, seen, request.param


@pytest.mark.parametrize("stage, world_size", [(1, 3), (2, 1), (3, 3), (3, 1)])
def test_a_stock_engine_goes_on(source, stage: int, world_size: int, with_groups: bool):
    folder, saved, kind = source
    for found in run_ranks(world_size, _load, str(folder), stage, with_groups):
        assert set(found.state) == set(saved.state)
        for key, tensor in saved.state.items():
            assert torch.equal(found.state[key], tensor), key
        assert found.steps == saved.steps == {float(STEPS)}
        assert found.loss == pytest.approx(saved.loss, abs=1e-6)
        if "elastic" in kind:  # such a save does not keep them
            assert [lr for lr, _ in found.groups] == [3e-4] * len(found.groups)
        elif stage == 3:  # stock sets the first group's values everywhere (stage3.py, load_hp_checkpoint_state...)
            assert found.groups == [saved.groups[0]] * len(found.groups)
        else:
            assert found.groups == saved.groups


PRECISIONS = {
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 8, "loss_scale_window": 2}},
}


@pytest.fixture(scope="module", params=[(1, "bf16"), (3, "bf16"), (1, "fp16"), (3, "fp16")], ids=str)
def half(request, tmp_path_factory) -> tuple[Path, Seen, dict]:
    stage, precision = request.param
    folder = tmp_path_factory.mktemp(f"{precision}-zero{stage}")
    more = PRECISIONS[precision]
    seen = run_ranks(2, _save, str(folder), stage, True, {"zero_optimization": {}} | more)[0]
    convert(folder / TAG, folder / f"{TAG}_universal", num_workers=1)
    return folder, seen, more


@pytest.mark.parametrize("stage, world_size", [(1, 3), (2, 1), (3, 3), (3, 1)])
def test_a_stock_engine_goes_on_in_half_precision(half, stage: int, world_size: int):
    folder, saved, more = half
    for found in run_ranks(world_size, _load, str(folder), stage, True, more):
        assert set(found.state) == set(saved.state)
        for key, tensor in saved.state.items():
            assert torch.equal(found.state[key], tensor), key
        assert found.steps == saved.steps
        assert found.loss_scale == saved.loss_scale == (512.0 if "fp16" in more else 1.0)
        assert found.loss == pytest.approx(saved.loss, rel=1e-2)  # bf16 keeps 8 bits


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    run_ranks(2, _save, str(folder), 3, True, {"zero_optimization": {}})
    run_ranks(1, stock_convert, str(folder / TAG), str(folder / "universal"))
    return folder


def test_a_stock_universal_folder_of_zero3_is_the_save_that_it_was_made_from(theirs: Path):
    found = diff(theirs / TAG, theirs / "universal")
    # It does not say to which group a parameter belongs.
    assert not found.deltas and found.num_states == 21 and not found.lines, found.lines
    assert verify(theirs / "universal").is_sound and not verify(theirs / "universal").is_proven


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda model: None, "shapes and steps in files that are not there"),
        (lambda model: model["param_shapes"][0].popitem(), "hold different parameters"),
        (lambda model: model.update(frozen_param_shapes={"a": (3,)}), "leaves frozen parameters of ZeRO-3 out"),
        (lambda model: model["param_shapes"][0].update({"out.weight": (7, 21)}), "wrong number of elements"),
    ],
    ids=["missing", "other", "frozen", "size"],
)
def test_what_a_stock_universal_folder_of_zero3_lacks_is_named(edit, message, theirs: Path, tmp_path: Path):
    folder = Path(shutil.copytree(theirs / "universal", tmp_path / "universal"))
    path = folder / STAGE3_MODEL
    model = torch.load(path, weights_only=False)
    path.unlink()
    if edit(model) is not None or "there" not in message:
        torch.save(model, path)
    with pytest.raises(UcpError, match=message):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_steps_that_a_stock_universal_folder_of_zero3_counts_apart_are_refused(theirs: Path, tmp_path: Path):
    folder = Path(shutil.copytree(theirs / "universal", tmp_path / "universal"))
    content = torch.load(folder / OPTIMIZER_FILE, weights_only=False)
    states = content["optimizer_state_dict"]["state"]
    assert len(states) == 2
    states[1]["step"] = torch.tensor(1.0)
    torch.save(content, folder / OPTIMIZER_FILE)
    with pytest.raises(UcpError, match="counted its parameters' steps apart"):
        convert(folder, tmp_path / "out")


class Twice(nn.Module):
    """One module under two names of the same parent, of which DeepSpeed lists the first alone."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.second(self.first(x)))


def _save_twice(rank: int, world_size: int, folder: str) -> None:
    import deepspeed

    net = Twice()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    engine = deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]
    engine.backward(engine(torch.ones(1, 6)).sum())
    engine.step()
    engine.save_checkpoint(folder, tag="there")


def test_a_second_name_of_a_module_is_no_frozen_parameter(tmp_path):
    run_ranks(2, _save_twice, str(tmp_path))
    found = open_source(tmp_path / "there").manifest.parameters
    assert {name: info.is_trainable for name, info in found.items()} == {
        "first.weight": True, "first.bias": True, "frozen.weight": False, "frozen.bias": False,
    }  # fmt: skip
