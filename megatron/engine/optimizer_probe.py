"""What an optimizer keeps and how it computes, found out by letting it step small tensors.

No table of optimizers. Any class that steps parameters shows on a dummy which states it makes, where it
counts its steps, and whether its arithmetic is elementwise.

    kept = kept_states(optimizer, optimizer.param_groups[0], like=flat)
    kept.states["exp_avg"].shape, kept.step_home, kept.unknown_when_fresh
    is_elementwise(optimizer, optimizer.param_groups[0], flat)

Nothing is left in the optimizer, and no parameter of it is touched. Local.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Group = Mapping[str, Any]
StateKind = Literal["cut", "whole", "scalar", "other"]

STEP = "step"
_SCALARS = (bool, int, float)
_CARRIED = (torch.float32, torch.bfloat16, torch.float16)
"""Precisions that float32 files hold exactly."""


def kind_of_state(value: Any, shape: Sequence[int]) -> StateKind:
    """Of a state that belongs to a tensor of this shape. "cut": it is cut as the parameter is; "whole": a tensor of
    another shape; "scalar": a number."""
    if not torch.is_tensor(value):
        return "scalar" if isinstance(value, _SCALARS) else "other"
    if value.is_complex() or (value.dtype not in _CARRIED and value.numel() > 1):
        return "other"
    if value.shape == torch.Size(shape):
        return "cut"
    return "scalar" if value.dim() == 0 else "whole"


@dataclass(frozen=True)
class KeptStates:
    """What the optimizer keeps for one parameter after one step with gradient zero."""

    states: Mapping[str, Any]
    step_home: Literal["state", "last", "group"] | None
    """Where the number of steps is: in each parameter's state; of all that are stepped together only in the last
    one's (DeepSpeed's FusedAdam); in the group (Apex's FusedAdam); nowhere."""

    @property
    def unknown_when_fresh(self) -> list[str]:
        """States whose value before the first step cannot be told from the one after it."""
        return sorted(
            name
            for name, value in self.states.items()
            if name != STEP and bool(value.any() if torch.is_tensor(value) else value)
        )


def kept_states(optimizer: torch.optim.Optimizer, group: Group, like: Tensor) -> KeptStates:
    """For a parameter of the shape and precision of `like`."""
    dummies = [_dummy(like.new_zeros(2)), _dummy(torch.zeros_like(like, requires_grad=False))]
    (first, last), after = _stepped(optimizer, group, dummies)
    home: Literal["state", "last", "group"] | None = None
    if STEP in last:
        home = "state" if first.get(STEP) == last[STEP] else "last"
    elif after.get(STEP) is not None:
        home = "group"
    return KeptStates(last, home)


def is_elementwise(optimizer: torch.optim.Optimizer, group: Group, like: Tensor) -> bool:
    """Whether an element's step is the same when it is stepped alone: else a ZeRO partition or a TP shard is not
    stepped as its parameter would be. To one part in a thousand, since kernels round in different orders."""
    generator = torch.Generator().manual_seed(0)
    values, gradients = torch.randn(2, 8, generator=generator).to(like.device, like.dtype)
    group = {**group, "lr": 1e-2} if "lr" in group else group  # a warm-up starts at 0, where nothing moves
    together = _dummy(values, gradients)
    _stepped(optimizer, group, [together])
    alone = [_dummy(values[i : i + 1], gradients[i : i + 1]) for i in range(len(values))]
    for dummy in alone:
        _stepped(optimizer, group, [dummy])
    steps = torch.cat([dummy.detach() for dummy in alone]) - values
    return torch.allclose(together.detach() - values, steps, rtol=1e-3, atol=1e-7)


def _dummy(value: Tensor, gradient: Tensor | None = None) -> nn.Parameter:
    dummy = nn.Parameter(value.detach().clone())
    dummy.grad = torch.zeros_like(dummy) if gradient is None else gradient.clone()
    return dummy


def _stepped(
    optimizer: torch.optim.Optimizer, group: Group, dummies: list[nn.Parameter]
) -> tuple[list[Mapping[str, Any]], Group]:
    """(the states the optimizer made for the dummies, the group after the step)."""
    groups = optimizer.param_groups
    # A copy of the group: some optimizers write into it.
    trial = {**group, "params": dummies}
    optimizer.param_groups = [trial]
    try:
        type(optimizer).step(optimizer)  # the class's method: no hooks of schedulers or engines
    finally:
        optimizer.param_groups = groups
    return [optimizer.state.pop(dummy, {}) for dummy in dummies], trial
