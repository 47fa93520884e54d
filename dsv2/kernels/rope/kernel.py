"""Rotary position embedding in Triton: a program turns a tile of rows by heads. The backward is the same kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2.kernels.backend import kernel_op, unit_stride


@triton.jit
def rotate_rows(
    x, y, cos, sin, m_x, m_y, BN: tl.constexpr, R: tl.constexpr, BR: tl.constexpr,
    INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Pointers to BN rows of input, output and tables [BN, 1]; masks [BN, 1] say which to read and which to write."""
    o_i = tl.arange(0, BR // 2)[None, :]
    m_i = o_i < R // 2
    # [BN, BR/2]
    b_cos = tl.load(cos + o_i, mask=m_x & m_i, other=0.0)
    b_sin = tl.load(sin + o_i, mask=m_x & m_i, other=0.0)
    if TRANSPOSED:
        b_sin = -b_sin
    if INTERLEAVED:
        # Whole rows are read and written, so that accesses stay wide; pairs come apart in registers.
        o_r = tl.arange(0, BR)[None, :]
        m_r = o_r < R
        b_x = tl.load(x + o_r, mask=m_x & m_r, other=0.0).to(tl.float32)
        b_a, b_b = tl.split(tl.reshape(b_x, [BN, BR // 2, 2]))
        b_y = tl.join(b_a * b_cos - b_b * b_sin, b_a * b_sin + b_b * b_cos)
        tl.store(y + o_r, tl.reshape(b_y, [BN, BR]).to(y.dtype.element_ty), mask=m_y & m_r)
    else:
        b_a = tl.load(x + o_i, mask=m_x & m_i, other=0.0).to(tl.float32)
        b_b = tl.load(x + R // 2 + o_i, mask=m_x & m_i, other=0.0).to(tl.float32)
        tl.store(y + o_i, (b_a * b_cos - b_b * b_sin).to(y.dtype.element_ty), mask=m_y & m_i)
        tl.store(y + R // 2 + o_i, (b_a * b_sin + b_b * b_cos).to(y.dtype.element_ty), mask=m_y & m_i)


@triton.jit(do_not_specialize=["T"])
def _rope_kernel(
    x, cos, sin, y, stride_t, stride_h, stride_yt, stride_yh, T, H: tl.constexpr, R: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr, INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    num_blocks_h: tl.constexpr = (H + BH - 1) // BH
    i_t = tl.program_id(0) // num_blocks_h
    i_h = tl.program_id(0) % num_blocks_h
    # Rows and heads flattened. [BT * BH, 1]
    o_n = tl.arange(0, BT * BH)[:, None]
    o_t = i_t.to(tl.int64) * BT + o_n // BH
    o_h = (i_h * BH + o_n % BH).to(tl.int64)
    m = (o_t < T) & (o_h < H)
    rotate_rows(
        x + o_t * stride_t + o_h * stride_h, y + o_t * stride_yt + o_h * stride_yh,
        cos + o_t * (R // 2), sin + o_t * (R // 2), m, m, BT * BH, R, BR, INTERLEAVED, TRANSPOSED,
    )  # fmt: skip


@kernel_op("dsv2::rope")
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str, transposed: bool) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(unit_stride(x), y, cos, sin, layout, transposed)
    return y


@kernel_op("dsv2::rope_", mutates_args=("x",))
def _rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> None:
    _launch(x, x, cos, sin, layout, False)


def _launch(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, layout: str, transposed: bool) -> None:
    T, H, R = x.shape
    if x.numel():
        BR = triton.next_power_of_2(R)
        # One access of 16 bytes a thread, where the dtype has two bytes.
        BN = max(2048 // BR, 1)
        BH = min(triton.next_power_of_2(H), BN)
        BT = BN // BH
        _rope_kernel[(triton.cdiv(T, BT) * triton.cdiv(H, BH),)](
            x, cos.contiguous(), sin.contiguous(), y, x.stride(0), x.stride(1), y.stride(0), y.stride(1), T, H=H, R=R,
            BT=BT, BH=BH, BR=BR, INTERLEAVED=layout == "interleaved", TRANSPOSED=transposed, num_warps=8,
        )  # fmt: skip


@_rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, layout: str, transposed: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup(ctx, inputs, output) -> None:
    _, cos, sin, ctx.layout, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin)


def _gradient(ctx, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
    return _rotate(dy, *ctx.saved_tensors, ctx.layout, not ctx.transposed), None, None, None, None


_rotate.register_autograd(_gradient, setup_context=_setup)


def rope(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    return _rotate(x, cos, sin, layout, False)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> None:
    _rotate_in_place(x, cos, sin, layout)
