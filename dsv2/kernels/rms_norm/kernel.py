"""RMSNorm in Triton: one program a row forward; backward gives dx, and partial weight gradients by group of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_A_GROUP = 32
"""Rows whose weight gradients one program adds up. Fixed, so that the order of additions is too."""


@triton.jit
def _rms_norm_fwd_kernel(x, w, y, rms, stride_x, D, eps, BD: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_x = tl.load(x + i_t * stride_x + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_rms = 1.0 / tl.sqrt(tl.sum(b_x * b_x) / D + eps)
    b_w = tl.load(w + o_d, mask=m_d, other=0.0)
    tl.store(rms + i_t, b_rms)
    b_y = (b_x * b_rms).to(y.dtype.element_ty) * b_w
    tl.store(y + i_t * D + o_d, b_y.to(y.dtype.element_ty), mask=m_d)


@triton.jit
def _rms_norm_bwd_kernel(x, w, rms, dy, dx, dw, stride_x, stride_dy, T, D, BD: tl.constexpr, ROWS: tl.constexpr):
    i_g = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_w = tl.load(w + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BD], dtype=tl.float32)
    for i in range(ROWS):
        i_t = i_g * ROWS + i
        m = m_d & (i_t < T)
        b_x = tl.load(x + i_t * stride_x + o_d, mask=m, other=0.0).to(tl.float32)
        b_dy = tl.load(dy + i_t * stride_dy + o_d, mask=m, other=0.0).to(tl.float32)
        b_rms = tl.load(rms + i_t, mask=i_t < T, other=0.0)
        b_n = b_x * b_rms
        b_dn = b_dy * b_w
        b_dx = (b_dn - b_n * (tl.sum(b_dn * b_n) / D)) * b_rms
        tl.store(dx + i_t * D + o_d, b_dx.to(dx.dtype.element_ty), mask=m)
        b_dw += b_dy * b_n
    tl.store(dw + i_g * D + o_d, b_dw, mask=m_d)


def _rows(x: Tensor) -> Tensor:
    """[T, D] with unit stride along D; a copy only where a view cannot do it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@torch.library.custom_op("dsv2::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = _rows(x)
    T, D = rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rms = torch.empty(T, dtype=torch.float32, device=x.device)
    if T:
        BD = triton.next_power_of_2(D)
        _rms_norm_fwd_kernel[(T,)](
            rows, weight.contiguous(), y, rms, rows.stride(0), D, eps, BD=BD, num_warps=_num_warps(BD)
        )
    return y, rms


@_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    T = x.numel() // x.shape[-1]
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(T, dtype=torch.float32)


@torch.library.custom_op("dsv2::rms_norm_backward", mutates_args=())
def _backward(x: Tensor, weight: Tensor, rms: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    rows, dy_rows = _rows(x), _rows(dy)
    T, D = rows.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_groups = triton.cdiv(T, ROWS_A_GROUP)
    dw = torch.empty(num_groups, D, dtype=torch.float32, device=x.device)
    if T:
        BD = triton.next_power_of_2(D)
        _rms_norm_bwd_kernel[(num_groups,)](
            rows, weight.contiguous(), rms, dy_rows, dx, dw, rows.stride(0), dy_rows.stride(0), T, D, BD=BD,
            ROWS=ROWS_A_GROUP, num_warps=_num_warps(BD),
        )  # fmt: skip
    return dx, dw.sum(0).to(weight.dtype)


@_backward.register_fake
def _(x: Tensor, weight: Tensor, rms: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight)


def _setup(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, dy: Tensor, _drms: Tensor | None) -> tuple[Tensor, Tensor, None]:
    x, weight, rms = ctx.saved_tensors
    dx, dw = _backward(x, weight, rms, dy)
    return dx, dw, None


_forward.register_autograd(_gradients, setup_context=_setup)


def _num_warps(BD: int) -> int:
    return min(max(BD // 512, 1), 16)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _forward(x, weight, eps)[0]
