"""A mixture of experts in plain torch, token by token and choice by choice: the truth for the router and the layer.

routing = route(model, router_weight, x_bsh, is_training=True)
y_bsh, loss = moe(model, atoms, x_bsh)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PlainRouting:
    experts: list[list[list[int]]]
    """By sequence, position and k; -1 where dropped."""
    gates: Tensor
    """[b, s, k]"""
    balance: Tensor
    z: Tensor


def route(model, weight: Tensor, x: Tensor, is_training: bool = True) -> PlainRouting:
    num_experts, k = weight.shape[0], model.topk
    logits = x @ weight.T
    if model.moe_router_score_function == "softmax":
        scores = logits.exp() / logits.exp().sum(-1, keepdim=True)
        probs = scores
    else:
        scores = 1 / (1 + (-logits).exp())
        probs = scores / scores.sum(-1, keepdim=True)
    experts = scores.detach().sort(-1, descending=True).indices[..., :k]
    gates = scores.gather(-1, experts)
    if model.moe_normalize_topk and k > 1:
        gates = gates / gates.sum(-1, keepdim=True)
    num_samples, length = x.shape[:2]
    balance = 0.0
    for sample in range(num_samples):
        for expert in range(num_experts):
            share = (experts[sample] == expert).sum().item() / (length * k)
            balance = balance + num_experts * share * probs[sample, :, expert].sum() / length / num_samples
    z = (logits.exp().sum(-1).log() ** 2).sum() / (num_samples * length)
    return PlainRouting(_kept(model, experts.tolist(), num_experts, is_training), gates, balance, z)


def _kept(model, experts: list, num_experts: int, is_training: bool) -> list:
    factor = model.moe_train_capacity_factor
    if not is_training and model.moe_eval_capacity_factor is not None:
        factor = model.moe_eval_capacity_factor
    if factor is None:
        return experts
    for sample in experts:
        room = max(model.moe_min_capacity, math.ceil(factor * len(sample) * model.topk / num_experts))
        left = [room] * num_experts
        for k in range(model.topk):
            for choices in sample:
                left[choices[k]] -= 1
                if left[choices[k]] < 0:
                    choices[k] = -1
    return experts


def _gelu(y: Tensor, is_exact: bool) -> Tensor:
    if is_exact:
        return 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))


def _mlp(model, x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None) -> Tensor:
    y = x @ up.T + (0 if up_bias is None else up_bias)
    if model.swiglu:
        gate, value = y.tensor_split(2, -1)
        y = gate / (1 + (-gate).exp()) * value
    else:
        y = _gelu(y, model.exact_gelu)
    return y @ down.T + (0 if down_bias is None else down_bias)


def moe(model, a, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the layer's loss (the mean over all sequences, with its coefficients)."""
    routing = route(model, a["router.weight"], x)
    num_experts = a["router.weight"].shape[0]
    by_expert = [
        _mlp(
            model,
            x,
            a["experts.dense_h_to_4h"][e],
            a["experts.bias_h_to_4h"][e] if model.add_bias_linear else None,
            a["experts.dense_4h_to_h"][e],
            a["experts.bias_4h_to_h"][e] if model.add_bias_linear else None,
        )
        for e in range(num_experts)
    ]
    y = torch.zeros_like(x)
    chosen = torch.tensor(routing.experts)
    for expert, of_expert in enumerate(by_expert):
        for k in range(model.topk):
            y = y + torch.where(chosen[..., k] == expert, routing.gates[..., k], 0.0).unsqueeze(-1) * of_expert
    if model.moe_shared_expert_intermediate_size:
        up, down = "shared_expert.dense_h_to_4h", "shared_expert.dense_4h_to_h"
        weights = (a[f"{up}.weight"], a.get(f"{up}.bias"), a[f"{down}.weight"], a.get(f"{down}.bias"))
        y = y + _mlp(model, x, *weights)
    return y, model.moe_aux_loss_coeff * routing.balance + model.moe_z_loss_coeff * routing.z
