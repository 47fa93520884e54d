"""Tokens to expert order and back, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def sort_rows(experts: Tensor, num_experts: int, block_counts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`block_counts` would only save counting."""
    experts_M = experts.flatten()
    order_M = experts_M.argsort(stable=True)
    inverse_M = torch.zeros_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=experts.device))
    ends_E = (experts_M[:, None] == torch.arange(num_experts, device=experts.device)).sum(0).cumsum(0)
    return order_M.int(), inverse_M.int(), ends_E.int()


def gather_rows(x: Tensor, order: Tensor, inverse: Tensor, experts_per_token: int) -> Tensor:
    return x.repeat_interleave(experts_per_token, dim=0)[order]


def combine_rows(rows: Tensor, inverse: Tensor, gates: Tensor, addend: Tensor | None = None) -> Tensor:
    T, A = gates.shape
    rows_TAD = rows[inverse].unflatten(0, (T, A))
    if rows.dtype != torch.float64:
        rows_TAD = rows_TAD.float()
    out_TD = (rows_TAD * gates[:, :, None]).sum(1)
    if addend is not None:
        out_TD = out_TD + addend
    return out_TD.to(rows.dtype)
