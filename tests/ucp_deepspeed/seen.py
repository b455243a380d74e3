"""What stands in a DeepSpeed engine, by DeepSpeed's and torch's own means: the truth that resumes are held against."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Seen:
    state: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    """(name, "fp32", "exp_avg" or another state of the optimizer) -> the whole tensor"""
    frozen: dict[str, torch.Tensor] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    groups: list[tuple[float, float]] = field(default_factory=list)
    steps: set[float] = field(default_factory=set)
    numbers: set[float] = field(default_factory=set)
    """NAdam's mu_product."""
    counters: tuple = ()
    scale: float = 1.0
    """Of the loss."""
    client_state: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    """Of the steps that follow."""


def _states_of(base: torch.optim.Optimizer) -> list[str]:
    """Names of its tensors."""
    state = next(iter(base.state.values()), {})
    return sorted(key for key, value in state.items() if torch.is_tensor(value) and value.dim() > 0)


def _flats_of(optimizer) -> list[tuple[torch.Tensor, list, list[int]]]:
    """Of ZeRO-1 and 2: (this rank's partition, the parameters as they lie, where each begins in the whole)."""
    if not hasattr(optimizer, "round_robin_bit16_groups"):  # BF16_Optimizer
        groups = optimizer.bf16_groups
        offsets = [[sum(p.numel() for p in group[:i]) for i in range(len(group))] for group in groups]
        return list(zip(optimizer.fp32_groups_flat_partition, groups, offsets, strict=True))
    groups, offsets = optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets
    return list(zip(optimizer.single_partition_of_fp32_groups, groups, offsets, strict=True))


def seen_in(engine) -> Seen:
    """With DeepSpeed's and torch's own means, not ours."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    seen, stage = Seen(), engine.zero_optimization_stage()
    base = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            with GatheredParameters([param]):
                seen.frozen[name] = param.detach().float().clone()
        elif stage == 3:
            seen.state[name, "fp32"] = safe_get_full_fp32_param(param).clone()
            for key in _states_of(base):
                seen.state[name, key] = safe_get_full_optimizer_state(param, key).clone()
        elif stage == 0:
            seen.state[name, "fp32"] = param.detach().clone()
            for key in _states_of(base):
                seen.state[name, key] = base.state[param][key].clone()
    if stage in (1, 2):  # DeepSpeed's accessors know the moments of the first parameter group only
        names = {param: name for name, param in engine.module.named_parameters()}
        for flat, params, offsets in _flats_of(engine.optimizer):
            for key in ("fp32", *_states_of(base)):
                part = flat.detach() if key == "fp32" else base.state[flat][key]
                parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size())]
                torch.distributed.all_gather(parts, part.contiguous())
                whole = torch.cat(parts)
                for param, offset in zip(params, offsets, strict=True):
                    values = whole[offset : offset + param.numel()].view(param.shape)
                    seen.state[names[param], key] = values.float().clone()
    seen.buffers = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    seen.groups = [(group["lr"], group["weight_decay"]) for group in base.param_groups]
    seen.steps = {float(state["step"]) for state in base.state.values() if "step" in state}
    seen.numbers = {float(state[key]) for state in base.state.values() for key in ("mu_product",) if key in state}
    seen.scale = float(getattr(engine.optimizer, "loss_scale", 1.0))
    seen.counters = engine.global_steps, engine.global_samples, engine.skipped_steps
    return seen


def raised_by_deepspeed(error: Exception) -> bool:
    """Of a RankFailure: its first traceback ends in DeepSpeed's code, not in a test's or in the harness."""
    frames, is_traceback = [], False
    for line in str(error).splitlines():
        if line.startswith("Traceback"):
            is_traceback = True
        elif is_traceback and line.startswith("  File "):
            frames.append(line)
        elif is_traceback and not line.startswith(" "):
            break
    return bool(frames) and "/site-packages/deepspeed/" in frames[-1]
