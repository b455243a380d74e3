"""What is put right in DeepSpeed's gradient norms and clipping: the same number under every topology.

Fp32GradNorm                                    # a base of our engines: ZeRO-0 in fp32
spare_fp64_copies(engine.optimizer)             # ZeRO-1 and ZeRO-2
align_group_norms(engine.optimizer)             # ZeRO-1 over pipeline stages
align_summed_norms(engine.optimizer, context)   # BF16_Optimizer
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import (
    combine_grad_norm_groups,
    is_model_parallel_parameter,
    mask_nan_or_inf_with_val_inplace,
)

from megatron.engine.expert_groups import expert_group_name
from megatron.parallel.agreement import gathered
from megatron.parallel.context import ParallelContext


class Fp32GradNorm:
    """Gradient norm and clipping for ZeRO-0 in fp32.

    DeepSpeed computes no norm there unless it clips, and with pipeline stages it clips by a norm over the wrong
    set of ranks (runtime/utils.py, clip_grad_norm_). The ZeRO wrappers are right and are left alone.
    """

    context: ParallelContext

    def _take_model_step(self, lr_kwargs: Mapping[str, Any] | None) -> None:
        if isinstance(self.optimizer, torch.optim.Optimizer):
            self._global_grad_norm = self._reduced_grad_norm()
        super()._take_model_step(lr_kwargs)

    def clip_fp32_gradients(self) -> None:
        # The same factor as torch.nn.utils.clip_grad_norm_ and DeepSpeed's ZeRO wrappers.
        factor = self.gradient_clipping() / (self._global_grad_norm + 1e-6)
        if factor < 1.0:
            for param in self.module.parameters():
                if param.grad is not None:
                    param.grad.mul_(factor)

    def _reduced_grad_norm(self) -> float:
        """L2 norm of the whole model's gradient, each element counted once. Collective over the world."""
        context, square = self.context, 0.0
        for param in self.module.parameters():
            is_copy = getattr(param, "ds_pipe_replicated", False) or (context.tp_rank > 0 and not param.model_parallel)
            if param.grad is not None and not is_copy:
                num_holders = context.edp_size if is_moe_param(param) else context.zero_size
                square += sum_of_squares(param.grad).item() / num_holders
        total = torch.tensor(square, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return math.sqrt(total.item())


ROW = 1024
"""Squares summed in fp32 before their sum is taken on in fp64: the norm of 23 million numbers is within 1e-9 of the one
computed in fp64 throughout, and costs a fifth of it."""


def sum_of_squares(gradient: torch.Tensor) -> torch.Tensor:
    """fp64, of all elements, without a copy in fp64 of more than a thousandth of them. inf and nan stay what they are.
    Local."""
    flat = gradient.detach().reshape(-1)
    in_rows = flat.numel() // ROW * ROW
    norms = torch.linalg.vector_norm(flat[:in_rows].view(-1, ROW), dim=1, dtype=torch.float32)
    return norms.double().square().sum() + flat[in_rows:].double().square().sum()


def spare_fp64_copies(optimizer: Any) -> None:
    """DeepSpeed's ZeRO-1 and ZeRO-2 widen each gradient to fp64 for its norm (stage_1_and_2.py, get_grad_norm_direct),
    which on a CPU costs more than the norm. The same norm by `sum_of_squares`. Local; what it sets is collective over
    the data and model parallel ranks, as before."""
    if not hasattr(optimizer, "bit16_groups"):
        return

    def get_grad_norm_direct(
        gradients: Iterable[torch.Tensor], params: Iterable[torch.nn.Parameter], norm_type: float = 2
    ) -> torch.Tensor:
        if norm_type != 2:
            raise ValueError(f"the norm of gradients is their L2 norm, not L{norm_type}")
        total = torch.zeros((), dtype=torch.float64, device=get_accelerator().current_device_name())
        of_params = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
        for gradient, param in zip(of_params, params, strict=False):  # the last one may be padding
            is_copy = getattr(param, "ds_pipe_replicated", False) or (
                optimizer.model_parallel_rank > 0 and not is_model_parallel_parameter(param)
            )
            if not is_copy:
                total += sum_of_squares(gradient)
        total = total.float()
        dist.all_reduce(total, group=optimizer.dp_process_group)
        optimizer._model_parallel_all_reduce(tensor=total, op=dist.ReduceOp.SUM)
        total = total.sqrt()
        mask_nan_or_inf_with_val_inplace(total, device=optimizer.device)
        return total

    optimizer.get_grad_norm_direct = get_grad_norm_direct


def align_group_norms(optimizer: Any) -> None:
    """DeepSpeed's ZeRO-1 reduces one norm per parameter group over the stages (stage_1_and_2.py, scaled_global_norm),
    and waits forever for a stage that has fewer: without biases to train, or without the vocabulary. Such a stage
    takes part with empty groups. Collective over the world.

    Norms of experts it then averages over edp, on which they are equal already: all that this does is to round, in a
    stage with experts and not in another one."""
    if not hasattr(optimizer, "bit16_groups"):
        return
    optimizer._average_expert_grad_norms = lambda norms: None
    num_groups = len(optimizer.bit16_groups)
    num_missing = max(gathered(num_groups)) - num_groups
    if num_missing == 0:
        return

    def norm_of(gradients: list[torch.Tensor], params: list[torch.nn.Parameter]) -> torch.Tensor:
        if optimizer.cpu_offload:
            return optimizer.complete_grad_norm_calculation_for_cpu_offload(params)
        return optimizer.get_grad_norm_direct(gradients, params)

    def scaled_global_norm(norm_type: int = 2) -> torch.Tensor:
        own = range(num_groups)
        norms = [norm_of(optimizer.averaged_gradients.get(i, []), optimizer.params_in_partition[i]) for i in own]
        norms += [norm_of([], []) for _ in range(num_missing)]
        # All at once, as the other stages do: roots of sums of roots would be rounded otherwise, and then copies of a
        # tied weight would be clipped otherwise.
        return combine_grad_norm_groups(norms, norm_type=norm_type)

    optimizer.scaled_global_norm = scaled_global_norm


def align_summed_norms(optimizer: BF16_Optimizer, context: ParallelContext) -> None:
    """BF16_Optimizer sums a norm of what is not experts over tp and the stages, and one more for each group of experts
    (runtime/utils.py, get_norm_with_moe_layers). It stops where a rank has nothing of the first kind, and waits forever
    for a stage with fewer of the second. So all groups of experts are one, and a rank that has nothing takes part with
    a zero. Collective over the world."""
    has_experts_anywhere = any(gathered(optimizer.has_moe_layers))
    gradients_for_norm = optimizer.get_grads_for_norm
    nothing = [torch.zeros(1, device=get_accelerator().current_device_name())]

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        if for_clipping:
            return gradients_for_norm(for_clipping=True)
        others, experts = gradients_for_norm()
        of_all = [gradient for group in experts.values() for gradient in group]
        return others or nothing, {expert_group_name(context): of_all or nothing} if has_experts_anywhere else {}

    optimizer.get_grads_for_norm = get_grads_for_norm
    if has_experts_anywhere and not optimizer.has_moe_layers:
        optimizer.has_moe_layers, optimizer.expert_gradients = True, {}
