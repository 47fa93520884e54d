"""Routing in Triton: one launch forward, from the fp32 gate to the counts; backward gives the gradient of the logits.

One block of tokens and one order of additions for every number of tokens: a token's bits depend on itself alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2.kernels.backend import unit_stride
from dsv2.kernels.route.reference import ROUTE_BLOCK

MAX_EXPERTS = 256
"""The logits of a block of tokens stay in registers."""

NOT_A_NUMBER = tl.constexpr(-1.0)
"""Ranks below every score: a row of NaN still chooses experts that exist, the lowest first."""
NOT_ELIGIBLE = tl.constexpr(-2.0)
TAKEN = tl.constexpr(-3.0)


@triton.jit(do_not_specialize=["T"])
def _route_fwd_kernel(
    h, w, scores, experts, gates, counts, stride_h, stride_w, T, D, scaling,
    E: tl.constexpr, A: tl.constexpr, EXPERTS_A_GROUP: tl.constexpr, GROUPS_A_TOKEN: tl.constexpr,
    NORMALIZE: tl.constexpr, IEEE: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BA: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0)
    i_t = i_b.to(tl.int64) * BT
    o_t = tl.arange(0, BT)
    o_e = tl.arange(0, BE)
    o_k = tl.arange(0, BK)
    o_a = tl.arange(0, BA)
    m_t = o_t < T - i_b * BT
    m_e = o_e < E

    # [BT, BE]
    b_logits = tl.zeros([BT, BE], dtype=tl.float32)
    p_h = h + i_t * stride_h + o_t[:, None].to(tl.int64) * stride_h + o_k[None, :]
    p_w = w + o_e[None, :].to(tl.int64) * stride_w + o_k[:, None]
    for i_k in range(0, D, BK):
        m_k = o_k < D - i_k
        b_h = tl.load(p_h + i_k, mask=m_t[:, None] & m_k[None, :], other=0.0)
        b_w = tl.load(p_w + i_k, mask=m_k[:, None] & m_e[None, :], other=0.0)
        if IEEE:
            b_logits = tl.dot(b_h.to(tl.float32), b_w.to(tl.float32), b_logits, input_precision="ieee")
        else:
            b_logits = tl.dot(b_h, b_w, b_logits)

    b_logits = tl.where(m_e[None, :], b_logits, float("-inf"))
    b_exp = tl.exp(b_logits - tl.max(b_logits, 1)[:, None])
    b_scores = b_exp / tl.sum(b_exp, 1)[:, None]
    tl.store(scores + i_t * E + o_t[:, None] * E + o_e[None, :], b_scores, mask=m_t[:, None] & m_e[None, :])

    b_rank = tl.where(b_scores >= 0, b_scores, NOT_A_NUMBER)
    b_rank = tl.where(m_e[None, :], b_rank, NOT_ELIGIBLE)
    if EXPERTS_A_GROUP < E:
        # The best expert of all lies in the best group, since a group scores its maximum; then the next group's.
        b_rest = b_rank
        for _ in range(GROUPS_A_TOKEN):
            _, b_e = tl.max(b_rest, 1, return_indices=True, return_indices_tie_break_left=True)
            m_group = (o_e // EXPERTS_A_GROUP)[None, :] == (b_e // EXPERTS_A_GROUP)[:, None]
            b_rest = tl.where(m_group, TAKEN, b_rest)
        b_rank = tl.where(b_rest == TAKEN, b_rank, NOT_ELIGIBLE)

    # [BT, BA]
    b_gates = tl.zeros([BT, BA], dtype=tl.float32)
    b_experts = tl.zeros([BT, BA], dtype=tl.int32)
    for i_a in range(A):
        b_best, b_e = tl.max(b_rank, 1, return_indices=True, return_indices_tie_break_left=True)
        b_rank = tl.where(o_e[None, :] == b_e[:, None], TAKEN, b_rank)
        b_gates = tl.where(o_a[None, :] == i_a, b_best[:, None], b_gates)
        b_experts = tl.where(o_a[None, :] == i_a, b_e[:, None], b_experts)
    b_gates = tl.where(b_gates >= 0, b_gates, float("nan"))
    b_gates = b_gates / tl.sum(b_gates, 1)[:, None] if NORMALIZE else b_gates * scaling
    o_ta = o_t[:, None] * A + o_a[None, :]
    m_a = m_t[:, None] & (o_a < A)[None, :]
    tl.store(gates + i_t * A + o_ta, b_gates, mask=m_a)
    tl.store(experts + i_t * A + o_ta, b_experts.to(tl.int64), mask=m_a)
    b_counts = tl.sum(((b_rank == TAKEN) & m_t[:, None]).to(tl.int32), 0)
    tl.store(counts + i_b.to(tl.int64) * E + o_e, b_counts, mask=m_e)


@triton.jit(do_not_specialize=["T"])
def _route_bwd_kernel(
    dscores, dgates, experts, scores, gates, dlogits, T, scaling, E: tl.constexpr, A: tl.constexpr,
    NORMALIZE: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_e = tl.arange(0, BE)
    m_t = o_t < T
    m_te = m_t[:, None] & (o_e < E)[None, :]
    o_te = o_t[:, None] * E + o_e[None, :]
    # [BT, BE]
    b_scores = tl.load(scores + o_te, mask=m_te, other=0.0)
    if dscores is not None:
        b_dscores = tl.load(dscores + o_te, mask=m_te, other=0.0)
    else:
        b_dscores = tl.zeros([BT, BE], dtype=tl.float32)
    if dgates is not None:
        b_sum = tl.zeros([BT], dtype=tl.float32)
        b_mean = tl.zeros([BT], dtype=tl.float32)
        if NORMALIZE:
            for i_a in range(A):
                b_e = tl.load(experts + o_t * A + i_a, mask=m_t, other=0)
                b_sum += tl.load(scores + o_t * E + b_e, mask=m_t, other=1.0)
                b_dgate = tl.load(dgates + o_t * A + i_a, mask=m_t, other=0.0)
                b_mean += b_dgate * tl.load(gates + o_t * A + i_a, mask=m_t, other=0.0)
        for i_a in range(A):
            b_e = tl.load(experts + o_t * A + i_a, mask=m_t, other=0)
            b_dgate = tl.load(dgates + o_t * A + i_a, mask=m_t, other=0.0)
            b_dscore = (b_dgate - b_mean) / b_sum if NORMALIZE else b_dgate * scaling
            b_dscores += tl.where(o_e[None, :] == b_e[:, None], b_dscore[:, None], 0.0)
    b_dlogits = b_scores * (b_dscores - tl.sum(b_dscores * b_scores, 1)[:, None])
    tl.store(dlogits + o_te, b_dlogits, mask=m_te)


def _tiles(BE: int, ieee: bool, T: int) -> dict[str, int]:
    """None of these changes a bit: a product adds up its terms in one order, 16 at a time, in every tile."""
    if ieee:
        return {"BK": 32 if BE <= 128 else 16, "num_warps": 4 if BE <= 128 else 8, "num_stages": 3}
    if BE > 128:
        return {"BK": 64, "num_warps": 8, "num_stages": 6}
    if BE > 64:
        return {"BK": 128, "num_warps": 4, "num_stages": 5}
    # Few programs have an SM each, and its memory for copies under way; of many, two share one.
    return {"BK": 128, "num_warps": 4, "num_stages": 8 if T <= 4096 else 5}


@torch.library.custom_op("dsv2::route", mutates_args=())
def _forward(
    h: Tensor, weight: Tensor, experts_per_token: int, num_groups: int, groups_per_token: int, normalize: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    h, weight = unit_stride(h), unit_stride(weight)
    (T, D), E, A = h.shape, len(weight), experts_per_token
    scores = torch.empty(T, E, dtype=torch.float32, device=h.device)
    experts = torch.empty(T, A, dtype=torch.int64, device=h.device)
    gates = torch.empty(T, A, dtype=torch.float32, device=h.device)
    counts = torch.empty(triton.cdiv(T, ROUTE_BLOCK), E, dtype=torch.int32, device=h.device)
    if T:
        BE = max(triton.next_power_of_2(E), 16)
        ieee = h.dtype != weight.dtype or h.dtype == torch.float32
        # Without `maxnreg` a register spills for the sake of an occupancy that shared memory rules out.
        _route_fwd_kernel[(len(counts),)](
            h, weight, scores, experts, gates, counts, h.stride(0), weight.stride(0), T, D, scaling, E=E, A=A,
            EXPERTS_A_GROUP=E // num_groups, GROUPS_A_TOKEN=groups_per_token, NORMALIZE=normalize, IEEE=ieee,
            BT=ROUTE_BLOCK, BE=BE, BA=triton.next_power_of_2(A), maxnreg=255, **_tiles(BE, ieee, T),
        )  # fmt: skip
    return scores, experts, gates, counts


@_forward.register_fake
def _(
    h: Tensor, weight: Tensor, experts_per_token: int, num_groups: int, groups_per_token: int, normalize: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    T, E, A = len(h), len(weight), experts_per_token
    return (
        h.new_empty(T, E, dtype=torch.float32),
        h.new_empty(T, A, dtype=torch.int64),
        h.new_empty(T, A, dtype=torch.float32),
        h.new_empty((T + ROUTE_BLOCK - 1) // ROUTE_BLOCK, E, dtype=torch.int32),
    )


@torch.library.custom_op("dsv2::route_backward", mutates_args=())
def _backward(
    dscores: Tensor | None, dgates: Tensor | None, experts: Tensor, scores: Tensor, gates: Tensor, normalize: bool,
    scaling: float,
) -> Tensor:  # fmt: skip
    (T, E), A = scores.shape, experts.shape[1]
    dlogits = torch.empty(T, E, dtype=torch.float32, device=scores.device)
    if T:
        BT, BE = 16, max(triton.next_power_of_2(E), 16)
        _route_bwd_kernel[(triton.cdiv(T, BT),)](
            None if dscores is None else dscores.contiguous(), None if dgates is None else dgates.contiguous(),
            experts, scores, gates, dlogits, T, scaling, E=E, A=A, NORMALIZE=normalize, BT=BT, BE=BE, num_warps=4,
        )  # fmt: skip
    return dlogits


@_backward.register_fake
def _(
    dscores: Tensor | None, dgates: Tensor | None, experts: Tensor, scores: Tensor, gates: Tensor, normalize: bool,
    scaling: float,
) -> Tensor:  # fmt: skip
    return torch.empty_like(scores)


def _setup(ctx, inputs, output) -> None:
    h, weight, *_, ctx.normalize, ctx.scaling = inputs
    scores, experts, gates, counts = output
    ctx.save_for_backward(h, weight, scores, experts, gates)
    ctx.mark_non_differentiable(experts, counts)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dscores: Tensor | None, _dexperts: None, dgates: Tensor | None, _dcounts: None):
    h, weight, scores, experts, gates = ctx.saved_tensors
    dh = dweight = None
    if dscores is not None or dgates is not None:
        dlogits = _backward(dscores, dgates, experts, scores, gates, ctx.normalize, ctx.scaling)
        dh = _gradient_of_h(dlogits, weight, h.dtype) if ctx.needs_input_grad[0] else None
        dweight = _gradient_of_weight(dlogits, h, weight.dtype) if ctx.needs_input_grad[1] else None
    return dh, dweight, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)


def _gradient_of_h(dlogits: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.dtype == dtype == torch.bfloat16:
        return _two_terms(dlogits) @ weight.repeat(2, 1)
    return (dlogits @ weight.float()).to(dtype)


def _gradient_of_weight(dlogits: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
    if h.dtype == dtype == torch.bfloat16 and h.is_cuda:
        terms = torch.mm(_two_terms(dlogits).T, h, out_dtype=torch.float32)
        return terms.unflatten(0, (2, -1)).sum(0).to(dtype)
    return (dlogits.T @ h.float()).to(dtype)


def _two_terms(x: Tensor) -> Tensor:
    """[x rounded to bf16, what that left], side by side: to 2^-17 the same, and a bf16 product five times as fast."""
    high = x.bfloat16()
    return torch.cat([high, (x - high).bfloat16()], 1)


def route(
    h: Tensor, weight: Tensor, *, experts_per_token: int, num_groups: int = 1, groups_per_token: int = 1,
    normalize: bool = False, scaling: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if len(weight) > MAX_EXPERTS:
        raise ValueError(f"weight has {len(weight)} experts, expected at most {MAX_EXPERTS}")
    normalize = normalize and experts_per_token > 1
    return _forward(h, weight, experts_per_token, num_groups, groups_per_token, normalize, scaling)
