"""Rows of tokens to expert order and back: what lies around the routed experts of DeepSeekMoE (section 2.2.1).

Token t and its a-th expert are row t*A + a of M = T*A. Sorted stably by expert, that row is at place inverse[t*A + a],
and expert e owns the places ends[e-1]:ends[e]. No step adds anything up in an order that varies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv2.kernels.backend import (
    FLOATS,
    REFERENCE_FLOATS,
    check_dtype,
    check_positive,
    check_same_device,
    check_shape,
    use_kernel,
)
from dsv2.kernels.route import ROUTE_BLOCK


def sort_rows(experts: Tensor, num_experts: int, block_counts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A stable counting sort of the rows by expert, without a host synchronisation.

    Args:
        experts: [T, A] int64, all in [0, num_experts); a token may name one twice.
        block_counts: [ceil(T / ROUTE_BLOCK), E] int32, the counts that `route` returned for these experts; without
            them they are counted first.

    Returns order [M] int32, the row at each sorted place; inverse [M] int32, the place of each row; and ends [E] int32.
    Raises ValueError where the arguments do not match.
    """
    check_shape("experts", experts, None, None)
    check_dtype("experts", experts, torch.int64)
    check_positive("the width of experts", experts.shape[1])
    check_positive("num_experts", num_experts)
    if block_counts is not None:
        check_shape("block_counts", block_counts, -(-len(experts) // ROUTE_BLOCK), num_experts)
        check_dtype("block_counts", block_counts, torch.int32)
        check_same_device("block_counts", block_counts, "experts", experts)
    if not use_kernel(experts):
        from dsv2.kernels.permute.reference import sort_rows as run
    else:
        from dsv2.kernels.permute.kernel import sort_rows as run
    return run(experts, num_experts, block_counts)


def gather_rows(x: Tensor, order: Tensor, inverse: Tensor, experts_per_token: int) -> Tensor:
    """Tokens in expert order: row m is x[order[m] // A].

    Args:
        x: [T, D], float32, float16 or bfloat16 (float64 in the reference); rows may be strided.
        order, inverse: [M] int32, from `sort_rows`.

    Returns [M, D]. Differentiable in x; the gradient of a token is the sum over its rows in fp32, rounded once. Raises
    ValueError where the arguments do not match.
    """
    check_shape("x", x, None, None)
    check_positive("the width of x", x.shape[1])
    check_positive("experts_per_token", experts_per_token)
    M = len(x) * experts_per_token
    _check_places("order", order, M, "x", x)
    _check_places("inverse", inverse, M, "x", x)
    if not use_kernel(x):
        check_dtype("x", x, *REFERENCE_FLOATS)
        from dsv2.kernels.permute.reference import gather_rows as run
    else:
        check_dtype("x", x, *FLOATS)
        from dsv2.kernels.permute.kernel import gather_rows as run
    return run(x, order, inverse, experts_per_token)


def combine_rows(rows: Tensor, inverse: Tensor, gates: Tensor, addend: Tensor | None = None) -> Tensor:
    """Back in token order: out[t] = sum over a of gates[t, a] * rows[inverse[t*A + a]], plus addend[t].

    Args:
        rows: [M, D], float32, float16 or bfloat16 (float64 in the reference), in expert order; may be strided.
        inverse: [M] int32, from `sort_rows`.
        gates: [T, A] float32 (float64 in the reference).
        addend: [T, D] of the dtype of rows, the output of the shared experts.

    Returns [T, D], added up in fp32 and rounded once to the dtype of rows. Differentiable in rows, gates and addend.
    Raises ValueError where the arguments do not match.
    """
    check_shape("gates", gates, None, None)
    check_positive("the width of gates", gates.shape[1])
    check_shape("rows", rows, gates.numel(), None)
    check_positive("the width of rows", rows.shape[1])
    check_same_device("gates", gates, "rows", rows)
    _check_places("inverse", inverse, len(rows), "rows", rows)
    if addend is not None:
        check_shape("addend", addend, len(gates), rows.shape[1])
        check_dtype("addend", addend, rows.dtype)
        check_same_device("addend", addend, "rows", rows)
    if not use_kernel(rows):
        check_dtype("rows", rows, *REFERENCE_FLOATS)
        check_dtype("gates", gates, torch.float32, torch.float64)
        from dsv2.kernels.permute.reference import combine_rows as run
    else:
        check_dtype("rows", rows, *FLOATS)
        check_dtype("gates", gates, torch.float32)
        from dsv2.kernels.permute.kernel import combine_rows as run
    return run(rows, inverse, gates, addend)


def _check_places(name: str, places: Tensor, num_rows: int, other_name: str, other: Tensor) -> None:
    check_shape(name, places, num_rows)
    check_dtype(name, places, torch.int32)
    check_same_device(name, places, other_name, other)
