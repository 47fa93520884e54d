"""Sum and RMSNorm in Triton. The backward is RMSNorm's, which adds the gradient of the total on its way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv2.kernels.backend import early_launch, kernel_op
from dsv2.kernels.rms_norm.kernel import blocks, inverse_rms, rms_norm_backward, rows_of


@triton.jit(do_not_specialize=["T"])
def _add_rms_norm_fwd_kernel(
    x, residual, w, y, total, rms, stride_x, stride_residual, T, eps,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    o_d = tl.arange(0, BD)[None, :]
    m_t, m_d = o_t < T, o_d < D
    m = m_t & m_d
    # All loads are on their way before the first is waited for. [BT, BD] and [1, BD]
    b_x = tl.load(x + o_t * stride_x + o_d, mask=m, other=0.0).to(tl.float32)
    b_residual = tl.load(residual + o_t * stride_residual + o_d, mask=m, other=0.0).to(tl.float32)
    b_w = tl.load(w + o_d, mask=m_d, other=0.0)
    b_total = (b_x + b_residual).to(total.dtype.element_ty)
    tl.store(total + o_t * D + o_d, b_total, mask=m)
    b_x = b_total.to(tl.float32)
    b_rms = inverse_rms(b_x, eps, D)
    tl.store(rms + o_t, b_rms, mask=m_t)
    tl.store(y + o_t * D + o_d, (b_x * b_rms).to(y.dtype.element_ty) * b_w, mask=m)


@kernel_op("dsv2::add_rms_norm")
def _forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, residual_rows = rows_of(x), rows_of(residual)
    T, D = rows.shape
    y, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    rms = torch.empty(T, dtype=torch.float32, device=x.device)
    if T:
        b = blocks(D)
        _add_rms_norm_fwd_kernel[(triton.cdiv(T, b["BT"]),)](
            rows, residual_rows, weight.contiguous(), y, total, rms, rows.stride(0), residual_rows.stride(0), T, eps,
            D=D, **b, **early_launch(x),
        )  # fmt: skip
    return y, total, rms


@_forward.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    return y, total, x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def _setup(ctx, inputs, output) -> None:
    _, total, rms = output
    ctx.save_for_backward(total, inputs[2], rms)
    ctx.mark_non_differentiable(rms)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx, dy: Tensor | None, dtotal: Tensor | None, _drms: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    if dy is None:
        return dtotal, dtotal, None, None
    total, weight, rms = ctx.saved_tensors
    dx, dw = rms_norm_backward(total, weight, rms, dy, dtotal)
    return dx, dx, dw, None


_forward.register_autograd(_gradients, setup_context=_setup)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _forward(x, residual, weight, eps)[:2]
