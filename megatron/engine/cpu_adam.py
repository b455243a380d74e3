"""AdamW on the CPU by torch's fused kernel, with the same rounding for every element wherever its tensor was cut.

    optimizer = AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

The kernel reads and writes each state once, which is several times faster than torch's default on a CPU, a pass over
memory for each operation. But it takes what is left over after the last whole vector register one by one, in
instructions that round otherwise. Under ZeRO and pipelines that would be other elements in every topology, and copies
of a tied weight would drift apart. So the left-over is stepped in a tensor that is filled up to whole registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

UNIT = 64
"""Elements; a multiple of every processor's vector register (16 fp32 of AVX-512). The kernel deals them to threads in
cache lines of 64 bytes (aten/src/ATen/native/cpu/FusedAdamKernel.cpp), so only the end of a tensor is left over."""


Closure = Callable[[], float] | None


class AdamW(torch.optim.AdamW):
    """Keeps what torch's AdamW keeps: exp_avg, exp_avg_sq and step of each parameter. All parameters are contiguous."""

    @torch.no_grad()
    def step(self, closure: Closure = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        stepped: list[tuple[Tensor, ...]] = []
        steps: list[Tensor] = []
        filled_up: list[tuple[Tensor, Tensor]] = []
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
            written = [tensor.view(-1) for tensor in (param.detach(), state["exp_avg"], state["exp_avg_sq"])]
            flats = (written[0], param.grad.reshape(-1), *written[1:])
            if not param.numel():
                state["step"] += 1  # as torch counts it
            whole = param.numel() // UNIT * UNIT
            if whole:
                stepped.append(tuple(flat[:whole] for flat in flats))
                steps.append(state["step"])
            if whole < param.numel():
                padded = tuple(flat.new_zeros(UNIT) for flat in flats)
                for full, flat in zip(padded, flats, strict=True):
                    full[: flat.numel() - whole] = flat[whole:]
                stepped.append(padded)
                steps.append(state["step"].clone() if whole else state["step"])
                filled_up += [(flats[i][whole:], padded[i]) for i in (0, 2, 3)]
        if not stepped:
            return
        params, gradients, averages, squares = (list(column) for column in zip(*stepped, strict=True))
        beta1, beta2 = group["betas"]
        adamw(
            params, gradients, averages, squares, [], steps,
            fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2,
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip
        for rest, full in filled_up:
            rest.copy_(full[: rest.numel()])
