"""Rows to expert order and back in Triton: a counting sort, and copies that go token by token both ways.

A program reads a token's row once and writes it to its A places, or reads the A places and writes the token: every
row crosses the bus once, and nothing is added up by two programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv2.kernels.backend import early_launch, kernel_op, unit_stride
from dsv2.kernels.route import ROUTE_BLOCK

MIN_PROGRAMS = 264
"""Two for each multiprocessor of an H100: a row is cut into shorter pieces until there are so many programs."""


@triton.jit(do_not_specialize=["T"])
def _count_rows_kernel(experts, counts, T, E, A: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    o_t = i_b * BT + tl.arange(0, BT)
    o_e = tl.arange(0, BE)
    m_t = o_t < T
    # [BT, BE]
    b_hits = tl.zeros([BT, BE], dtype=tl.int32)
    for i_a in tl.static_range(A):
        b_e = tl.load(experts + o_t * A + i_a, mask=m_t, other=-1).to(tl.int32)
        b_hits += (o_e[None, :] == b_e[:, None]).to(tl.int32)
    tl.store(counts + i_b * E + o_e, tl.sum(b_hits, 0), mask=o_e < E)


@triton.jit(do_not_specialize=["M", "num_blocks"])
def _sort_rows_kernel(
    experts, counts, order, inverse, ends, M, num_blocks, E, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BB: tl.constexpr, BE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program places the rows of BLOCKS blocks, ROWS rows each. M is below 2^31, so no offset needs 64 bits."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    i_p = tl.program_id(0)
    o_r = tl.arange(0, BR)
    o_c = tl.arange(0, BC)
    o_b = tl.arange(0, BB)
    o_e = tl.arange(0, BE)
    m_e = o_e < E
    # Asked for here, so that it arrives with the counts.
    o_m = i_p * BLOCKS * ROWS + o_r
    b_e = tl.load(experts + o_m, mask=(o_r < ROWS) & (o_m < M), other=0).to(tl.int32)

    # [BB, BE]
    b_all = tl.zeros([BB, BE], dtype=tl.int32)
    b_before = tl.zeros([BB, BE], dtype=tl.int32)
    for i_b in tl.range(0, num_blocks, BB, num_stages=STAGES):
        m_c = (i_b + o_b < num_blocks)[:, None] & m_e[None, :]
        b_counts = tl.load(counts + (i_b + o_b)[:, None] * E + o_e[None, :], mask=m_c, other=0)
        b_all += b_counts
        b_before += tl.where((i_b + o_b < i_p * BLOCKS)[:, None], b_counts, 0)
    b_total = tl.sum(b_all, 0)
    b_ends = tl.cumsum(b_total, 0)
    if i_p == 0:
        tl.store(ends + o_e, b_ends, mask=m_e)

    # The place of each expert's next row.
    b_next = b_ends - b_total + tl.sum(b_before, 0)
    for i in range(BLOCKS):
        i_b = i_p * BLOCKS + i
        i_m = i_b * ROWS
        o_m = i_m + o_r
        m_m = (o_r < ROWS) & (o_m < M)
        # [BR, BC], rows of the same expert that come before in this block
        b_rank = tl.zeros([BR, BC], dtype=tl.int32)
        for i_c in range(0, tl.minimum(ROWS, M - i_m), BC):
            b_other = tl.load(experts + i_m + i_c + o_c, mask=i_m + i_c + o_c < M, other=-1).to(tl.int32)
            b_rank += ((b_other[None, :] == b_e[:, None]) & ((i_c + o_c)[None, :] < o_r[:, None])).to(tl.int32)
        b_place = tl.gather(b_next, b_e, 0) + tl.sum(b_rank, 1)
        tl.store(inverse + o_m, b_place, mask=m_m)
        tl.store(order + b_place, o_m, mask=m_m)
        if i + 1 < BLOCKS:
            b_next += tl.load(counts + i_b * E + o_e, mask=m_e & (i_b < num_blocks), other=0)
            b_e = tl.load(experts + o_m + ROWS, mask=(o_r < ROWS) & (o_m + ROWS < M), other=0).to(tl.int32)


@triton.jit
def _spread_rows_kernel(x, inverse, y, stride_x, D, A: tl.constexpr, BD: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_x = tl.load(x + i_t * stride_x + o_d, mask=m_d, other=0.0)
    for i_a in tl.static_range(A):
        i_m = tl.load(inverse + i_t * A + i_a).to(tl.int64)
        tl.store(y + i_m * D + o_d, b_x, mask=m_d)


@triton.jit
def _sum_rows_kernel(
    rows, inverse, gates, addend, y, stride_rows, stride_addend, D, A: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr
):
    """Without `inverse` the rows lie in the order of tokens."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_y = tl.zeros([BD], dtype=tl.float32)
    for i_a in tl.static_range(A):
        i_m = i_t * A + i_a
        if inverse is not None:
            i_m = tl.load(inverse + i_m).to(tl.int64)
        b_row = tl.load(rows + i_m * stride_rows + o_d, mask=m_d, other=0.0).to(tl.float32)
        if gates is not None:
            b_row *= tl.load(gates + i_t * A + i_a)
        b_y += b_row
    if addend is not None:
        b_y += tl.load(addend + i_t * stride_addend + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(y + i_t * D + o_d, b_y.to(y.dtype.element_ty), mask=m_d)


@triton.jit
def _combine_rows_bwd_kernel(
    dy, rows, inverse, gates, drows, dgates, stride_dy, stride_rows, D, A: tl.constexpr, BD: tl.constexpr
):
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_dy = tl.load(dy + i_t * stride_dy + o_d, mask=m_d, other=0.0).to(tl.float32)
    for i_a in tl.static_range(A):
        i_m = tl.load(inverse + i_t * A + i_a).to(tl.int64)
        b_row = tl.load(rows + i_m * stride_rows + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_drow = tl.load(gates + i_t * A + i_a) * b_dy
        tl.store(drows + i_m * D + o_d, b_drow.to(drows.dtype.element_ty), mask=m_d)
        tl.store(dgates + i_t * A + i_a, tl.sum(b_dy * b_row))


def _piece(T: int, D: int) -> dict[str, int]:
    """How much of a row a program takes: up to 2048 numbers, fewer where few tokens would leave the GPU idle."""
    BD = min(triton.next_power_of_2(D), 2048)
    while BD > 256 and T * triton.cdiv(D, BD) < MIN_PROGRAMS:
        BD //= 2
    return {"BD": BD, "num_warps": max(BD // 512, 1)}


@kernel_op("dsv2::sort_rows")
def _sort(experts: Tensor, num_experts: int, block_counts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    experts = experts.contiguous()
    (T, A), E, BE = experts.shape, num_experts, max(triton.next_power_of_2(num_experts), 16)
    num_blocks = triton.cdiv(T, ROUTE_BLOCK)
    order = torch.empty(T * A, dtype=torch.int32, device=experts.device)
    inverse = torch.empty_like(order)
    ends = torch.empty(E, dtype=torch.int32, device=experts.device)
    if block_counts is None:
        counts = torch.empty(num_blocks, E, dtype=torch.int32, device=experts.device)
        if T:
            _count_rows_kernel[(num_blocks,)](experts, counts, T, E, A=A, BT=ROUTE_BLOCK, BE=BE, num_warps=8)
    else:
        counts = block_counts.contiguous()
    # Each program reads the counts of all blocks: few programs where there are many.
    if num_blocks <= 16:
        BLOCKS, BB, STAGES = 1, 16, 1
    else:
        BLOCKS, BB, STAGES = 1 if num_blocks <= 128 else 4, max(4096 // BE, 1), 4
    ROWS = ROUTE_BLOCK * A
    _sort_rows_kernel[(max(triton.cdiv(num_blocks, BLOCKS), 1),)](
        experts, counts, order, inverse, ends, T * A, num_blocks, E, ROWS=ROWS, BLOCKS=BLOCKS,
        BR=triton.next_power_of_2(ROWS), BC=16, BB=BB, BE=BE, STAGES=STAGES, num_warps=8, **early_launch(experts),
    )  # fmt: skip
    return order, inverse, ends


@_sort.register_fake
def _(experts: Tensor, num_experts: int, block_counts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    order = experts.new_empty(experts.numel(), dtype=torch.int32)
    return order, torch.empty_like(order), experts.new_empty(num_experts, dtype=torch.int32)


@kernel_op("dsv2::gather_rows")
def _gather(x: Tensor, inverse: Tensor, experts_per_token: int) -> Tensor:
    x, inverse = unit_stride(x), inverse.contiguous()
    T, D = x.shape
    y = torch.empty(len(inverse), D, dtype=x.dtype, device=x.device)
    if T:
        piece = _piece(T, D)
        grid = (T, triton.cdiv(D, piece["BD"]))
        _spread_rows_kernel[grid](x, inverse, y, x.stride(0), D, A=experts_per_token, **piece)
    return y


@_gather.register_fake
def _(x: Tensor, inverse: Tensor, experts_per_token: int) -> Tensor:
    return x.new_empty(len(inverse), x.shape[1])


def _sum(rows: Tensor, inverse: Tensor | None, gates: Tensor | None, addend: Tensor | None, T: int, A: int) -> Tensor:
    rows, inverse, D = unit_stride(rows), None if inverse is None else inverse.contiguous(), rows.shape[1]
    y = torch.empty(T, D, dtype=rows.dtype, device=rows.device)
    if T:
        piece = _piece(T, D)
        _sum_rows_kernel[(T, triton.cdiv(D, piece["BD"]))](
            rows, inverse, gates, addend, y, rows.stride(0), 0 if addend is None else addend.stride(0), D, A=A, **piece,
            **early_launch(rows),
        )  # fmt: skip
    return y


@kernel_op("dsv2::gather_rows_backward")
def _gather_backward(dy: Tensor, inverse: Tensor, experts_per_token: int) -> Tensor:
    return _sum(dy, inverse, None, None, len(dy) // experts_per_token, experts_per_token)


@_gather_backward.register_fake
def _(dy: Tensor, inverse: Tensor, experts_per_token: int) -> Tensor:
    return dy.new_empty(len(dy) // experts_per_token, dy.shape[1])


@kernel_op("dsv2::combine_rows")
def _combine(rows: Tensor, inverse: Tensor | None, gates: Tensor, addend: Tensor | None) -> Tensor:
    return _sum(rows, inverse, gates.contiguous(), None if addend is None else unit_stride(addend), *gates.shape)


@_combine.register_fake
def _(rows: Tensor, inverse: Tensor | None, gates: Tensor, addend: Tensor | None) -> Tensor:
    return rows.new_empty(len(gates), rows.shape[1])


@kernel_op("dsv2::combine_rows_backward")
def _combine_backward(dy: Tensor, rows: Tensor, inverse: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    dy, rows, inverse, gates = unit_stride(dy), unit_stride(rows), inverse.contiguous(), gates.contiguous()
    (T, A), (M, D) = gates.shape, rows.shape
    drows = torch.empty(M, D, dtype=rows.dtype, device=rows.device)
    dgates = torch.empty(T, A, dtype=torch.float32, device=rows.device)
    if T:
        BD = triton.next_power_of_2(D)
        _combine_rows_bwd_kernel[(T,)](
            dy, rows, inverse, gates, drows, dgates, dy.stride(0), rows.stride(0), D, A=A, BD=BD,
            num_warps=min(max(BD // 512, 1), 16),
        )  # fmt: skip
    return drows, dgates


@_combine_backward.register_fake
def _(dy: Tensor, rows: Tensor, inverse: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), gates.new_empty(gates.shape)


def _setup_gather(ctx, inputs, output) -> None:
    _, inverse, ctx.experts_per_token = inputs
    ctx.save_for_backward(inverse)


def _gradients_of_gather(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
    (inverse,) = ctx.saved_tensors
    return _gather_backward(dy, inverse, ctx.experts_per_token), None, None


_gather.register_autograd(_gradients_of_gather, setup_context=_setup_gather)


def _setup_combine(ctx, inputs, output) -> None:
    rows, inverse, gates, _ = inputs
    ctx.save_for_backward(rows, inverse, gates)


def _gradients_of_combine(ctx, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
    rows, inverse, gates = ctx.saved_tensors
    of_rows, _, of_gates, of_addend = ctx.needs_input_grad
    drows = dgates = None
    if of_rows or of_gates:
        drows, dgates = _combine_backward(dy, rows, inverse, gates)
    return drows, None, dgates, dy if of_addend else None


_combine.register_autograd(_gradients_of_combine, setup_context=_setup_combine)


def sort_rows(experts: Tensor, num_experts: int, block_counts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return _sort(experts, num_experts, block_counts)


def gather_rows(x: Tensor, order: Tensor, inverse: Tensor, experts_per_token: int) -> Tensor:
    """`inverse` says all that `order` does, and lets a program read a row of x once for all its places."""
    return _gather(x, inverse, experts_per_token)


def combine_rows(rows: Tensor, inverse: Tensor | None, gates: Tensor, addend: Tensor | None = None) -> Tensor:
    """Of rows in the order of tokens, for `inverse` None, without gradients of rows and gates."""
    return _combine(rows, inverse, gates, addend)
