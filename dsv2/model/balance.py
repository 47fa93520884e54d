"""Load balance: the three losses of DeepSeek-V2 section 2.2.3 (equations 23 to 31), and load statistics.

All of them read what the router decided, before any row is dropped. The alphas are the recipe's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv2.model.context import Routing


def balance_losses(routing: Routing, num_sequences: int, num_groups: int = 1, groups_per_token: int = 1) -> Tensor:
    """Expert, device and communication loss of one layer before their alphas, [3] fp32.

    Computed per sequence and averaged; rows are `num_sequences` sequences of equal length. Experts form `num_groups`
    groups, one a device, of which a token reaches at most `groups_per_token`. Each loss is 1 at perfect balance, the
    third where every token reaches exactly so many devices; with one device, which is always in balance, the last two
    are 1 without a gradient.

    Gradients flow through P (mean probability, over all experts, before any limit) alone: f is a count.
    """
    (T, E), A, G = routing.scores_TE.shape, routing.experts_TA.shape[1], num_groups
    if num_sequences < 1 or T % num_sequences:
        raise ValueError(f"{T} tokens do not divide into num_sequences={num_sequences}")
    scores_TE = routing.scores_TE
    chosen_TE = torch.zeros_like(scores_TE).scatter_(1, routing.experts_TA, 1.0)
    # Equations 24 and 25.
    f_BE = _sequence_means(chosen_TE, num_sequences) * (E / A)
    P_BE = _sequence_means(scores_TE, num_sequences)
    expert = _loss(f_BE, P_BE)
    if G == 1:
        return torch.stack([expert, *torch.ones_like(expert).expand(2)])
    # Equations 27 and 28, then 30; equation 31 is 28 again.
    f_device_BG = f_BE.unflatten(1, (G, -1)).mean(2)
    P_BG = P_BE.unflatten(1, (G, -1)).sum(2)
    f_sent_BG = _sequence_means(_sent(routing, G), num_sequences) * (G / groups_per_token)
    return torch.stack([expert, _loss(f_device_BG, P_BG), _loss(f_sent_BG, P_BG)])


def _sequence_means(x_TX: Tensor, num_sequences: int) -> Tensor:
    return x_TX.unflatten(0, (num_sequences, -1)).mean(1)


def _loss(f_BX: Tensor, P_BX: Tensor) -> Tensor:
    """Equations 23, 26 and 29: sum_i f_i P_i, mean over the sequences."""
    return (f_BX.detach() * P_BX).sum(1).mean()


def _sent(routing: Routing, num_groups: int) -> Tensor:
    """1 where a token is sent to a device, with one or more of its experts there; [T, G] fp32."""
    sent_TG = torch.zeros(len(routing.experts_TA), num_groups, device=routing.experts_TA.device)
    return sent_TG.scatter_(1, routing.groups_TA(num_groups), 1.0)


def expert_load(routing: Routing) -> Tensor:
    """Share of the routed rows that each expert received, [E] fp32; 1/E each when balanced."""
    return routing.block_counts.sum(0).float() / max(routing.experts_TA.numel(), 1)


def devices_per_token(routing: Routing, num_groups: int) -> Tensor:
    """On how many devices a token has experts, mean over the tokens, fp32."""
    return _sent(routing, num_groups).sum(1).mean()
