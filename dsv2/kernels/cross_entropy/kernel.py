"""The head and its loss, chunk by chunk of tokens: torch multiplies, one Triton program a row does the softmax.

A program reads its row of logits twice, once for maximum and sum and once, from L2, to put the gradient in its place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2.kernels.backend import kernel_op

CHUNK_BYTES = 2**29
"""Most that the logits of a chunk take. Fixed, so that the order of additions is too."""

ALIGNMENT = 64
"""Columns that rows of logits are padded to, so that a vocabulary of any size is read and multiplied as fast."""

NO_TARGET = torch.iinfo(torch.int64).min

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)
"""Below every logit, and finite: its difference to itself is a number."""


@triton.jit
def _log_sum_exp(logits, W, stride, BR: tl.constexpr, BC: tl.constexpr):
    """log2 of the sum of exp over a row. Every group of BC columns keeps its own maximum, so no iteration waits."""
    o_w = tl.arange(0, BR)[:, None] * BC + tl.arange(0, BC)[None, :]
    # [BR]
    b_max = tl.full([BR], LOWEST, dtype=tl.float32)
    b_sum = tl.zeros([BR], dtype=tl.float32)
    for start in range(0, W, BR * BC):
        # [BR, BC]
        b_x = tl.load(logits + start + o_w, mask=start + o_w < stride, other=0.0).to(tl.float32)
        b_x = tl.where(start + o_w < W, b_x * LOG2E, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_x, axis=1))
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_x - b_new[:, None]), axis=1)
        b_max = b_new
    row_max = tl.max(b_max)
    return row_max + tl.log2(tl.sum(b_sum * tl.exp2(b_max - row_max)))


@triton.jit
def _store_gradient(logits, i_w, lse, scale, stride, BW: tl.constexpr):
    """Write scale * (softmax - onehot) over a row of logits, from its end: what was read last is still in L2."""
    o_w = tl.arange(0, BW)
    num_blocks = tl.cdiv(stride, BW)
    for i in range(0, num_blocks):
        start = (num_blocks - 1 - i) * BW
        m_w = start + o_w < stride
        b_x = tl.load(logits + start + o_w, mask=m_w, other=0.0, eviction_policy="evict_first").to(tl.float32)
        b_p = tl.exp2(b_x * LOG2E - lse)
        b_p = tl.where(start + o_w == i_w, b_p - 1.0, b_p) * scale
        tl.store(logits + start + o_w, b_p.to(logits.dtype.element_ty), mask=m_w)


@triton.jit
def _cross_entropy_fwd_kernel(
    logits, targets, log_probs, lses, ignore_index, W, stride,
    GRADIENT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64)
    logits += i_t * stride
    i_w = tl.load(targets + i_t)
    ignored = i_w == ignore_index
    m_w = (i_w >= 0) & (i_w < W)
    # NaN, not memory of others, for a target that does not exist.
    x = tl.load(logits + i_w, mask=m_w, other=float("nan")).to(tl.float32)
    lse = _log_sum_exp(logits, W, stride, BR, BC)
    tl.store(log_probs + i_t, tl.where(ignored, 0.0, (x * LOG2E - lse) * LN2))
    tl.store(lses + i_t, lse)
    if GRADIENT:
        lse = tl.where(ignored, float("inf"), tl.where(m_w, lse, float("nan")))
        _store_gradient(logits, tl.where(ignored, -1, i_w), lse, 1.0, stride, BR * BC)


@triton.jit
def _cross_entropy_bwd_kernel(logits, targets, lses, dlog_probs, W, stride, BW: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    i_w = tl.load(targets + i_t)
    lse = tl.load(lses + i_t)
    lse = tl.where((i_w >= 0) & (i_w < W), lse, float("nan"))
    _store_gradient(logits + i_t * stride, i_w, lse, -tl.load(dlog_probs + i_t), stride, BW)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of tokens, a power of two of them, with their logits [n, W] in memory that the next slice overwrites.

    Rows lie a multiple of ALIGNMENT apart. Kernels may write between them, where numbers are but mean nothing.
    """
    T, W = len(hidden), len(weight)
    stride = triton.cdiv(W, ALIGNMENT) * ALIGNMENT
    rows = CHUNK_BYTES // (stride * hidden.element_size())
    n = 1 << max(rows.bit_length() - 1, 0)
    logits = torch.empty(min(n, T), stride, dtype=hidden.dtype, device=hidden.device)
    logits[:, W:] = 0
    for start in range(0, T, n):
        chunk = slice(start, min(start + n, T))
        yield chunk, torch.mm(hidden[chunk], weight.t(), out=logits[: chunk.stop - start, :W])


def _add_gradients(
    chunk: slice, dlogits: Tensor, hidden: Tensor, weight: Tensor, dhidden: Tensor | None, dweight: Tensor | None
) -> None:
    """The chunk's rows of dhidden, and its part of dweight in fp32."""
    if dhidden is not None:
        torch.mm(dlogits, weight, out=dhidden[chunk])
    if dweight is not None:
        beta = int(chunk.start > 0)
        if dlogits.is_cuda and dlogits.dtype != torch.float32:
            args = (dweight, dlogits.t(), hidden[chunk])
            torch.addmm(*args, out_dtype=torch.float32, beta=beta, out=dweight)
        else:
            dweight.addmm_(dlogits.t().float(), hidden[chunk].float(), beta=beta)


def _gradient_buffers(
    hidden: Tensor, weight: Tensor, with_hidden: bool, with_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    make = torch.empty if len(hidden) else torch.zeros
    dhidden = make(hidden.shape, dtype=hidden.dtype, device=hidden.device) if with_hidden else None
    dweight = make(weight.shape, dtype=torch.float32, device=weight.device) if with_weight else None
    return dhidden, dweight


def _blocks(W: int) -> dict[str, int]:
    """With 32 warps a multiprocessor has at most two rows (V2: 205 KB each) under way; all together about fill L2."""
    BW = min(max(triton.next_power_of_2(W), 128), 16384)
    return {"BW": BW, "num_warps": min(max(BW // 512, 1), 32)}


def _softmax_rows(
    logits: Tensor, targets: Tensor, log_probs: Tensor, lses: Tensor, ignore_index: int, gradient: bool
) -> None:
    n, W = logits.shape
    b = _blocks(W)
    # What a thread loads at once.
    BC = 16 // logits.element_size()
    _cross_entropy_fwd_kernel[(n,)](
        logits, targets, log_probs, lses, ignore_index, W, logits.stride(0), GRADIENT=gradient, BR=b["BW"] // BC, BC=BC,
        num_warps=b["num_warps"],
    )  # fmt: skip


# The sum: gradients in the forward pass ---------------------------------------------------------------------------


@kernel_op("dsv2::cross_entropy")
def _loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_hidden: bool, with_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients, empty where not asked for."""
    targets = targets.contiguous()
    # Ignored rows take part in the weight's gradient with a factor of 0, and 0 * NaN is NaN.
    hidden = hidden.masked_fill((targets == ignore_index)[:, None], 0)
    log_probs, lses = (torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2))
    dhidden, dweight = _gradient_buffers(hidden, weight, with_hidden, with_weight)
    for chunk, logits in _chunks(hidden, weight):
        gradient = with_hidden or with_weight
        _softmax_rows(logits, targets[chunk], log_probs[chunk], lses[chunk], ignore_index, gradient)
        _add_gradients(chunk, logits, hidden, weight, dhidden, dweight)
    return -log_probs.sum(), *(hidden.new_empty(0) if d is None else d for d in (dhidden, dweight))


@_loss.register_fake
def _(hidden, weight, targets, ignore_index, with_hidden, with_weight):
    dhidden = hidden.new_empty(hidden.shape if with_hidden else 0)
    dweight = weight.new_empty(weight.shape, dtype=torch.float32) if with_weight else weight.new_empty(0)
    return hidden.new_empty((), dtype=torch.float32), dhidden, dweight


@kernel_op("dsv2::cross_entropy_backward")
def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """In fp32, whatever goes in and comes out, and in one pass over memory."""
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    # A factor of two dimensions takes part in type promotion; one of none would be rounded to bf16.
    return torch.mul(gradient, factor.reshape(1, 1), out=out)


@_scaled.register_fake
def _(gradient, factor, dtype):
    return gradient.new_empty(gradient.shape, dtype=dtype)


def _setup_loss(ctx, inputs, output) -> None:
    _, dhidden, dweight = output
    ctx.weight_dtype = inputs[1].dtype
    ctx.save_for_backward(dhidden, dweight)
    ctx.mark_non_differentiable(dhidden, dweight)
    # Otherwise autograd would make zeros as large as the weight for the gradients of the gradients.
    ctx.set_materialize_grads(False)


def _loss_gradients(ctx, dloss: Tensor, *_) -> tuple[Tensor | None, ...]:
    dhidden, dweight = ctx.saved_tensors
    with_hidden, with_weight = ctx.needs_input_grad[:2]
    return (
        _scaled(dhidden, dloss, dhidden.dtype) if with_hidden else None,
        _scaled(dweight, dloss, ctx.weight_dtype) if with_weight else None,
        None, None, None, None,
    )  # fmt: skip


_loss.register_autograd(_loss_gradients, setup_context=_setup_loss)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    enabled = torch.is_grad_enabled()
    with_hidden, with_weight = enabled and hidden.requires_grad, enabled and weight.requires_grad
    return _loss(hidden, weight, targets, ignore_index, with_hidden, with_weight)[0]


# Token by token: logits again in the backward pass ----------------------------------------------------------------


@kernel_op("dsv2::token_log_probs")
def _log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    targets = targets.contiguous()
    log_probs, lses = (torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2))
    for chunk, logits in _chunks(hidden, weight):
        _softmax_rows(logits, targets[chunk], log_probs[chunk], lses[chunk], NO_TARGET, False)
    return log_probs, lses


@_log_probs.register_fake
def _(hidden, weight, targets):
    return tuple(hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))


@kernel_op("dsv2::token_log_probs_backward")
def _log_probs_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lses: Tensor,
    dlog_probs: Tensor,
    with_hidden: bool,
    with_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight, empty where not asked for."""
    targets, dlog_probs = targets.contiguous(), dlog_probs.contiguous()
    dhidden, dweight = _gradient_buffers(hidden, weight, with_hidden, with_weight)
    for chunk, logits in _chunks(hidden, weight):
        _cross_entropy_bwd_kernel[(len(logits),)](
            logits, targets[chunk], lses[chunk], dlog_probs[chunk], len(weight), logits.stride(0),
            **_blocks(len(weight)),
        )  # fmt: skip
        _add_gradients(chunk, logits, hidden, weight, dhidden, dweight)
    return (
        hidden.new_empty(0) if dhidden is None else dhidden,
        weight.new_empty(0) if dweight is None else dweight.to(weight.dtype),
    )


@_log_probs_backward.register_fake
def _(hidden, weight, targets, lses, dlog_probs, with_hidden, with_weight):
    return hidden.new_empty(hidden.shape if with_hidden else 0), weight.new_empty(weight.shape if with_weight else 0)


def _setup_log_probs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _log_probs_gradients(ctx, dlog_probs: Tensor, _) -> tuple[Tensor | None, Tensor | None, None]:
    hidden, weight, targets, lses = ctx.saved_tensors
    with_hidden, with_weight = ctx.needs_input_grad[:2]
    dhidden, dweight = _log_probs_backward(hidden, weight, targets, lses, dlog_probs, with_hidden, with_weight)
    return dhidden if with_hidden else None, dweight if with_weight else None, None


_log_probs.register_autograd(_log_probs_gradients, setup_context=_setup_log_probs)


def token_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return _log_probs(hidden, weight, targets)[0]
