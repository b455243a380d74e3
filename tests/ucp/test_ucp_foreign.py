"""DeepSpeed's own saves, without ucp.json: what stock `deepspeed.initialize` trained and `save_checkpoint` wrote.

Two truths: the state gathered from the live engine (bit-equal), and the same training by plain torch in one process.
"""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from ucp.synthetic import FROZEN, Parameter, make_state, model, write_native
from ucp.test_ucp_convert import assert_universal_equals
from ucp.test_ucp_deepspeed_compat import info_for

from harness.ranks import run_ranks
from megatron.ucp.convert import convert
from megatron.ucp.errors import SourceError, UnsupportedCheckpointError
from megatron.ucp.safe_load import load
from megatron.ucp.sources import open_source
from megatron.ucp.sources.foreign import dense
from megatron.ucp.sources.foreign.flat_order import flat_fragments, sub_groups
from megatron.ucp.sources.foreign.layer_files import frozen_in_layers
from megatron.ucp.topology import Topology
from megatron.ucp.torch_file import save_streamed

NUM_STEPS = 3
STATES = ("fp32", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Case:
    world_size: int
    zero: dict
    is_bf16: bool = False
    is_live_right: bool = True
    names: dict = field(default_factory=lambda: {"decay": {"name": "decay"}, "no_decay": {"name": "no_decay"}})


UNNAMED = {"decay": {}, "no_decay": {}}
CASES = {
    "zero1-dp2-bf16-unnamed": Case(2, {"stage": 1}, is_bf16=True, names=UNNAMED),
    "zero1-dp3": Case(3, {"stage": 1}),
    "zero2-dp2": Case(2, {"stage": 2}),
    # DeepSpeed's table of places, and with it its own accessors, are wrong here.
    "zero2-dp2-round-robin": Case(2, {"stage": 2, "round_robin_gradients": True}, is_live_right=False),
    "zero3-dp2-sub-groups": Case(2, {"stage": 3, "sub_group_size": 10}),
    "zero3-dp3-sub-groups": Case(3, {"stage": 3, "sub_group_size": 10}),
    "zero3-dp3-bf16-unnamed": Case(3, {"stage": 3}, is_bf16=True, names=UNNAMED),
}


class Small(nn.Module):
    """A frozen, a tied and a one-element parameter, and a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.Linear(7, 13)
        self.frozen = nn.Linear(13, 13, bias=False).requires_grad_(False)
        self.norm = nn.LayerNorm(13)
        self.twice = nn.Linear(13, 13, bias=False)
        self.again = nn.Linear(13, 13, bias=False)
        self.again.weight = self.twice.weight
        self.outside = nn.Linear(13, 1)
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, x):
        x = self.frozen(torch.tanh(self.inside(x)))
        return self.outside(self.again(torch.tanh(self.twice(self.norm(x)))) * self.scale.to(x.dtype))


def optimizer_of(net: nn.Module, names: dict) -> torch.optim.Optimizer:
    weights = [p for p in net.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in net.parameters() if p.requires_grad and p.dim() == 1]
    return torch.optim.AdamW(
        [
            {"params": weights, "lr": 0.01, "weight_decay": 0.3, **names["decay"]},
            {"params": others, "lr": 0.02, "weight_decay": 0.0, **names["no_decay"]},
        ]
    )


def batches(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + rank)
    return [torch.randn(4, 7, generator=generator) for _ in range(NUM_STEPS)]


def _train_and_save(rank: int, world_size: int, folder: str, case: Case):
    import deepspeed

    net = Small()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_optimization": case.zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": case.is_bf16},
    }
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer_of(net, case.names), config=config)
    for x in batches(rank):
        loss = engine(x.bfloat16() if case.is_bf16 else x).float().square().mean()
        engine.backward(loss)
        engine.step()
    live = _gather(engine, case.zero["stage"])
    engine.save_checkpoint(folder, tag="global_step3")
    return live


def _gather(engine, stage: int) -> dict[str, dict[str, torch.Tensor]]:
    """By DeepSpeed's own accessors."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if stage < 3:
        # DeepSpeed links the states after the first group has stepped, when the second group has none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    live = {}
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            master = safe_get_full_fp32_param(p).clone()
            states = {key: safe_get_full_optimizer_state(p, key).clone().view_as(master) for key in STATES[1:]}
            live[name] = {"fp32": master, **states}
        else:
            with deepspeed.zero.GatheredParameters([p]):
                live[name] = {"fp32": p.detach().float().clone()}
    return live


def plain_training(world_size: int) -> dict[str, dict[str, torch.Tensor]]:
    net = Small()
    optimizer = optimizer_of(net, UNNAMED)
    for by_rank in zip(*(batches(rank) for rank in range(world_size)), strict=True):
        optimizer.zero_grad()
        (sum(net(x).square().mean() for x in by_rank) / world_size).backward()
        optimizer.step()
    return {
        name: {"fp32": p.detach(), **{key: optimizer.state[p][key] for key in STATES[1:] if p.requires_grad}}
        for name, p in net.named_parameters()
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """case -> (folder, live state), trained once."""
    made = {}

    def get(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            live = run_ranks(CASES[name].world_size, _train_and_save, str(folder), CASES[name])[0]
            made[name] = folder / "global_step3", live
        return made[name]

    return get


def converted(folder, output) -> dict[str, dict[str, torch.Tensor]]:
    manifest = convert(folder, output).manifest
    return {
        name: {state: load(output / "zero" / name / f"{state}.pt")["param"] for state in info.states}
        for name, info in manifest.parameters.items()
    }


def largest_difference(found, truth) -> float:
    assert {n: set(s) for n, s in found.items()} == {n: set(s) for n, s in truth.items()}
    return max(float((found[n][s] - t).abs().max()) for n, states in truth.items() for s, t in states.items())


@pytest.mark.parametrize("name", CASES)
def test_stock_save_is_read_as_it_was_live_and_as_plain_torch_trains(name, saved, tmp_path):
    case, (folder, live) = CASES[name], saved(name)
    found = converted(folder, tmp_path / "u")
    if case.is_live_right:
        assert largest_difference(found, live) == 0.0
    else:
        assert largest_difference(live, plain_training(case.world_size)) > 0.1
    if not case.is_bf16:
        assert largest_difference(found, plain_training(case.world_size)) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_groups_steps_and_frozen_parameters_of_stock_saves(name, saved):
    case = CASES[name]
    manifest = open_source(saved(name)[0]).manifest
    decay, no_decay = ("decay", "no_decay") if case.names["decay"] else ("0", "1")
    assert {group: values["lr"] for group, values in manifest.optimizer.groups.items()} == {decay: 0.01, no_decay: 0.02}
    assert manifest.optimizer.groups[decay]["weight_decay"] == 0.3
    assert manifest.zero_stage == case.zero["stage"] and manifest.topology.dp_size == case.world_size
    assert manifest.iteration == NUM_STEPS
    frozen = {"frozen.weight"}
    for parameter, info in manifest.parameters.items():
        assert info.is_trainable == (parameter not in frozen)
        assert info.group == ("" if parameter in frozen else no_decay if len(info.layout.shape) == 1 else decay)
        assert info.step == (None if parameter in frozen else NUM_STEPS)
    if "sub_group_size" in case.zero:
        assert len(manifest.zero3_order[0]) > 4


def test_a_reader_with_a_wrong_order_is_found_out(saved, tmp_path, monkeypatch):
    """The planted fault: two parameters of equal length change places."""
    folder, live = saved("zero3-dp3-sub-groups")

    def wrong(lengths, sizes):
        swap = {"norm.weight": "norm.bias", "norm.bias": "norm.weight"}
        return [[swap.get(name, name) for name in names] for names in sub_groups(lengths, sizes)]

    monkeypatch.setattr(dense, "sub_groups", wrong)
    assert largest_difference(converted(folder, tmp_path / "u"), live) > 0.1


# -- tensor parallelism: stock DeepSpeed with a small mpu ------------------------------------------------------------

TP, DP, WIDTH = 2, 2, 10


class _Mpu:
    """tp ranks are neighbours."""

    def __init__(self, rank: int):
        import torch.distributed as dist

        self.tp, self.dp = rank % TP, rank // TP
        tp = [dist.new_group([d * TP + t for t in range(TP)]) for d in range(DP)]
        dp = [dist.new_group([d * TP + t for d in range(DP)]) for t in range(TP)]
        self.tp_group, self.dp_group = tp[self.dp], dp[self.tp]

    def get_model_parallel_rank(self):
        return self.tp

    def get_model_parallel_world_size(self):
        return TP

    def get_model_parallel_group(self):
        return self.tp_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self):
        return self.dp

    def get_data_parallel_world_size(self):
        return DP

    def get_data_parallel_group(self):
        return self.dp_group


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(context, x, group):
        x = x.clone()
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(context, gradient):
        return gradient, None


class Halves(nn.Module):
    """first is cut along dimension 0, second along 1, the bias is whole. group None: the whole model."""

    def __init__(self, tp: int = 0, group=None):
        super().__init__()
        torch.manual_seed(1)
        first, second = torch.randn(WIDTH, 7), torch.randn(3, WIDTH)
        self.group = group
        self.first = nn.Parameter(first.chunk(TP)[tp].clone() if group else first)
        self.second = nn.Parameter(second.chunk(TP, 1)[tp].clone() if group else second)
        self.bias = nn.Parameter(torch.randn(3))
        self.first.model_parallel = self.second.model_parallel = True

    def forward(self, x):
        y = torch.tanh(x @ self.first.t()) @ self.second.t()
        return (_Sum.apply(y, self.group) if self.group else y) + self.bias


def _train_halves(rank: int, world_size: int, folder: str, info: dict | None):
    import deepspeed

    mpu = _Mpu(rank)
    net = Halves(mpu.tp, mpu.tp_group)
    if info is not None:
        net.universal_checkpoint_info = info
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "sub_group_size": 6},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config, mpu=mpu)
    for x in batches(mpu.dp):
        engine.backward(engine(x).square().mean())
        engine.step()
    engine.save_checkpoint(folder, tag="global_step3")


def plain_halves() -> dict[str, dict[str, torch.Tensor]]:
    net = Halves()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for by_rank in zip(*(batches(rank) for rank in range(DP)), strict=True):
        optimizer.zero_grad()
        (sum(net(x).square().mean() for x in by_rank) / DP).backward()
        optimizer.step()
    return {
        name: {"fp32": p.detach(), **{key: optimizer.state[p][key] for key in STATES[1:]}}
        for name, p in net.named_parameters()
    }


def test_stock_zero3_with_tensor_parallelism(tmp_path):
    info = {"tp_replicated_parameter_patterns": ["bias$"], "parameter_with_row_parallelism_patterns": ["second$"]}
    run_ranks(TP * DP, _train_halves, str(tmp_path), info)
    folder = tmp_path / "global_step3"
    with pytest.raises(UnsupportedCheckpointError, match="first") as caught:
        open_source(folder)
    assert "second" not in str(caught.value) and "--column_parallel" in str(caught.value)
    manifest = convert(folder, tmp_path / "u", column_parallel=("first$",)).manifest
    assert manifest.source["topology"]["tp_size"] == TP and manifest.source["zero_stage"] == 3
    found = {
        name: {state: load(tmp_path / "u/zero" / name / f"{state}.pt")["param"] for state in STATES}
        for name in manifest.parameters
    }
    assert largest_difference(found, plain_halves()) < 1e-6


# -- synthetic: what stock runs do not show -----------------------------------------------------------------------

MODEL = [
    *model(),
    Parameter("layers.0.mlp.frozen_column.weight", (9, 5), "column", FROZEN, 1),
    Parameter("layers.0.frozen_norm.weight", (3,), "whole", FROZEN, 1),
]
STATE = make_state(MODEL, seed=11)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("topology", [Topology(dp_size=3), Topology(tp_size=2, dp_size=2)], ids=str)
def test_frozen_parameters_without_a_manifest(tmp_path, topology, zero_stage):
    info = info_for(topology.tp_size)
    info["tp_replicated_parameter_patterns"].append(".*frozen_norm")
    info["parameter_with_column_parallelism_patterns"].append(".*frozen_column")
    write_native(
        tmp_path / "n", STATE, topology, zero_stage, parameters=MODEL, info=info, with_manifest=False, prefix="bf16_"
    )
    convert(tmp_path / "n", tmp_path / "u")
    assert_universal_equals(tmp_path / "u", STATE)


def _edit(path, change):
    content = load(path, mmap=False)
    change(content)
    save_streamed(content, path)  # stand-ins under DeepSpeed's names


@pytest.fixture
def stage3(tmp_path):
    write_native(tmp_path / "n", STATE, Topology(dp_size=3), 3, parameters=MODEL, info=info_for(1), with_manifest=False)
    return tmp_path / "n"


def test_sub_groups_are_found_where_the_list_is_by_parameter_group(stage3, tmp_path):
    def merge(content):
        decay, no_decay = {}, {}
        for table in content["param_shapes"]:
            (decay if len(next(iter(table.values()))) > 1 else no_decay).update(table)
        content["param_shapes"] = [decay, no_decay]

    for rank in range(3):
        _edit(stage3 / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", merge)
    convert(stage3, tmp_path / "u")
    assert_universal_equals(tmp_path / "u", STATE)


@pytest.mark.parametrize(
    "change",
    [
        lambda o: o["fp32_flat_groups"].__setitem__(1, torch.empty(0)),
        lambda o: o["fp32_flat_groups"].pop(),
        lambda o: o.update(ds_zero_partition_groups=[{"sub_group": 0}]),
        lambda o: o["optimizer_state_dict"]["state"][1].pop("exp_avg"),
        lambda o: o["optimizer_state_dict"]["state"][1].update(exp_avg=torch.zeros(1)),
    ],
    ids=["on-nvme", "a-flat-missing", "experts", "a-state-missing", "a-state-short"],
)
def test_zero3_that_does_not_add_up_is_refused_by_file(stage3, change):
    for rank in range(3):
        file = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        _edit(stage3 / file, lambda content: change(content["optimizer_state_dict"]))
    with pytest.raises(UnsupportedCheckpointError, match="flat tensors") as caught:
        open_source(stage3)
    assert "zero_pp_rank_2_mp_rank_00_optim_states.pt" in str(caught.value)


def test_a_table_in_another_order_is_not_believed_without_a_reason(tmp_path):
    """round_robin_gradients explains it; where the configuration says it was off, nothing does."""
    write_native(tmp_path / "n", STATE, Topology(), 2, parameters=MODEL, with_manifest=False)

    def reverse(content):
        tables = content["param_shapes"]
        content["param_shapes"] = [dict(reversed(table.items())) for table in tables]
        content["ds_config"] = {"zero_optimization": {"stage": 2}}

    _edit(tmp_path / "n/mp_rank_00_model_states.pt", reverse)
    with pytest.raises(SourceError, match="another order"):
        open_source(tmp_path / "n")


def test_a_file_of_an_expert_beside_a_dense_save_is_refused(tmp_path):
    write_native(tmp_path / "n", STATE, Topology(), 1, parameters=MODEL, with_manifest=False)
    torch.save({}, tmp_path / "n/layer_0_expert_0_mp_rank_00_model_states.pt")
    with pytest.raises(UnsupportedCheckpointError, match="experts"):
        open_source(tmp_path / "n")


def test_sub_groups_by_hand():
    lengths = {"a": 8, "b": 5, "c": 3}
    assert sub_groups(lengths, [13, 3]) == [["a", "b"], ["c"]]
    assert sub_groups(lengths, [16]) == [["a", "b", "c"]]
    for sizes in ([8, 8, 1], [12, 4], [13], [13, 3, 0, 1], []):
        assert sub_groups(lengths, sizes) is None


def test_flat_fragments_by_hand(tmp_path):
    files = [tmp_path / "0", tmp_path / "1", tmp_path / "2"]
    found = flat_fragments({"a": 5, "b": 2, "c": 1}, [1, 0, 0], 4, files, 0)
    places = {n: [(f.file.name, f.offset, f.start, f.stop) for f in parts] for n, parts in found.items()}
    assert places == {"a": [("0", 0, 0, 4), ("1", 0, 4, 5)], "b": [("1", 2, 0, 2)], "c": [("2", 0, 0, 1)]}


# -- pipelines: stock PipelineModule names parameters by the number of their layer ----------------------------------


def pipeline_layers() -> list[nn.Module]:
    """The first and the last layer are one; the second is frozen, the third in part."""
    torch.manual_seed(2)
    layers = [nn.Linear(7, 7, bias=False), nn.Linear(7, 7), nn.LayerNorm(7), nn.Linear(7, 7)]
    layers[1].requires_grad_(False)
    layers[2].bias.requires_grad_(False)
    return layers


class _Copy(nn.Linear):
    def __init__(self, origin: nn.Linear):
        super().__init__(7, 7, bias=False)  # DeepSpeed ties "weight" and nothing else
        self.load_state_dict(origin.state_dict())


def _train_pipeline(rank: int, world_size: int, folder: str):
    import deepspeed
    from deepspeed.pipe import PipelineModule, TiedLayerSpec

    first, *others = pipeline_layers()
    specs = [TiedLayerSpec("ends", _Copy, first), *others, TiedLayerSpec("ends", _Copy, first)]
    net = PipelineModule(specs, num_stages=2, loss_fn=lambda y, _: y.square().mean(), partition_method="uniform")
    config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    for x in batches(0):
        engine.train_batch(iter([(x, x)]))
    engine.save_checkpoint(folder, tag="global_step3")


def plain_pipeline() -> dict[str, dict[str, torch.Tensor]]:
    layers = pipeline_layers()
    net = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
    for x in batches(0):
        optimizer.zero_grad()
        layers[0](net(x)).square().mean().backward()
        optimizer.step()
    return {
        name.replace("0.", "tied_modules.ends."): {
            "fp32": p.detach(),
            **{key: optimizer.state[p][key] for key in STATES[1:] if p.requires_grad},
        }
        for name, p in net.named_parameters()
    }


def test_stock_pipeline_with_tied_and_frozen_layers(tmp_path):
    run_ranks(2, _train_pipeline, str(tmp_path))
    found = converted(tmp_path / "global_step3", tmp_path / "u")
    assert largest_difference(found, plain_pipeline()) < 1e-6
    parameters = open_source(tmp_path / "global_step3").manifest.parameters
    assert {name for name, info in parameters.items() if not info.is_trainable} == {"1.weight", "1.bias", "2.bias"}


def test_a_frozen_layer_that_looks_like_a_tied_one_is_refused():
    tied, frozen = {"weight": torch.ones(2, 2)}, {"weight": torch.zeros(2, 2)}
    trainable = {"tied_modules.ends.weight": {0: [(2, 2)]}, "1.weight": {0: [(3,)]}}
    layers = {(0, 0): tied, (1, 0): {"weight": torch.ones(3)}, (3, 0): tied}
    assert frozen_in_layers(layers, trainable, set()) == {}
    with pytest.raises(UnsupportedCheckpointError, match="layer 0, layer 2, layer 3"):
        frozen_in_layers({**layers, (2, 0): frozen}, trainable, set())
    other = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2), "mean": torch.zeros(2)}
    assert frozen_in_layers({**layers, (2, 0): other}, trainable, {"2.mean"}) == {
        "2.weight": {0: [(2, 2)]},
        "2.bias": {0: [(2,)]},
    }
