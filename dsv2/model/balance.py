"""Load balance: the expert-level loss (DeepSeek-V2 section 2.2.3, equations 23 to 25) and load statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv2.model.context import Routing


def expert_balance_loss(routing: Routing, num_sequences: int) -> Tensor:
    """sum_i f_i P_i of one layer, computed per sequence and averaged; 1 at perfect balance. Multiply by alpha_1.

    Rows are `num_sequences` sequences of equal length. Gradients flow through P (mean probability) alone; f (share
    of the tokens that chose expert i, times E/A) is a count. P uses the softmax over all experts, before any limit.
    """
    T, E = routing.scores_TE.shape
    A = routing.experts_TA.shape[1]
    if num_sequences < 1 or T % num_sequences:
        raise ValueError(f"{T} tokens do not divide into num_sequences={num_sequences}")
    chosen_TE = torch.zeros_like(routing.scores_TE).scatter_(1, routing.experts_TA, 1.0)
    f_BE = chosen_TE.unflatten(0, (num_sequences, -1)).mean(1) * (E / A)
    P_BE = routing.scores_TE.unflatten(0, (num_sequences, -1)).mean(1)
    return (f_BE.detach() * P_BE).sum(1).mean()


def expert_load(routing: Routing) -> Tensor:
    """Share of the routed rows that each expert received, [E] fp32; 1/E each when balanced."""
    return routing.block_counts.sum(0).float() / max(routing.experts_TA.numel(), 1)
