"""SparseMixer: experts chosen one after the other, each weighed against those that are about as good.

    gates_tk, experts_tk = sparse_mixer(logits_te, topk=2, eps=0.01, is_training=True)

An expert is about as good as the best one that is left if its logit is below the best one's by at most 2 eps of the
best, or of its own absolute value where that is larger. In evaluation the best is chosen, and its weight is its
share in a softmax over those; the weights of a token's experts need not add up to 1. In training one of those is drawn
by its share, which has no derivative: the gradient is estimated as if the weight were the share, and a draw that is not
the best counts a third, but for every fourth one, which counts whole (Heun's third-order method). Source: Liu et al.
2024, GRIN: GRadient-INformed MoE, arXiv 2409.12136; Phi-3.5-MoE was trained so.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_mixer(logits: Tensor, topk: int, eps: float, is_training: bool) -> tuple[Tensor, Tensor]:
    """(weights, experts), each [..., topk], of logits [..., experts]. Training draws from torch's stream."""
    left, gates, experts = logits, [], []
    for _ in range(topk):
        with torch.no_grad():
            best, best_expert = left.max(-1, keepdim=True)
            is_far = (best - logits) / logits.abs().clamp(min=best) > 2 * eps
        near = left.masked_fill(is_far, float("-inf"))
        shares = near.softmax(-1)
        chosen = best_expert
        if is_training:
            chosen = (near - torch.empty_like(near).exponential_().log()).argmax(-1, keepdim=True)
        gate = shares.gather(-1, chosen)
        if is_training:
            counts_whole = (chosen == shares.argmax(-1, keepdim=True)) | (torch.rand_like(gate) > 0.75)
            gate = gate - (gate * torch.where(counts_whole, 0.0, 2 / 3)).detach()
        left = left.scatter(-1, chosen, float("-inf"))
        gates.append(gate)
        experts.append(chosen)
    return torch.cat(gates, -1), torch.cat(experts, -1)
