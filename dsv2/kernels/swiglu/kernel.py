"""SwiGLU in Triton, a program a piece of a row; two tensors or the halves of one, told apart by strides alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv2.kernels.backend import early_launch, kernel_op, unit_stride


@triton.jit
def _swiglu_fwd_kernel(gate, up, y, stride_gate, stride_up, F, BF: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    i_t = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    m_f = o_f < F
    b_gate = tl.load(gate + i_t * stride_gate + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_up = tl.load(up + i_t * stride_up + o_f, mask=m_f, other=0.0).to(tl.float32)
    tl.store(y + i_t * F + o_f, (b_gate * tl.sigmoid(b_gate) * b_up).to(y.dtype.element_ty), mask=m_f)


@triton.jit
def _swiglu_bwd_kernel(gate, up, dy, dgate, dup, stride_gate, stride_up, stride_dy, stride_d, F, BF: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    m_f = o_f < F
    b_gate = tl.load(gate + i_t * stride_gate + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_up = tl.load(up + i_t * stride_up + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_dy = tl.load(dy + i_t * stride_dy + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_gate)
    b_silu = b_gate * b_sigmoid
    b_dgate = b_dy * b_up * (b_sigmoid + b_silu * (1 - b_sigmoid))
    tl.store(dgate + i_t * stride_d + o_f, b_dgate.to(dgate.dtype.element_ty), mask=m_f)
    tl.store(dup + i_t * stride_d + o_f, (b_dy * b_silu).to(dup.dtype.element_ty), mask=m_f)


def _launch_forward(gate: Tensor, up: Tensor) -> Tensor:
    T, F = gate.shape
    y = torch.empty(T, F, dtype=gate.dtype, device=gate.device)
    if y.numel():
        BF = min(triton.next_power_of_2(F), 2048)
        _swiglu_fwd_kernel[(T, triton.cdiv(F, BF))](
            gate, up, y, gate.stride(0), up.stride(0), F, BF=BF, num_warps=max(BF // 512, 1), **early_launch(gate)
        )
    return y


def _launch_backward(gate: Tensor, up: Tensor, dy: Tensor, dgate: Tensor, dup: Tensor) -> None:
    T, F = gate.shape
    if gate.numel():
        BF = min(triton.next_power_of_2(F), 2048)
        _swiglu_bwd_kernel[(T, triton.cdiv(F, BF))](
            gate, up, dy, dgate, dup, gate.stride(0), up.stride(0), dy.stride(0), dgate.stride(0), F, BF=BF,
            num_warps=max(BF // 512, 1),
        )  # fmt: skip


@kernel_op("dsv2::swiglu")
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _launch_forward(unit_stride(gate), unit_stride(up))


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@kernel_op("dsv2::swiglu_backward")
def _swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    _launch_backward(unit_stride(gate), unit_stride(up), unit_stride(dy), dgate, dup)
    return dgate, dup


@_swiglu_backward.register_fake
def _(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


@kernel_op("dsv2::swiglu_packed")
def _packed(gate_up: Tensor) -> Tensor:
    return _launch_forward(*unit_stride(gate_up).chunk(2, -1))


@_packed.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@kernel_op("dsv2::swiglu_packed_backward")
def _packed_backward(gate_up: Tensor, dy: Tensor) -> Tensor:
    d_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    _launch_backward(*unit_stride(gate_up).chunk(2, -1), unit_stride(dy), *d_gate_up.chunk(2, -1))
    return d_gate_up


@_packed_backward.register_fake
def _(gate_up: Tensor, dy: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _save_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


_swiglu.register_autograd(lambda ctx, dy: _swiglu_backward(*ctx.saved_tensors, dy), setup_context=_save_inputs)
_packed.register_autograd(lambda ctx, dy: _packed_backward(*ctx.saved_tensors, dy), setup_context=_save_inputs)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _swiglu(gate, up)


def swiglu_packed(gate_up: Tensor) -> Tensor:
    return _packed(gate_up)
