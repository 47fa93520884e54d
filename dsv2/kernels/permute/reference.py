"""Tokens to expert order and back, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sort_rows(experts: Tensor, num_experts: int, block_counts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`block_counts` would only save counting."""
    experts_M = experts.flatten()
    order_M = experts_M.argsort(stable=True)
    ends_E = (experts_M[:, None] == torch.arange(num_experts, device=experts.device)).sum(0).cumsum(0)
    return order_M.int(), _inverse(order_M).int(), ends_E.int()


def _inverse(order_M: Tensor) -> Tensor:
    places_M = torch.arange(len(order_M), dtype=order_M.dtype, device=order_M.device)
    return torch.empty_like(order_M).scatter_(0, order_M.long(), places_M)


class _Gather(torch.autograd.Function):
    """x[source]. Row t of x goes to the places `places_TA`[t] alone, so that its gradient is a gather and a sum.

    Autograd's own would add up in memory: slower, and with several threads in an order that varies.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, source_M: Tensor, places_TA: Tensor) -> Tensor:
        ctx.save_for_backward(places_TA)
        return x_TD.index_select(0, source_M)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (places_TA,) = ctx.saved_tensors
        rows_MD = grad_MD.index_select(0, places_TA.flatten())
        T, A = places_TA.shape
        return rows_MD if A == 1 else rows_MD.unflatten(0, (T, A)).sum(1), None, None


def gather_rows(x: Tensor, order: Tensor, inverse: Tensor, experts_per_token: int) -> Tensor:
    A = experts_per_token
    return _Gather.apply(x, order // A, inverse.view(len(x), A))


def combine_rows(rows: Tensor, inverse: Tensor, gates: Tensor, addend: Tensor | None = None) -> Tensor:
    rows_TAD = _Gather.apply(rows, inverse, _inverse(inverse)[:, None]).unflatten(0, gates.shape)
    if rows.dtype != torch.float64:
        rows_TAD = rows_TAD.float()
    out_TD = (rows_TAD * gates[:, :, None]).sum(1)
    if addend is not None:
        out_TD = out_TD + addend
    return out_TD.to(rows.dtype)
