"""RMSNorm in Triton: rows side by side forward; backward gives dx, and partial weight gradients by group of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2.kernels.backend import kernel_op

MULTIPROCESSORS = 132
"""Of an H100. Fixed, so that the order in which weight gradients are added does not depend on the machine."""


@triton.jit
def inverse_rms(b_x, eps, D: tl.constexpr):
    """[BT, BD] fp32, 0 beyond D -> [BT, 1]."""
    return tl.rsqrt(tl.sum(b_x * b_x, axis=1, keep_dims=True) / D + eps)


@triton.jit(do_not_specialize=["T"])
def _rms_norm_fwd_kernel(x, w, y, rms, stride_x, T, eps, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    o_d = tl.arange(0, BD)[None, :]
    m_t, m_d = o_t < T, o_d < D
    # All loads are on their way before the first is waited for. [BT, BD] and [1, BD]
    b_x = tl.load(x + o_t * stride_x + o_d, mask=m_t & m_d, other=0.0).to(tl.float32)
    b_w = tl.load(w + o_d, mask=m_d, other=0.0)
    b_rms = inverse_rms(b_x, eps, D)
    tl.store(rms + o_t, b_rms, mask=m_t)
    tl.store(y + o_t * D + o_d, (b_x * b_rms).to(y.dtype.element_ty) * b_w, mask=m_t & m_d)


@triton.jit(do_not_specialize=["T", "rows"])
def _rms_norm_bwd_kernel(
    x, w, rms, dy, dx_other, dx, dw, stride_x, stride_dy, stride_other, T, rows,
    D: tl.constexpr, BD: tl.constexpr, HAS_OTHER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_w = tl.load(w + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BD], dtype=tl.float32)
    for i in tl.range(0, rows, num_stages=STAGES):
        i_t = i_g * rows + i
        m = m_d & (i_t < T)
        b_x = tl.load(x + i_t * stride_x + o_d, mask=m, other=0.0).to(tl.float32)
        b_dy = tl.load(dy + i_t * stride_dy + o_d, mask=m, other=0.0).to(tl.float32)
        b_rms = tl.load(rms + i_t, mask=i_t < T, other=0.0)
        b_n = b_x * b_rms
        b_dn = b_dy * b_w
        b_dx = (b_dn - b_n * (tl.sum(b_dn * b_n) / D)) * b_rms
        if HAS_OTHER:
            b_dx += tl.load(dx_other + i_t * stride_other + o_d, mask=m, other=0.0).to(tl.float32)
        tl.store(dx + i_t * D + o_d, b_dx.to(dx.dtype.element_ty), mask=m)
        b_dw += b_dy * b_n
    tl.store(dw + i_g * D + o_d, b_dw, mask=m_d)


@triton.jit(do_not_specialize=["G"])
def _rms_norm_dw_kernel(partial, dw, G, D: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr):
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)[None, :]
    o_g = tl.arange(0, BG).to(tl.int64)[:, None]
    m_d = o_d < D
    # [BG, BD]
    b_dw = tl.zeros([BG, BD], dtype=tl.float32)
    for i in range(0, G, BG):
        b_dw += tl.load(partial + (i + o_g) * D + o_d, mask=(i + o_g < G) & m_d, other=0.0)
    tl.store(dw + o_d, tl.sum(b_dw, axis=0, keep_dims=True).to(dw.dtype.element_ty), mask=m_d)


def rows_of(x: Tensor) -> Tensor:
    """[T, D] with unit stride along D; a copy only where a view cannot do it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def blocks(D: int) -> dict[str, int]:
    """How a forward program covers its rows: by the width alone, so that a row's bits do not depend on its batch.

    Rows of up to 512 channels stay within a warp, which then takes several.
    """
    BD = triton.next_power_of_2(D)
    return {"BD": BD, "BT": max(1024 // BD, 1), "num_warps": _num_warps(BD)}


def _num_warps(BD: int) -> int:
    return min(max(BD // 512, 1), 16)


@kernel_op("dsv2::rms_norm")
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = rows_of(x)
    T, D = rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rms = torch.empty(T, dtype=torch.float32, device=x.device)
    if T:
        b = blocks(D)
        grid = (triton.cdiv(T, b["BT"]),)
        _rms_norm_fwd_kernel[grid](rows, weight.contiguous(), y, rms, rows.stride(0), T, eps, D=D, **b)
    return y, rms


@_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    T = x.numel() // x.shape[-1]
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(T, dtype=torch.float32)


@kernel_op("dsv2::rms_norm_backward")
def rms_norm_backward(
    x: Tensor, weight: Tensor, rms: Tensor, dy: Tensor, dx_other: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the gain; `dx_other`, which reaches x past the norm, is added before dx is rounded."""
    rows, dy_rows = rows_of(x), rows_of(dy)
    other = dy_rows if dx_other is None else rows_of(dx_other)
    T, D = rows.shape
    BD = triton.next_power_of_2(D)
    num_warps = _num_warps(BD)
    # As many programs as an H100 runs at once, each with its share of the rows.
    rows_each = max(triton.cdiv(T, MULTIPROCESSORS * min(16 // num_warps, 8)), 1)
    num_groups = triton.cdiv(T, rows_each)
    # Rows in flight ahead of the current one wait in shared memory, where three of the widest must fit twice.
    stages = 3 if BD * x.element_size() <= 32768 else 1
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(num_groups, D, dtype=torch.float32, device=x.device)
    dw = torch.empty(D, dtype=weight.dtype, device=x.device)
    if T:
        _rms_norm_bwd_kernel[(num_groups,)](
            rows, weight.contiguous(), rms, dy_rows, other, dx, partial,
            rows.stride(0), dy_rows.stride(0), other.stride(0), T, rows_each,
            D=D, BD=BD, HAS_OTHER=dx_other is not None, STAGES=stages, num_warps=num_warps,
        )  # fmt: skip
    _rms_norm_dw_kernel[(triton.cdiv(D, 16),)](partial, dw, num_groups, D=D, BG=128, BD=16, num_warps=4)
    return dx, dw


@rms_norm_backward.register_fake
def _(x: Tensor, weight: Tensor, rms: Tensor, dy: Tensor, dx_other: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, dy: Tensor, _drms: Tensor | None) -> tuple[Tensor, Tensor, None]:
    x, weight, rms = ctx.saved_tensors
    return *rms_norm_backward(x, weight, rms, dy, None), None


_forward.register_autograd(_gradients, setup_context=_setup)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _forward(x, weight, eps)[0]
