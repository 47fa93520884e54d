"""Routed experts in plain torch: rows in expert order through their expert, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.kernels.permute.reference import combine_rows, gather_rows, sort_rows
from dsv2.kernels.swiglu.reference import swiglu, swiglu_packed


def grouped_mlp(
    x: Tensor,
    experts: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    addend: Tensor | None = None,
    block_counts: Tensor | None = None,
) -> Tensor:
    order_M, inverse_M, ends_E = sort_rows(experts, len(down))
    rows_MD = gather_rows(x, order_M, inverse_M, experts.shape[1])
    h_MF = swiglu_packed(_grouped_linear(rows_MD, gate_up, ends_E))
    out_MD = _grouped_linear(h_MF, down, ends_E)
    return combine_rows(out_MD, inverse_M, gates, addend)


def _grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Row m times the transposed matrix of its expert; expert e owns the rows ends[e-1]:ends[e]."""
    if rows.dtype != torch.float64:
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([x @ w.T for x, w in zip(rows.split(sizes), weight, strict=True)])


def swiglu_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(swiglu(F.linear(x, gate), F.linear(x, up)), down)
