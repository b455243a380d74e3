"""The optimizers: torch's where DeepSpeed leaves them alone, ours where it would not train the same everywhere.

Under ZeRO an optimizer steps flat pieces of parameters. Elementwise arithmetic does not notice. Muon's
is of whole matrices, so ours puts each matrix together for it; Adafactor's too, and it is allowed only where every
rank has whole matrices (config/run_checks.py).

    optimizer = build_optimizer(config.optimizer, parameter_groups(model, 0.1))     # given to DeepSpeed
    optimizer.attach(engine_state)                                                  # Muon only: who holds what

| --optimizer | class | states |
|---|---|---|
| adam | the AdamW that `fused_adam` finds | exp_avg, exp_avg_sq, step |
| sgd | torch.optim.SGD | momentum_buffer |
| lion | Lion | exp_avg |
| adagrad | Adagrad | sum |
| muon | Muon | momentum_buffer of the blocks' matrices; AdamW's of everything else |
| adafactor | torch.optim.Adafactor | row_var and col_var of matrices, variance of vectors, step |
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.optimizer import MATRICES, OptimizerConfig
from megatron.engine import cpu_adam
from megatron.engine.engine_state import EngineState, OwnedInterval
from megatron.kernels.importable import importable
from megatron.ucp.layout import Layout

Groups = Iterable[Mapping[str, Any]]
Closure = Callable[[], float] | None


def build_optimizer(
    config: OptimizerConfig,
    groups: Groups,
    block: Mapping[str, Any] | None = None,
    fused: str = "torch",
    is_on_cuda: bool = False,
) -> torch.optim.Optimizer | None:
    """The one that --optimizer names, over the groups of `parameter_groups`; or that "optimizer" in the DeepSpeed JSON
    names, `block`. None where DeepSpeed itself is to build what that names.

    `fused` is --fused-kernels; `is_on_cuda`, whether the optimizer's tensors will be there (CPU and offload: not).
    """
    groups = [dict(group) for group in groups]
    if block is not None:
        kind = BUILT_HERE.get(block["type"].lower())
        return None if kind is None else kind(groups, **block["params"])
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.sgd_momentum, weight_decay=decay)
    if config.optimizer == "lion":
        return Lion(groups, lr=lr, betas=(config.lion_beta1, config.lion_beta2), weight_decay=decay)
    if config.optimizer == "adagrad":
        return Adagrad(groups, lr=lr, weight_decay=decay)
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=lr, weight_decay=decay)
    betas = config.adam_beta1, config.adam_beta2
    if config.optimizer == "muon":
        dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
        return Muon(groups, dtype, config.muon_momentum, lr=lr, betas=betas, eps=config.adam_eps, weight_decay=decay)
    # Megatron's "adam" decouples weight decay.
    kind = fused_adam(fused, is_on_cuda)
    return kind(groups, lr=lr, betas=betas, eps=config.adam_eps, weight_decay=decay)


def fused_adam(choice: str, is_on_cuda: bool) -> Callable[..., torch.optim.Optimizer]:
    """AdamW that reads and writes each state once, as --fused-kernels says. On the CPU: torch's for "torch", else
    cpu_adam.AdamW. On CUDA:

    | choice | class |
    |---|---|
    | auto, apex | Apex's FusedAdam if importable with its compiled amp_C; else DeepSpeed's if compiled when DeepSpeed
    was installed (DS_BUILD_FUSED_ADAM=1); else torch's with fused=True |
    | triton | torch's with fused=True, a CUDA kernel; Triton would add nothing |
    | torch | torch's |

    DeepSpeed's is not compiled for a run that did not ask: that takes minutes and fails where nvcc's CUDA is not
    torch's. They differ in rounding, and where they count steps (optimizer_probe.py finds it): a run may change from
    one to another at a resume.
    """
    if choice == "torch":
        return torch.optim.AdamW
    if not is_on_cuda:
        return cpu_adam.AdamW
    if choice != "triton":
        if importable("amp_C") is not None and hasattr(apex := importable("apex.optimizers"), "FusedAdam"):
            return partial(apex.FusedAdam, adam_w_mode=True)
        compiled = getattr(importable("deepspeed.git_version_info"), "installed_ops", {})
        if compiled.get("fused_adam"):
            return partial(importlib.import_module("deepspeed.ops.adam").FusedAdam, adam_w_mode=True)
    return partial(torch.optim.AdamW, fused=True)


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> float | None:
        loss = _evaluated(closure)
        for group, param, state in _with_gradient(self):
            beta1, beta2 = group["betas"]
            momentum = _made(state, "exp_avg", param)
            update = momentum.lerp(param.grad, 1 - beta1).sign_()
            param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
            momentum.lerp_(param.grad, 1 - beta2)
        return loss


class Adagrad(torch.optim.Optimizer):
    """Duchi et al. 2011, with torch's defaults. Not torch's class: for that one, ZeRO builds another without the
    parameter groups' own hyper-parameters (deepspeed/runtime/zero/stage_1_and_2.py, initialize_optimizer_states)."""

    def __init__(self, params: Any, lr: float, eps: float = 1e-10, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> float | None:
        loss = _evaluated(closure)
        for group, param, state in _with_gradient(self):
            gradient = param.grad.add(param, alpha=group["weight_decay"]) if group["weight_decay"] else param.grad
            total = _made(state, "sum", param)
            total.addcmul_(gradient, gradient)
            param.addcdiv_(gradient, total.sqrt().add_(group["eps"]), value=-group["lr"])
        return loss


BUILT_HERE = {"lion": Lion, "adagrad": Adagrad}
"""By type in the DeepSpeed JSON. DeepSpeed's own Lions are compiled at the first use, and not for every device; its
Adagrad loses the parameter groups."""


@dataclass(frozen=True)
class _Matrix:
    """One matrix of which a flat tensor of the optimizer holds a part, on this rank or on another."""

    layout: Layout
    interval: OwnedInterval | None
    """This rank's part."""


class NotAttachedError(RuntimeError):
    """Muon was stepped on pieces of matrices before it was told whose they are."""


class Muon(torch.optim.AdamW):
    """Momentum whose step is orthogonalised, for the group named "matrices"; AdamW for the others.

    Jordan et al. 2024 (Newton-Schulz coefficients, Nesterov) and Liu et al. 2025, "Muon is Scalable for LLM Training"
    (updates of AdamW's size, 0.2 sqrt(max(rows, columns)), so that one --lr serves both). The parts of a fused matrix
    (q, k, v; gate, up) are orthogonalised each by itself.

    A ZeRO partition or a TP shard has another orthogonalisation than its matrix has. So every matrix is put together
    on one rank of those that hold its shard, orthogonalised there, and handed back: the same update under every
    topology, each computed once for all data-parallel ranks.
    """

    gathers_matrices = True
    """Its step of a part of a parameter is that part of the whole's step."""

    def __init__(self, params: Any, dtype: torch.dtype, momentum: float, **adam: Any) -> None:
        """`dtype` is that of the orthogonalisation: bf16 does, but amplifies differences between topologies."""
        super().__init__(params, **adam)
        self.dtype = dtype
        self._engine_state: EngineState | None = None
        self._matrices: dict[Tensor, list[_Matrix]] = {}
        for group in self.param_groups:
            if group.get("name") == MATRICES:
                group.setdefault("momentum", momentum)

    def attach(self, state: EngineState) -> None:
        """Who holds which part of which matrix: after DeepSpeed has taken the parameters apart. Local."""
        own = {(interval.flat, interval.name): interval for interval in state.intervals}
        self._matrices = {
            flat: [_Matrix(state.layouts[name], own.get((flat, name))) for name in names]
            for (group, flat), names in zip(state.flats, state.members, strict=True)
            if self.param_groups[group]["name"] == MATRICES
        }
        self._engine_state = state

    @torch.no_grad()
    def step(self, closure: Closure = None) -> float | None:
        """Collective over the ranks of a pipeline stage, once attached."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if group.get("name") != MATRICES]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("name") == MATRICES:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: Mapping[str, Any]) -> None:
        updates: dict[Tensor, Tensor] = {}
        for param in group["params"]:
            if param.grad is None:
                continue
            momentum = _made(self.state[param], "momentum_buffer", param)
            momentum.lerp_(param.grad, 1 - group["momentum"])
            updates[param] = param.grad.lerp(momentum, group["momentum"])
        if self._engine_state is None:
            for param, update in updates.items():
                if param.dim() != 2:
                    raise NotAttachedError(f"a tensor of shape {tuple(param.shape)} is no matrix; call attach first")
                update.copy_(orthogonalised(update, self.dtype))
        else:
            self._orthogonalise(updates)
        for param, update in updates.items():
            param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _orthogonalise(self, updates: Mapping[Tensor, Tensor]) -> None:
        """In place, in rounds of one matrix for each rank that holds the shards."""
        context = self._engine_state.context
        todo = [(update, matrix) for flat, update in updates.items() for matrix in self._matrices.get(flat, ())]
        for first in range(0, len(todo), context.zero_size):
            work = todo[first : first + context.zero_size]
            mine = None
            for owner, (update, matrix) in enumerate(work):
                shard = self._gathered(update, matrix, owner)
                if owner == context.zero_rank:
                    mine = shard
            # After the last sum, so that all ranks orthogonalise at the same time.
            if mine is not None:
                mine = self._of_the_whole(mine, work[context.zero_rank][1].layout)
            for owner, (update, matrix) in enumerate(work):
                self._hand_back(update, matrix, mine, owner)

    def _gathered(self, update: Tensor, matrix: _Matrix, owner: int) -> Tensor:
        """The matrix's TP shard, on the owner."""
        state = self._engine_state
        context, interval = state.context, matrix.interval
        shape = matrix.layout.shard_shape(context.shard_rank)
        shard = torch.zeros(math.prod(shape), dtype=torch.float32, device=state.engine.device)
        if interval is not None:
            stretch = update.view(-1).narrow(0, interval.flat_start, interval.numel)
            shard.narrow(0, interval.start, interval.numel).copy_(stretch)
        if context.zero_group is not None and not state.is_replicated:
            dist.reduce(shard, group_dst=owner, group=context.zero_group)
        return shard.view(shape)

    def _of_the_whole(self, shard: Tensor, layout: Layout) -> Tensor:
        """This rank's shard of the orthogonalised matrix. Collective over tp."""
        context = self._engine_state.context
        whole = shard.new_zeros(layout.shape)
        for box in layout.boxes(context.shard_rank, owned=True):
            whole[box.atomic_slices] = shard[box.shard_slices]
        if context.tp_group is not None:
            dist.all_reduce(whole, group=context.tp_group)
        return layout.split(orthogonalised(whole, self.dtype, layout), context.shard_rank)

    def _hand_back(self, update: Tensor, matrix: _Matrix, mine: Tensor | None, owner: int) -> None:
        state = self._engine_state
        context, interval = state.context, matrix.interval
        shard = mine
        if owner != context.zero_rank:
            shape = matrix.layout.shard_shape(context.shard_rank)
            shard = torch.empty(shape, dtype=torch.float32, device=state.engine.device)
        if context.zero_group is not None:
            dist.broadcast(shard, group_src=owner, group=context.zero_group)
        if interval is not None:
            stretch = shard.reshape(-1).narrow(0, interval.start, interval.numel)
            update.view(-1).narrow(0, interval.flat_start, interval.numel).copy_(stretch)


def orthogonalised(matrix: Tensor, dtype: torch.dtype, layout: Layout | None = None) -> Tensor:
    """About U V^T of the matrix's singular value decomposition, scaled to AdamW's size; each part of a layout by
    itself."""
    cut = next((cut for cut in layout.cuts if len(cut.parts) > 1), None) if layout is not None else None
    if cut is None:
        return _newton_schulz(matrix, dtype) * (0.2 * math.sqrt(max(matrix.shape)))
    parts = matrix.split([part.size for part in cut.parts], dim=cut.dim)
    return torch.cat([orthogonalised(part, dtype) for part in parts], dim=cut.dim)


def _newton_schulz(matrix: Tensor, dtype: torch.dtype, num_steps: int = 5) -> Tensor:
    """Singular values are driven to about 1 by an odd quintic polynomial, whose coefficients are Jordan's."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype)
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.T if is_tall else x).to(matrix.dtype)


def _made(state: dict[str, Any], name: str, param: Tensor) -> Tensor:
    if name not in state:
        state[name] = torch.zeros_like(param)
    return state[name]


def _evaluated(closure: Closure) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _with_gradient(optimizer: torch.optim.Optimizer) -> Iterable[tuple[dict, Tensor, dict]]:
    """(group, parameter, its state)."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                yield group, param, optimizer.state[param]
