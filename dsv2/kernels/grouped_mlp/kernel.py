"""grouped_mlp in Triton: gate, up and SwiGLU in one launch, down in another, over rows sorted by expert.

A program owns one block of an expert's output channels and one tile of its rows. It streams the weights through the
bulk copy engine and gathers its rows itself, so that nothing is padded or copied. Few rows an expert: operands swapped,
weight rows as the 64-row side of the matrix instruction. Training keeps gate and up for the backward pass and runs
`grouped_mm` around a fused SwiGLU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv2.kernels.backend import check_aligned, early_launch, joined, kernel_op, num_multiprocessors, unit_stride
from dsv2.kernels.permute.kernel import combine_rows, gather_rows, sort_rows
from dsv2.kernels.swiglu.kernel import swiglu, swiglu_packed

UNSORTED_TOKENS = 4
"""Up to so many tokens every row is a tile of its own: experts rarely meet, and sorting would cost a launch."""


PERSISTENT_ROWS = 64
"""From so many rows an expert on, arithmetic is the limit and no longer the weights' bytes."""

MAX_DENSE_TOKENS = 16
"""Up to so many tokens two launches of ours beat the library's three and SwiGLU's; from 64 tokens on they do not."""


class Blocks(NamedTuple):
    """Tile of one launch: rows, output channels, depth; swapped operands; pipeline stages; warps."""

    BM: int
    BN: int
    BK: int
    swap: bool
    stages: int
    warps: int


@triton.jit
def _tile(ends, i_tile, E, BE: tl.constexpr, BM: tl.constexpr):
    """Expert, first row and end of the expert's rows of a tile; expert >= E: there is no such tile."""
    o_e = tl.arange(0, BE)
    m_e = o_e < E
    b_end = tl.load(ends + o_e, mask=m_e, other=0)
    b_start = tl.load(ends + o_e - 1, mask=m_e & (o_e > 0), other=0)
    b_tiles = tl.where(m_e, (b_end - b_start + BM - 1) // BM, 0)
    e = tl.sum((tl.cumsum(b_tiles, 0) <= i_tile).to(tl.int32))
    first_tile = tl.sum(tl.where(o_e < e, b_tiles, 0))
    row0 = tl.sum(tl.where(o_e == e, b_start, 0)) + (i_tile - first_tile) * BM
    return e, row0, tl.sum(tl.where(o_e == e, b_end, 0))


@triton.jit(do_not_specialize=["num_rows"])
def _grouped_linear_kernel(
    x, w_desc, up_desc, order, experts, ends, y, stride_x, num_rows, K, N, rows_an_expert, E, A,
    GATED: tl.constexpr, SORTED: tl.constexpr, GATHER: tl.constexpr, SWAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[m] = W_e x[source of m], or SiLU(W_e x) * U_e x where GATED; matrices [N, K], `rows_an_expert` rows apart."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    i_n = tl.program_id(0)
    i_tile = tl.program_id(1)
    if SORTED:
        e, row0, row_end = _tile(ends, i_tile, E, BE, BM)
    elif experts is not None:
        e = tl.load(experts + i_tile).to(tl.int32)
        row0 = i_tile
        row_end = i_tile + 1
    else:
        e = i_tile * 0
        row0 = i_tile * BM
        row_end = num_rows
    if e < E:
        o_m = row0 + tl.arange(0, BM)
        m_m = o_m < row_end
        source = o_m
        if GATHER:
            if SORTED:
                source = tl.load(order + o_m, mask=m_m, other=0)
            source = source // A
        o_k = tl.arange(0, BK)
        p_x = x + source.to(tl.int64)[:, None] * stride_x + o_k[None, :]
        w_row = e * rows_an_expert + i_n * BN
        shape: tl.constexpr = [BN, BM] if SWAP else [BM, BN]
        b_y = tl.zeros(shape, dtype=tl.float32)
        b_up = tl.zeros(shape, dtype=tl.float32)
        for k in tl.range(0, K, BK, num_stages=STAGES):
            b_x = tl.load(p_x + k, mask=m_m[:, None] & (k + o_k < K)[None, :], other=0.0)
            b_w = w_desc.load([w_row, k])
            if SWAP:
                b_y = tl.dot(b_w, tl.trans(b_x), b_y, input_precision="ieee")
            else:
                b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision="ieee")
            if GATED:
                b_w = up_desc.load([w_row, k])
                if SWAP:
                    b_up = tl.dot(b_w, tl.trans(b_x), b_up, input_precision="ieee")
                else:
                    b_up = tl.dot(b_x, tl.trans(b_w), b_up, input_precision="ieee")
        if GATED:
            b_y = b_y * tl.sigmoid(b_y) * b_up
        b_out = b_y.to(y.dtype.element_ty)
        if SWAP:
            b_out = tl.trans(b_out)
        o_n = i_n * BN + tl.arange(0, BN)
        tl.store(y + o_m.to(tl.int64)[:, None] * N + o_n[None, :], b_out, mask=m_m[:, None] & (o_n < N)[None, :])


@triton.jit
def _tiles_kernel(ends, tiles, E, BE: tl.constexpr, BM: tl.constexpr, PDL: tl.constexpr):
    """Row 0: how many tiles of BM rows there are; row 1 + i: expert, first row and end of its rows of tile i."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    i_e = tl.program_id(0)
    o_e = tl.arange(0, BE)
    b_end = tl.load(ends + o_e, mask=o_e < E, other=0)
    b_start = tl.load(ends + o_e - 1, mask=(o_e < E) & (o_e > 0), other=0)
    b_tiles = tl.where(o_e < E, (b_end - b_start + BM - 1) // BM, 0)
    first = tl.sum(tl.where(o_e < i_e, b_tiles, 0))
    row0 = tl.sum(tl.where(o_e == i_e, b_start, 0))
    row_end = tl.sum(tl.where(o_e == i_e, b_end, 0))
    if i_e == 0:
        tl.store(tiles, tl.sum(b_tiles))
    for i in range(tl.sum(tl.where(o_e == i_e, b_tiles, 0))):
        p_tile = tiles + (1 + first + i) * 4
        tl.store(p_tile, i_e)
        tl.store(p_tile + 1, row0 + i * BM)
        tl.store(p_tile + 2, row_end)


@triton.jit
def _grouped_persistent_kernel(
    x, w_desc, order, tiles, y, stride_x, K, N, A, NUM_PROGRAMS, GATED: tl.constexpr, GATHER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The same over sorted rows, tile after tile; w_desc: [E * (2), N, K], gate before up where GATED.

    The loops over tiles and depth are one, so that the next tile is on its way while this one is written. Gate and up
    are one product: with two accumulators the compiler would wait for every matrix instruction.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    PARTS: tl.constexpr = 2 if GATED else 1
    num_n = tl.cdiv(N, BN)
    total = tl.load(tiles) * num_n
    o_k = tl.arange(0, BK)
    for i in tl.range(tl.program_id(0), total, NUM_PROGRAMS, flatten=True, num_stages=STAGES):
        p_tile = tiles + (1 + i // num_n) * 4
        i_n = i % num_n
        e = tl.load(p_tile)
        o_m = tl.load(p_tile + 1) + tl.arange(0, BM)
        m_m = o_m < tl.load(p_tile + 2)
        source = o_m
        if GATHER:
            source = tl.load(order + o_m, mask=m_m, other=0) // A
        p_x = x + source.to(tl.int64)[:, None] * stride_x + o_k[None, :]
        b_y = tl.zeros([BM, PARTS * BN], dtype=tl.float32)
        for k in range(0, K, BK):
            b_x = tl.load(p_x + k, mask=m_m[:, None] & (k + o_k < K)[None, :], other=0.0)
            b_w = w_desc.load([e * PARTS, i_n * BN, k]).reshape(PARTS * BN, BK)
            b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision="ieee")
        if GATED:
            b_gate, b_up = tl.split(b_y.reshape(BM, 2, BN).permute(0, 2, 1))
            b_y = b_gate * tl.sigmoid(b_gate) * b_up
        o_n = i_n * BN + tl.arange(0, BN)
        p_y = y + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
        tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_m[:, None] & (o_n < N)[None, :])


def _linear(
    x: Tensor,
    weight: Tensor,
    up: Tensor | None,
    num_rows: int,
    blocks: Blocks,
    *,
    experts: Tensor | None = None,
    order: Tensor | None = None,
    ends: Tensor | None = None,
    gather: bool = False,
) -> Tensor:
    """One launch: [num_rows, N] from the rows of x, each through its expert's matrix of `weight` [E, N, K].

    With `up`, of weight's shape and strides: SwiGLU of the two products. With `ends` the rows are sorted; without, row
    m belongs to experts.flatten()[m], or all rows to one expert. `gather` reads row m from x[order[m] // A].
    """
    E, N, K = weight.shape
    A = 1 if experts is None else experts.shape[1]
    y = torch.empty(num_rows, N, dtype=x.dtype, device=x.device)
    BM, BN, BK, swap, stages, warps = blocks
    max_tiles = num_rows if experts is not None and ends is None else _max_tiles(num_rows, E, BM)
    if num_rows == 0:
        return y
    rows_an_expert = weight.stride(0) // K
    _grouped_linear_kernel[(triton.cdiv(N, BN), max_tiles)](
        x, _descriptor(weight, BN, BK), _descriptor(weight if up is None else up, BN, BK), order, experts, ends, y,
        x.stride(0), num_rows, K, N, rows_an_expert, E, A, GATED=up is not None, SORTED=ends is not None, GATHER=gather,
        SWAP=swap, BM=BM, BN=BN, BK=BK, BE=triton.next_power_of_2(E), STAGES=stages, num_warps=warps,
        **early_launch(x),
    )  # fmt: skip
    return y


def _persistent_linear(
    x: Tensor, weight: Tensor, num_rows: int, gated: bool, ends: Tensor, order: Tensor | None = None, A: int = 1
) -> Tensor:
    """The same for many sorted rows an expert: `weight` [E, N or (gated) 2N, K]; with `order` the rows are gathered."""
    E, width, K = weight.shape
    parts = 2 if gated else 1
    N = width // parts
    BM, BN, BK, stages = 128, 256 // parts, 64, 4 if gated else 3
    y = torch.empty(num_rows, N, dtype=x.dtype, device=x.device)
    max_tiles = _max_tiles(num_rows, E, BM)
    tiles = torch.empty(max_tiles + 1, 4, dtype=torch.int32, device=x.device)
    _tiles_kernel[(E,)](ends, tiles, E, BE=triton.next_power_of_2(E), BM=BM, num_warps=1, **early_launch(x))
    num_programs = min(num_multiprocessors(x.device), max_tiles * triton.cdiv(N, BN))
    w_desc = TensorDescriptor(weight, [E * parts, N, K], [N * K, K, 1], [parts, BN, BK])
    _grouped_persistent_kernel[(num_programs,)](
        x, w_desc, order, tiles, y, x.stride(0), K, N, A, num_programs, GATED=gated, GATHER=order is not None,
        BM=BM, BN=BN, BK=BK, STAGES=stages, num_warps=8, **early_launch(x),
    )  # fmt: skip
    return y


def _max_tiles(num_rows: int, num_experts: int, BM: int) -> int:
    """However the rows fall: every expert may end with a tile that is not full."""
    return min(num_rows, (num_rows + num_experts * (BM - 1)) // BM)


def _descriptor(weight: Tensor, BN: int, BK: int) -> TensorDescriptor:
    """All matrices below each other; between two of them may lie rows of something else."""
    E, N, K = weight.shape
    num_rows = (E - 1) * (weight.stride(0) // K) + N
    return TensorDescriptor(weight, [num_rows, K], [K, 1], [BN, BK])


def blocks_for(num_rows: int, num_experts: int, dtype: torch.dtype) -> tuple[Blocks, Blocks]:
    """Tiles of the gated and of the down launch by the mean number of rows an expert; measured on an H100.

    float32 has no matrix instruction of its precision, and half as many numbers fit shared memory: small tiles.
    """
    if dtype == torch.float32:
        return Blocks(32, 64, 32, False, 2, 4), Blocks(32, 64, 32, False, 2, 4)
    mean = num_rows / num_experts
    if mean <= 6:
        return Blocks(16, 64, 128, True, 4, 4), Blocks(16, 64, 128, True, 4, 4)
    if mean <= 12:
        return Blocks(32, 64, 128, True, 4, 4), Blocks(32, 64, 128, True, 3, 4)
    if mean <= 24:
        return Blocks(32, 64, 128, True, 2, 4), Blocks(32, 64, 128, True, 2, 4)
    # More than PERSISTENT_ROWS an expert go to the persistent kernel.
    return Blocks(64, 64, 128, True, 2, 4), Blocks(64, 128, 128, True, 2, 8)


@kernel_op("dsv2::grouped_mlp")
def _rows(
    x: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, order: Tensor | None, ends: Tensor | None
) -> Tensor:
    """What the experts make of their rows [M, D], sorted as `order` and `ends` say; without, row t * A + a is of t."""
    check_aligned("gate_up", gate_up)
    check_aligned("down", down)
    T, A = experts.shape
    M, E = T * A, len(down)
    x, experts = unit_stride(x), experts.contiguous()
    if order is not None and ends is not None and M >= PERSISTENT_ROWS * E and x.dtype != torch.float32:
        h = _persistent_linear(x, gate_up, M, True, ends, order, A)
        return _persistent_linear(h, down, M, False, ends)
    gate, up = gate_up.chunk(2, 1)
    first, second = blocks_for(M, E, x.dtype)
    h = _linear(x, gate, up, M, first, experts=experts, order=order, ends=ends, gather=True)
    return _linear(h, down, None, M, second, experts=experts, ends=ends)


@_rows.register_fake
def _(x, experts, gate_up, down, order, ends) -> Tensor:
    return x.new_empty(experts.numel(), x.shape[1])


def _inference(
    x: Tensor,
    experts: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    addend: Tensor | Callable[[], Tensor] | None,
    block_counts: Tensor | None,
) -> Tensor:
    order = inverse = ends = None
    if len(x) > UNSORTED_TOKENS:
        order, inverse, ends = sort_rows(experts, len(down), block_counts)
    rows = _rows(x, experts, gate_up, down, order, ends)
    return combine_rows(rows, inverse, gates, addend() if callable(addend) else addend)


@kernel_op("dsv2::swiglu_mlp")
def _dense(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """One expert that takes every row once."""
    for name, tensor in (("gate", gate), ("up", up), ("down", down)):
        check_aligned(name, tensor)
    T = len(x)
    x = unit_stride(x)
    first, second = blocks_for(T, 1, x.dtype)
    h = _linear(x, gate[None], up[None], T, first)
    return _linear(h, down[None], None, T, second)


@_dense.register_fake
def _(x, gate, up, down) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def swiglu_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    if _wants_gradients(x, gate, up, down):
        return F.linear(swiglu(F.linear(x, gate), F.linear(x, up)), down)
    if len(x) <= MAX_DENSE_TOKENS:
        return _dense(x, gate, up, down)
    if (gate_up := joined(gate, up)) is not None:
        return F.linear(swiglu_packed(F.linear(x, gate_up)), down)
    return F.linear(swiglu(F.linear(x, gate), F.linear(x, up)), down)


def _wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def grouped_mlp(
    x: Tensor,
    experts: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    addend: Tensor | Callable[[], Tensor] | None = None,
    block_counts: Tensor | None = None,
) -> Tensor:
    tensors = (x, gates, gate_up, down, *((addend,) if isinstance(addend, Tensor) else ()))
    if not _wants_gradients(*tensors):
        return _inference(x, experts, gates, gate_up, down, addend, block_counts)
    order, inverse, ends = sort_rows(experts, len(down), block_counts)
    rows = gather_rows(x, order, inverse, experts.shape[1])
    h = swiglu_packed(F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends))
    rows = F.grouped_mm(h, down.transpose(1, 2), offs=ends)
    return combine_rows(rows, inverse, gates, addend() if callable(addend) else addend)
