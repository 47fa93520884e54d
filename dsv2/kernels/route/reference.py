"""Routing in plain torch, as DeepSeek-V2 section 2.2 states it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROUTE_BLOCK = 32
"""Consecutive tokens whose choices are counted together: those of one program, where the kernel routes many."""


def route(
    h: Tensor,
    weight: Tensor,
    *,
    experts_per_token: int,
    num_groups: int = 1,
    groups_per_token: int = 1,
    normalize: bool = False,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores_TE = F.linear(_fp32(h), _fp32(weight)).softmax(-1)
    eligible_TE = scores_TE
    if num_groups > 1:
        group_scores_TG = scores_TE.unflatten(1, (num_groups, -1)).amax(-1)
        chosen_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
        chosen_TG.scatter_(1, _top(group_scores_TG, groups_per_token), True)
        chosen_TE = chosen_TG.repeat_interleave(scores_TE.shape[1] // num_groups, dim=1)
        eligible_TE = scores_TE.masked_fill(~chosen_TE, float("-inf"))
    experts_TA = _top(eligible_TE, experts_per_token)
    gates_TA = scores_TE.gather(1, experts_TA)
    # As in the official code, renormalised gates are not scaled.
    renormalized = normalize and experts_per_token > 1
    gates_TA = gates_TA / gates_TA.sum(-1, keepdim=True) if renormalized else gates_TA * scaling
    return scores_TE, experts_TA, gates_TA, _block_counts(experts_TA, len(weight))


def _fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _top(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest, the lowest index first among equals (`topk` promises no order)."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :k]


def _block_counts(experts_TA: Tensor, num_experts: int) -> Tensor:
    """How often the tokens of each block chose each expert, [T / ROUTE_BLOCK, E] int32; no token twice the same."""
    T = len(experts_TA)
    num_blocks = -(-T // ROUTE_BLOCK)
    chosen_TE = torch.zeros(num_blocks * ROUTE_BLOCK, num_experts, dtype=torch.int32, device=experts_TA.device)
    chosen_TE[:T].scatter_(1, experts_TA, 1)
    return chosen_TE.view(num_blocks, ROUTE_BLOCK, num_experts).sum(1, dtype=torch.int32)
