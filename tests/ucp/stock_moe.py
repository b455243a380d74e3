"""Stock saves of deepspeed.moe.layer.MoE for the tests, and the live state that they have to hold.

Every rank gives what it has under global names (live weights, masters and moments by DeepSpeed's own
accessors), so that the truth comes from the ranks and not from the files.
"""

from dataclasses import dataclass

import torch
from torch import nn

NUM_STEPS = 3
HIDDEN = 6
MOMENTS = ("exp_avg", "exp_avg_sq")
LOCAL = ".deepspeed_moe.experts.deepspeed_experts."
TAG = f"global_step{NUM_STEPS}"


_TP_GROUP = None
"""Of this rank; a module that DeepSpeed copies for every expert cannot keep a process group."""


@dataclass(frozen=True)
class Moe:
    world_size: int
    zero: dict
    ep: tuple[int, int] = (2, 2)
    """Of the two layers."""
    experts: tuple[int, int] = (4, 2)
    tp: int = 1
    pp: int = 1
    is_expert_cut: bool = False
    """Over tensor parallelism (enable_expert_tensor_parallelism)."""
    dtype: str = "float32"
    config: tuple = ()
    has_frozen: bool = True
    is_client: bool = True
    """AdamW made here, in named groups; else by DeepSpeed from its configuration."""

    @property
    def dp(self) -> int:
        return self.world_size // self.tp // self.pp

    @property
    def is_data_first(self) -> bool:
        return dict(self.config).get("use_data_before_expert_parallelism", False)

    def ep_rank(self, rank: int, layer: int) -> int:
        """By hand, from the pictures in DeepSpeed's groups.py."""
        in_stage = rank % (self.dp * self.tp)
        row, size = (in_stage // self.tp, self.dp) if self.is_expert_cut else (in_stage, self.dp * self.tp)
        return row // (size // self.ep[layer]) if self.is_data_first else row % self.ep[layer]


class _Sum(torch.autograd.Function):
    """Over tensor parallelism, in the forward or in the backward pass."""

    @staticmethod
    def forward(context, x, is_forward):
        context.is_forward = is_forward
        return _reduced(x) if is_forward else x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient if context.is_forward else _reduced(gradient), None


def _reduced(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    if _TP_GROUP is not None:
        torch.distributed.all_reduce(x, group=_TP_GROUP)
    return x


class Expert(nn.Module):
    def __init__(self, width: int, has_frozen: bool):
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, width), nn.Linear(width, HIDDEN)
        self.scale = nn.Parameter(torch.ones(HIDDEN), requires_grad=not has_frozen)

    def forward(self, x):
        x = torch.tanh(self.up(_Sum.apply(x, False)))
        return (_Sum.apply(x @ self.down.weight.t(), True) + self.down.bias) * self.scale


class Block(nn.Module):
    """MoE gives a tuple; a block of a pipeline has to give one tensor."""

    def __init__(self, num_experts: int, ep: int, **options):
        super().__init__()
        from deepspeed.moe.layer import MoE

        expert = Expert(10 // options.pop("tp"), options.pop("has_frozen"))
        self.norm = nn.LayerNorm(HIDDEN)
        self.moe = MoE(HIDDEN, expert, num_experts, ep_size=ep, k=1, min_capacity=0, use_rts=False, **options)

    def forward(self, x):
        return x + self.moe(self.norm(x))[0]


class Cut(nn.Module):
    """A dense layer whose first matrix is cut along dimension 0."""

    def __init__(self, tp: int):
        super().__init__()
        self.column = nn.Linear(5, HIDDEN // tp)
        self.tp = tp
        for p in self.column.parameters():
            p.model_parallel = tp > 1

    def forward(self, x):
        return torch.cat([self.column(x)] * self.tp, -1)


def layers_of(case: Moe) -> list[nn.Module]:
    torch.manual_seed(0)
    options = {
        "enable_expert_tensor_parallelism": case.is_expert_cut,
        "tp": case.tp if case.is_expert_cut else 1,
        "has_frozen": case.has_frozen,
    }
    first = Block(case.experts[0], case.ep[0], use_residual=True, **options)
    second = Block(case.experts[1], case.ep[1], **options)
    return [Cut(case.tp), first, second, nn.Linear(HIDDEN, 1)]


def batches(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + rank)
    return [torch.randn(16, 5, generator=generator) for _ in range(NUM_STEPS)]


class Mpu:
    """tp ranks are neighbours, stages are outermost; what DeepSpeed asks of Megatron's."""

    def __init__(self, case: Moe, rank: int):
        import torch.distributed as dist

        ranks = torch.arange(case.world_size).view(case.pp, case.dp, case.tp)
        self.pp, self.dp, self.tp = (int(i) for i in (ranks == rank).nonzero()[0])
        self.sizes = case
        tp = [dist.new_group(ranks[p, d].tolist()) for p in range(case.pp) for d in range(case.dp)]
        dp = [dist.new_group(ranks[p, :, t].tolist()) for p in range(case.pp) for t in range(case.tp)]
        self.tp_group, self.dp_group = tp[self.pp * case.dp + self.dp], dp[self.pp * case.tp + self.tp]

    def get_model_parallel_rank(self):
        return self.tp

    def get_model_parallel_world_size(self):
        return self.sizes.tp

    def get_model_parallel_group(self):
        return self.tp_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_pipeline_model_parallel_world_size(self):
        return 1

    def get_data_parallel_rank(self):
        return self.dp

    def get_data_parallel_world_size(self):
        return self.sizes.dp

    def get_data_parallel_group(self):
        return self.dp_group


def train_and_save(rank: int, world_size: int, folder: str, case: Moe, num_steps: int = NUM_STEPS):
    """What this rank holds at the end: global name -> state -> tensor, and its tp rank."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    mpu = Mpu(case, rank) if case.tp > 1 else None
    if case.is_expert_cut:
        global _TP_GROUP
        _TP_GROUP = mpu.tp_group
    gather = deepspeed.comm.all_gather_into_tensor
    # gloo wants a flat input, which DeepSpeed's gathering of tokens over tp does not give.
    deepspeed.comm.all_gather_into_tensor = lambda out, x, *rest, **options: gather(
        out, x.reshape(-1), *rest, **options
    )
    layers = layers_of(case)
    for index, layer in enumerate(layers[1:3]):
        _make_experts_differ(layer.moe, index, case, rank)
    if case.pp > 1:
        net = PipelineModule(
            layers, num_stages=case.pp, loss_fn=lambda y, _: y.square().mean(), partition_method="uniform"
        )
    else:
        net = nn.Sequential(*layers)
    net.universal_checkpoint_info = (
        {
            "tp_replicated_parameter_patterns": [
                ".*norm",
                r"3\.",
                ".*gate",
                ".*coefficient",
                r".*down\.bias",
                ".*scale",
            ],
            "parameter_with_row_parallelism_patterns": [r".*down\.weight"],
            "parameter_with_column_parallelism_patterns": [r"0\.column", r".*up\."],
        }
        if case.is_expert_cut
        else {
            "tp_replicated_parameter_patterns": [r"[123]\."],
            "parameter_with_column_parallelism_patterns": [r"0\.column"],
        }
    )
    config = {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_clipping": 0.0,
        "zero_optimization": case.zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": case.dtype == "bfloat16"},
        **dict(case.config),
    }
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = None
    if case.is_client:
        optimizer = client_optimizer(net, 200 if case.pp == 1 else 1e9)
    else:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, model_parameters=trained, config=config, mpu=mpu)
    for x in batches(mpu.dp if mpu else rank)[:num_steps]:
        x = x.to(getattr(torch, case.dtype))
        if case.pp > 1:
            engine.train_batch(iter([(x, x)]))
            continue
        engine.backward(engine(x).float().square().mean())
        engine.step()
    live = _live(engine, case.zero["stage"])
    engine.save_checkpoint(folder, tag=TAG)
    return (mpu.tp if mpu else 0), live


def client_optimizer(net: nn.Module, max_group_size: float) -> torch.optim.Optimizer:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    trained = [p for p in net.parameters() if p.requires_grad]
    decay = {"name": "decay", "params": [p for p in trained if p.dim() > 1], "weight_decay": 0.3}
    others = {"name": "no_decay", "params": [p for p in trained if p.dim() == 1], "lr": 0.02}
    groups = split_params_into_different_moe_groups_for_optimizer([decay, others], max_group_size=max_group_size)
    return torch.optim.AdamW(groups, lr=0.01)


def load_universal(rank: int, world_size: int, folder: str, case: Moe) -> dict[str, dict[str, torch.Tensor]]:
    """What a fresh stock engine has after DeepSpeed's own universal loader."""
    import deepspeed

    net = nn.Sequential(*layers_of(case))
    config = {
        "train_micro_batch_size_per_gpu": 16,
        "zero_optimization": case.zero,
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": True},
    }
    engine, *_ = deepspeed.initialize(model=net, optimizer=client_optimizer(net, 1e9), config=config)
    run, _, tag = folder.rpartition("/")
    engine.load_checkpoint(run, tag=tag)
    return _live(engine, case.zero["stage"])


def _make_experts_differ(moe: nn.Module, index: int, case: Moe, rank: int) -> None:
    """By their global numbers, so that the same training follows under every expert parallelism."""
    tp = rank % case.tp if case.is_expert_cut else 0
    for local, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
        number = case.ep_rank(rank, index) * moe.num_local_experts + local
        for place, (name, p) in enumerate(expert.named_parameters()):
            is_whole = name in ("down.bias", "scale")
            torch.manual_seed(10000 * index + 100 * number + 10 * place + (0 if is_whole else tp))
            nn.init.normal_(p, mean=float(name == "scale"), std=0.3)


def _live(engine, stage: int) -> dict[str, dict[str, torch.Tensor]]:
    from deepspeed.utils import groups, safe_get_full_fp32_param, safe_get_full_optimizer_state

    if stage and hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    live = {}
    for name, p in engine.module.named_parameters():
        key = name
        if LOCAL in name:
            prefix, rest = name.split(LOCAL)
            local, tail = rest.split(".", 1)
            layer = engine.module.get_submodule(prefix)
            first = groups._get_expert_parallel_rank(layer.expert_group_name) * layer.num_local_experts
            key = f"{prefix}{LOCAL}{first + int(local)}.{tail}"
        live[key] = {"weight": p.detach().clone()}
        if p.requires_grad and stage:
            live[key]["fp32"] = safe_get_full_fp32_param(p).clone()
            live[key] |= {k: safe_get_full_optimizer_state(p, k).clone().view_as(p) for k in MOMENTS}
        elif p.requires_grad and p.dtype == torch.float32:
            live[key] |= {"fp32": p.detach().clone(), **{k: engine.optimizer.state[p][k].clone() for k in MOMENTS}}
        else:
            live[key]["fp32"] = p.detach().float().clone()
    return live
