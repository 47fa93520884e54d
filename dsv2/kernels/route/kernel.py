"""Routing in Triton: the fp32 gate in one launch or in parts; backward gives the gradient of the logits.

Logits are sums of chunks of channels, (p_0 + p_1) + p_2 and so on, each p added up from zero. Many tokens are routed in
one launch, whose programs go through all of D. With few, that leaves most of the GPU idle: a first launch computes the
p of all chunks at once, a second adds them and chooses, and where it cuts the blocks of tokens a third counts. All of
them do the same additions in the same order, in blocks of any size: a token's bits depend on itself alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv2.kernels.backend import early_launch, kernel_op, unit_stride
from dsv2.kernels.route.reference import ROUTE_BLOCK
from dsv2.kernels.route.tiles import chunk_of, in_one_launch, part_tiles, tiles, tokens_a_program

MAX_EXPERTS = 256
"""The logits of a block of tokens stay in registers, and `_row_sum` is exact."""

NOT_A_NUMBER = tl.constexpr(-1)
"""Ranks below every score: a row of NaN still chooses experts that exist, the lowest first."""
NOT_ELIGIBLE = tl.constexpr(-2)
TAKEN = tl.constexpr(-3)


@triton.jit
def _add_product(b_sum, p_h, p_w, m_t, m_e, i_k, D, IEEE: tl.constexpr, BK: tl.constexpr):
    """b_sum [BT, BE] plus the product over BK channels of the rows at p_h [BT, 1] and p_w [1, BE]."""
    o_k = i_k + tl.arange(0, BK)
    m_k = o_k < D
    b_h = tl.load(p_h + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)
    b_w = tl.load(p_w + o_k[:, None], mask=m_k[:, None] & m_e[None, :], other=0.0)
    if IEEE:
        b_sum = tl.dot(b_h.to(tl.float32), b_w.to(tl.float32), b_sum, input_precision="ieee")
    else:
        b_sum = tl.dot(b_h, b_w, b_sum)
    return b_sum


@triton.jit
def _row_sum(x):
    """Sums of rows of at most 256 numbers from 0 to 1, in fp32 and yet the same in every order of additions.

    Multiples of 2^-15, and what they leave as multiples of 2^-31, add up without rounding.
    """
    b_high = (x + 256.0) - 256.0
    b_low = ((x - b_high) + 1.5 * 2.0**-8) - 1.5 * 2.0**-8
    return tl.sum(b_high, 1) + tl.sum(b_low, 1)


@triton.jit
def _best(b_rank, o_e, BE: tl.constexpr):
    """The highest rank of each row, and the lowest expert of that rank."""
    b_best = tl.max(b_rank, 1)
    return b_best, tl.min(tl.where(b_rank == b_best[:, None], o_e[None, :], BE), 1)


@triton.jit
def _choose(
    b_logits, scores, experts, gates, counts, i_b, T, scaling, E: tl.constexpr, A: tl.constexpr,
    EXPERTS_A_GROUP: tl.constexpr, GROUPS_A_TOKEN: tl.constexpr, NORMALIZE: tl.constexpr, BA: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """From the logits [BT, BE] of the i_b-th BT tokens to their scores, experts, gates and (unless None) counts.

    No bit depends on how threads share the block: maxima and sums of integers have no order, `_row_sum` needs none.
    """
    i_t = i_b.to(tl.int64) * BT
    o_t = tl.arange(0, BT)
    o_e = tl.arange(0, BE)
    o_a = tl.arange(0, BA)
    m_t = o_t < T - i_b * BT
    m_e = o_e < E

    # [BT, BE]
    b_logits = tl.where(m_e[None, :], b_logits, float("-inf"))
    b_exp = tl.exp(b_logits - tl.max(b_logits, 1)[:, None])
    b_scores = b_exp * (1.0 / _row_sum(b_exp))[:, None]
    tl.store(scores + i_t * E + o_t[:, None] * E + o_e[None, :], b_scores, mask=m_t[:, None] & m_e[None, :])

    # Numbers from zero up rank as their bits do, read as integers, whose maximum over a warp is one instruction.
    b_rank = tl.where(b_scores >= 0, b_scores.to(tl.int32, bitcast=True), NOT_A_NUMBER)
    b_rank = tl.where(m_e[None, :], b_rank, NOT_ELIGIBLE)
    if EXPERTS_A_GROUP < E:
        # The best expert of all lies in the best group, since a group scores its maximum; then the next group's.
        b_rest = b_rank
        for _ in range(GROUPS_A_TOKEN):
            _, b_e = _best(b_rest, o_e, BE)
            m_group = (o_e // EXPERTS_A_GROUP)[None, :] == (b_e // EXPERTS_A_GROUP)[:, None]
            b_rest = tl.where(m_group, TAKEN, b_rest)
        b_rank = tl.where(b_rest == TAKEN, b_rank, NOT_ELIGIBLE)

    # [BT, BA]
    b_chosen = tl.zeros([BT, BA], dtype=tl.int32)
    b_experts = tl.zeros([BT, BA], dtype=tl.int32)
    b_total = tl.zeros([BT], dtype=tl.float32)
    for i_a in range(A):
        b_best, b_e = _best(b_rank, o_e, BE)
        b_rank = tl.where(o_e[None, :] == b_e[:, None], TAKEN, b_rank)
        b_chosen = tl.where(o_a[None, :] == i_a, b_best[:, None], b_chosen)
        b_experts = tl.where(o_a[None, :] == i_a, b_e[:, None], b_experts)
        b_total += b_best.to(tl.float32, bitcast=True)
    b_gates = tl.where(b_chosen >= 0, b_chosen.to(tl.float32, bitcast=True), float("nan"))
    b_gates = b_gates / b_total[:, None] if NORMALIZE else b_gates * scaling
    o_ta = o_t[:, None] * A + o_a[None, :]
    m_a = m_t[:, None] & (o_a < A)[None, :]
    tl.store(gates + i_t * A + o_ta, b_gates, mask=m_a)
    tl.store(experts + i_t * A + o_ta, b_experts.to(tl.int64), mask=m_a)
    if counts is not None:
        b_counts = tl.sum(((b_rank == TAKEN) & m_t[:, None]).to(tl.int32), 0)
        tl.store(counts + i_b.to(tl.int64) * E + o_e, b_counts, mask=m_e)


@triton.jit(do_not_specialize=["T"])
def _route_fwd_kernel(
    h, w, scores, experts, gates, counts, stride_h, stride_w, T, D, scaling,
    E: tl.constexpr, A: tl.constexpr, EXPERTS_A_GROUP: tl.constexpr, GROUPS_A_TOKEN: tl.constexpr,
    NORMALIZE: tl.constexpr, BA: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, CHUNK: tl.constexpr,
    IEEE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BT tokens from hidden states to counts."""
    i_b = tl.program_id(0)
    o_t = tl.arange(0, BT)
    o_e = tl.arange(0, BE)
    p_h = h + (i_b.to(tl.int64) * BT + o_t)[:, None] * stride_h
    p_w = w + o_e[None, :].to(tl.int64) * stride_w
    # [BT, BE]
    b_logits = tl.zeros([BT, BE], dtype=tl.float32)
    b_part = tl.zeros([BT, BE], dtype=tl.float32)
    for i_k in range(0, D, BK):
        b_part = _add_product(b_part, p_h, p_w, o_t < T - i_b * BT, o_e < E, i_k, D, IEEE, BK)
        if (i_k + BK) % CHUNK == 0:
            b_logits += b_part
            b_part = tl.zeros([BT, BE], dtype=tl.float32)
    _choose(
        b_logits + b_part, scores, experts, gates, counts, i_b, T, scaling,
        E, A, EXPERTS_A_GROUP, GROUPS_A_TOKEN, NORMALIZE, BA, BT, BE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _parts_kernel(
    h, w, parts, stride_h, stride_w, T, D, E: tl.constexpr, CHUNK: tl.constexpr, IEEE: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The product over one chunk of BT tokens and BE experts."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    i_c = tl.program_id(1)
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_e = tl.program_id(2) * BE + tl.arange(0, BE)
    p_h = h + o_t[:, None].to(tl.int64) * stride_h
    p_w = w + o_e[None, :].to(tl.int64) * stride_w
    # [BT, BE]
    b_part = tl.zeros([BT, BE], dtype=tl.float32)
    for i_k in range(i_c * CHUNK, i_c * CHUNK + CHUNK, BK):
        b_part = _add_product(b_part, p_h, p_w, o_t < T, o_e < E, i_k, D, IEEE, BK)
    p_parts = parts + (i_c.to(tl.int64) * T + o_t)[:, None] * E + o_e[None, :]
    tl.store(p_parts, b_part, mask=(o_t < T)[:, None] & (o_e < E)[None, :])


@triton.jit
def _add_parts(parts, i_b, i_e, T, E: tl.constexpr, CHUNKS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr):
    """The logits [BT, BE] of the i_b-th BT tokens and the experts from i_e."""
    i_t = i_b.to(tl.int64) * BT
    o_t = tl.arange(0, BT)[:, None]
    o_e = i_e + tl.arange(0, BE)[None, :]
    b_logits = tl.zeros([BT, BE], dtype=tl.float32)
    for i_c in tl.static_range(CHUNKS):
        p_part = parts + (i_c * T.to(tl.int64) + i_t) * E
        b_logits += tl.load(p_part + o_t * E + o_e, mask=(o_t < T - i_b * BT) & (o_e < E), other=0.0)
    return b_logits


@triton.jit(do_not_specialize=["T"])
def _choose_kernel(
    parts, scores, experts, gates, counts, T, scaling,
    E: tl.constexpr, A: tl.constexpr, EXPERTS_A_GROUP: tl.constexpr, GROUPS_A_TOKEN: tl.constexpr,
    NORMALIZE: tl.constexpr, BA: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BT tokens from the parts of their logits to gates, and to counts where BT tokens are what is counted together."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    i_b = tl.program_id(0)
    if BE <= 128:
        b_logits = _add_parts(parts, i_b, 0, T, E, CHUNKS, BT, BE)
    else:
        # Loaded as one, a token would lie in two warps, and every maximum would take barriers.
        b_left = _add_parts(parts, i_b, 0, T, E, CHUNKS, BT, BE // 2)
        b_right = _add_parts(parts, i_b, BE // 2, T, E, CHUNKS, BT, BE // 2)
        b_logits = tl.permute(tl.join(b_left, b_right), (0, 2, 1)).reshape(BT, BE)
    _choose(
        b_logits, scores, experts, gates, counts, i_b, T, scaling,
        E, A, EXPERTS_A_GROUP, GROUPS_A_TOKEN, NORMALIZE, BA, BT, BE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _count_kernel(
    experts, counts, T, E: tl.constexpr, A: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BR: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """How often BT tokens chose each of BE experts."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    i_b = tl.program_id(0)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    num_choices = tl.minimum(T - i_b * BT, BT) * A
    b_counts = tl.zeros([BE], dtype=tl.int32)
    for i_r in range(0, BT * A, BR):
        o_r = i_r + tl.arange(0, BR)
        b_e = tl.load(experts + i_b.to(tl.int64) * BT * A + o_r, mask=o_r < num_choices, other=-1).to(tl.int32)
        b_counts += tl.sum((b_e[:, None] == o_e[None, :]).to(tl.int32), 0)
    tl.store(counts + i_b.to(tl.int64) * E + o_e, b_counts, mask=o_e < E)


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


@kernel_op("dsv2::route")
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
    options = {
        "E": E, "A": A, "EXPERTS_A_GROUP": E // num_groups, "GROUPS_A_TOKEN": groups_per_token,
        "NORMALIZE": normalize, "BA": triton.next_power_of_2(A), "BE": max(triton.next_power_of_2(E), 16),
    }  # fmt: skip
    product = {"CHUNK": chunk_of(D), "IEEE": h.dtype != weight.dtype or h.dtype == torch.float32}
    if T and in_one_launch(T, D, E):
        # Without `maxnreg` a register spills for the sake of an occupancy that shared memory rules out.
        _route_fwd_kernel[(len(counts),)](
            h, weight, scores, experts, gates, counts, h.stride(0), weight.stride(0), T, D, scaling, **options,
            **product, BT=ROUTE_BLOCK, maxnreg=255, **tiles(T, E, product["IEEE"]),
        )  # fmt: skip
    elif T:
        _route_in_parts(h, weight, scores, experts, gates, counts, scaling, options, product)
    return scores, experts, gates, counts


def _route_in_parts(h, weight, scores, experts, gates, counts, scaling, options, product) -> None:
    (T, D), E, A = h.shape, len(weight), experts.shape[1]
    num_chunks = triton.cdiv(D, product["CHUNK"])
    parts = torch.empty(num_chunks, T, E, dtype=torch.float32, device=h.device)
    pdl = early_launch(h)
    tile = part_tiles(T, D, E, product["IEEE"])
    _parts_kernel[(triton.cdiv(T, tile["BT"]), num_chunks, triton.cdiv(E, tile["BE"]))](
        h, weight, parts, h.stride(0), weight.stride(0), T, D, E=E, **product, **tile, **pdl
    )
    tokens = tokens_a_program(T, E)
    programs = triton.cdiv(T, tokens)
    counted = programs == len(counts)
    _choose_kernel[(programs,)](
        parts, scores, experts, gates, counts if counted else None, T, scaling, **options,
        BT=tokens, CHUNKS=num_chunks, num_warps=tokens, **pdl,
    )  # fmt: skip
    if not counted:
        _count_kernel[(len(counts), triton.cdiv(E, 32))](
            experts, counts, T, E=E, A=A, BT=ROUTE_BLOCK, BE=32, BR=256, num_warps=8, **pdl
        )


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


@kernel_op("dsv2::route_backward")
def _backward(
    scores: Tensor, experts: Tensor, gates: Tensor, dscores: Tensor | None, dgates: Tensor | None, normalize: bool,
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
    scores: Tensor, experts: Tensor, gates: Tensor, dscores: Tensor | None, dgates: Tensor | None, normalize: bool,
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
        dlogits = _backward(scores, experts, gates, dscores, dgates, ctx.normalize, ctx.scaling)
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
