"""Attention over packed documents in Triton: forward, and a backward without atomics (a kernel for dq, one for dk, dv).

A program owns a block of rows of one document and one head, and finds them on the device: document i owns the blocks
from cu_seqlens[i] // B + i to the next document's first, which are enough whatever the lengths are. So T // B + N
blocks cover T rows in N documents, and no launch depends on lengths. What a program reads block by block comes through
tensor descriptors (Hopper's copy engine), with zeros past the tensor's end. 192 channels lie in pieces of 128 and 64.

On Hopper the forward at MLA's widths, in bf16 and without a prefix, is `hopper.py`'s.

Descriptors know nothing of documents. What they read of the next one would weigh nothing, but 0 * NaN is NaN: so every
row that takes part in a sum is the document's own, or zeroed.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv2.kernels.backend import is_hopper, kernel_op
from dsv2.kernels.mla_prefill.reference import with_rope

LOG2_E = math.log2(math.e)

SHORT = tl.constexpr(16)
"""Rows of a tile where a document has fewer than BM."""


@triton.jit
def deal(H, blocks, HEADS: tl.constexpr):
    """Head and block of this program: HEADS heads side by side, so that what is read at a time fits in the L2 cache."""
    i_p = tl.program_id(0)
    i_g = i_p // (HEADS * blocks)
    heads = tl.minimum(H - i_g * HEADS, HEADS)
    i_r = i_p - i_g * HEADS * blocks
    return i_g * HEADS + i_r % heads, i_r // heads


@triton.jit
def locate(cu, i_x, N, B: tl.constexpr):
    """The document that owns block i_x, its first row and its length, and where in it the block begins."""
    i_n = 0
    for i in range(0, N, 128):
        o_n = i + tl.arange(0, 128)
        m_n = o_n < N
        b_first = tl.load(cu + o_n, mask=m_n, other=0) // B + o_n
        i_n += tl.sum(((b_first <= i_x) & m_n).to(tl.int32))
    i_n -= 1
    row = tl.load(cu + i_n)
    return i_n, row, tl.load(cu + i_n + 1) - row, (i_x - (row // B + i_n)) * B


@triton.jit
def load_rows(x, o_t, m, stride_t, i_h, stride_h, X: tl.constexpr, W: tl.constexpr, W2: tl.constexpr):
    """Rows of a head in two pieces, [B, W] and [B, W2]; zero beyond X channels. With W2 = 0 the second is not there."""
    p = x + o_t[:, None] * stride_t + i_h.to(tl.int64) * stride_h
    o_x = tl.arange(0, W)[None, :]
    b_x = tl.load(p + o_x, mask=m[:, None] & (o_x < X), other=0.0)
    b_x2 = b_x
    if W2:
        o_x2 = W + tl.arange(0, W2)[None, :]
        b_x2 = tl.load(p + o_x2, mask=m[:, None] & (o_x2 < X), other=0.0)
    return b_x, b_x2


@triton.jit
def store_rows(x, o_r, m, b_x, b_x2, X: tl.constexpr, W: tl.constexpr, W2: tl.constexpr):
    """The same into contiguous rows of X channels."""
    o_x = tl.arange(0, W)[None, :]
    tl.store(x + o_r[:, None] * X + o_x, b_x.to(x.dtype.element_ty), mask=m[:, None] & (o_x < X))
    if W2:
        o_x2 = W + tl.arange(0, W2)[None, :]
        tl.store(x + o_r[:, None] * X + o_x2, b_x2.to(x.dtype.element_ty), mask=m[:, None] & (o_x2 < X))


@triton.jit
def described_rows(
    desc, desc2, i_h, row, B: tl.constexpr, W: tl.constexpr, W2: tl.constexpr, SHARED: tl.constexpr = False
):
    """Rows of a head, [B, W] and [B, W2], whatever the document. SHARED: the second piece is one for all heads."""
    b_x = desc.load([i_h, row, 0]).reshape(B, W)
    b_x2 = b_x
    if W2:
        b_x2 = desc2.load([0 if SHARED else i_h, row, 0 if SHARED else W]).reshape(B, W2)
    return b_x, b_x2


@triton.jit
def product(b_a, b_a2, b_b, b_b2, W2: tl.constexpr):
    """a . b^T of rows in two pieces."""
    b_s = tl.dot(b_a, b_b.T)
    if W2:
        b_s = tl.dot(b_a2, b_b2.T, b_s)
    return b_s


@triton.jit
def attend(
    b_o, b_m, b_l, b_q, b_q2, k, k2, v, i_h, row, num, end, o_last, seen, scale,
    BN: tl.constexpr, BK: tl.constexpr, BK2: tl.constexpr, BV: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Running softmax, base 2, over keys 0:end of the `num` that begin at `row`.

    Each row sees keys up to its o_last; the first `seen` are seen by all. The last block, if not whole, comes apart.
    """
    whole = tl.minimum(end, num // BN * BN)
    for REST in tl.static_range(2):
        for j in range(whole * REST, end if REST else whole, BN):
            b_k, b_k2 = described_rows(k, k2, i_h, row + j, BN, BK, BK2, SHARED)
            b_s = product(b_q, b_q2, b_k, b_k2, BK2)
            b_v = v.load([i_h, row + j, 0]).reshape(BN, BV)
            o_n = j + tl.arange(0, BN)
            if j + BN > seen:
                b_s = tl.where(o_n[None, :] <= o_last[:, None], b_s, float("-inf"))
            if REST:
                # What comes after the last key weighs nothing, but 0 * NaN would.
                b_v = tl.where((o_n < num)[:, None], b_v, 0.0)
            b_new = tl.maximum(b_m, tl.max(b_s, 1) * scale)
            b_p = tl.exp2(b_s * scale - b_new[:, None])
            b_fade = tl.exp2(b_m - b_new)
            b_l = b_l * b_fade + tl.sum(b_p, 1)
            b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_fade[:, None])
            b_m = b_new
    return b_o, b_m, b_l


@triton.jit(do_not_specialize=["N", "blocks"])
def _mla_prefill_fwd_kernel(
    q, k, k2, v, cu, k_prefix, k2_prefix, v_prefix, cu_prefix, o, lse, scale, T, N, H, blocks, stride_q, stride_qh,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS_PREFIX: tl.constexpr, SHARED: tl.constexpr,
    HEADS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BK2: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i_h, i_x = deal(H, blocks, HEADS)
    i_kv = i_h // GROUP
    # The last blocks of a document have most keys: they go first.
    i_n, row, L, first = locate(cu, blocks - 1 - i_x, N, BM)
    if first >= L:
        return
    o_m = first + tl.arange(0, BM)
    m_m = o_m < L
    o_t = (row + o_m).to(tl.int64)
    b_q, b_q2 = load_rows(q, o_t, m_m, stride_q, i_h, stride_qh, K, BK, BK2)
    b_o = tl.zeros([BM, BV], dtype=tl.float32)
    b_m = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BM], dtype=tl.float32)
    if HAS_PREFIX:
        row_p = tl.load(cu_prefix + i_n)
        S = tl.load(cu_prefix + i_n + 1) - row_p
        b_o, b_m, b_l = attend(
            b_o, b_m, b_l, b_q, b_q2, k_prefix, k2_prefix, v_prefix, i_kv, row_p, S, S, o_m * 0 + S - 1, S, scale,
            BN, BK, BK2, BV, SHARED,
        )  # fmt: skip
    end = tl.minimum(first + BM, L)
    b_o, b_m, b_l = attend(
        b_o, b_m, b_l, b_q, b_q2, k, k2, v, i_kv, row, L, end, o_m, first + 1, scale, BN, BK, BK2, BV, SHARED
    )
    tl.store(lse + i_h.to(tl.int64) * T + o_t, b_m + tl.log2(b_l), mask=m_m)
    b_o /= b_l[:, None]
    store_rows(o, o_t * H + i_h, m_m, b_o, b_o, V, BV, 0)


@triton.jit
def attend_dq(
    b_dq, b_dq2, b_q, b_q2, b_do, b_lse, b_delta, k, k2, v, i_h, row, num, end, o_last, seen, scale,
    BN: tl.constexpr, BK: tl.constexpr, BK2: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Over the same keys as `attend`, in the same order."""
    whole = tl.minimum(end, num // BN * BN)
    for REST in tl.static_range(2):
        for j in range(whole * REST, end if REST else whole, BN):
            b_k, b_k2 = described_rows(k, k2, i_h, row + j, BN, BK, BK2)
            b_v = v.load([i_h, row + j, 0]).reshape(BN, BV)
            o_n = j + tl.arange(0, BN)
            if REST:
                # What comes after the last key weighs nothing, but 0 * NaN would.
                m_n = (o_n < num)[:, None]
                b_k, b_k2, b_v = tl.where(m_n, b_k, 0.0), tl.where(m_n, b_k2, 0.0), tl.where(m_n, b_v, 0.0)
            b_s = product(b_q, b_q2, b_k, b_k2, BK2)
            if j + BN > seen:
                b_s = tl.where(o_n[None, :] <= o_last[:, None], b_s, float("-inf"))
            b_p = tl.exp2(b_s * scale - b_lse[:, None])
            b_ds = (b_p * (tl.dot(b_do, b_v.T) - b_delta[:, None])).to(b_k.dtype)
            b_dq = tl.dot(b_ds, b_k, b_dq)
            if BK2:
                b_dq2 = tl.dot(b_ds, b_k2, b_dq2)
    return b_dq, b_dq2


@triton.jit(do_not_specialize=["N", "blocks"])
def _mla_prefill_dq_kernel(
    q, k, k2, v, cu, k_prefix, k2_prefix, v_prefix, cu_prefix, do, o, lse, delta, dq, scale, dscale, T, N, H, blocks,
    stride_q, stride_qh, stride_do, stride_doh,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS_PREFIX: tl.constexpr,
    HEADS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BK2: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dq of a block of rows; and delta = sum(o * do), which the softmax's derivative subtracts, for dk too."""
    i_h, i_x = deal(H, blocks, HEADS)
    i_kv = i_h // GROUP
    i_n, row, L, first = locate(cu, blocks - 1 - i_x, N, BM)
    if first >= L:
        return
    o_m = first + tl.arange(0, BM)
    m_m, o_t = o_m < L, (row + o_m).to(tl.int64)
    p_row = i_h.to(tl.int64) * T + o_t
    b_lse = tl.load(lse + p_row, mask=m_m, other=float("inf"))
    b_do, _ = load_rows(do, o_t, m_m, stride_do, i_h, stride_doh, V, BV, 0)
    b_o, _ = load_rows(o, o_t, m_m, H * V, i_h, V, V, BV, 0)
    b_q, b_q2 = load_rows(q, o_t, m_m, stride_q, i_h, stride_qh, K, BK, BK2)
    b_dq = tl.zeros([BM, BK], dtype=tl.float32)
    b_dq2 = tl.zeros([BM, BK2 if BK2 else 1], dtype=tl.float32)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(delta + p_row, b_delta, mask=m_m)
    if HAS_PREFIX:
        row_p = tl.load(cu_prefix + i_n)
        S = tl.load(cu_prefix + i_n + 1) - row_p
        b_dq, b_dq2 = attend_dq(
            b_dq, b_dq2, b_q, b_q2, b_do, b_lse, b_delta, k_prefix, k2_prefix, v_prefix, i_kv, row_p, S,
            S, o_m * 0 + S - 1, S, scale, BN, BK, BK2, BV,
        )  # fmt: skip
    end = tl.minimum(first + BM, L)
    b_dq, b_dq2 = attend_dq(
        b_dq, b_dq2, b_q, b_q2, b_do, b_lse, b_delta, k, k2, v, i_kv, row, L, end, o_m, first + 1, scale,
        BN, BK, BK2, BV,
    )  # fmt: skip
    store_rows(dq, o_t * H + i_h, m_m, b_dq * dscale, b_dq2 * dscale, K, BK, BK2)


@triton.jit
def add_rows(
    b_dk, b_dk2, b_dv, b_k, b_k2, b_v, b_q, b_q2, b_do, lse, delta, m_m, shift, scale,
    BN: tl.constexpr, B: tl.constexpr, CAUSAL: tl.constexpr, BK2: tl.constexpr,
):  # fmt: skip
    """What B rows, the first `shift` after the first key, give to dk and dv; those outside of m_m give nothing.

    Transposed, [BN, B]: then p and ds can stay in registers as left operands.
    """
    b_dp = tl.dot(b_v, b_do.T)
    b_s = product(b_k, b_k2, b_q, b_q2, BK2)
    if CAUSAL:
        b_s = tl.where(tl.arange(0, BN)[:, None] - shift <= tl.arange(0, B)[None, :], b_s, float("-inf"))
    # Read this late, they are not held in registers during the products: the loop has none to spare.
    b_lse = tl.load(lse, mask=m_m, other=float("inf"))
    b_delta = tl.load(delta, mask=m_m, other=0.0)
    b_p = tl.exp2(b_s * scale - b_lse[None, :])
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv)
    b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
    b_dk = tl.dot(b_ds, b_q, b_dk)
    if BK2:
        b_dk2 = tl.dot(b_ds, b_q2, b_dk2)
    return b_dk, b_dk2, b_dv


@triton.jit(do_not_specialize=["N", "blocks"])
def _mla_prefill_dkv_kernel(
    q, q2, do, q_rows, do_rows, k, v, cu, cu_keys, lse, delta, dk, dv, scale, dscale, T, N, H, blocks,
    stride_q, stride_qh, stride_do, stride_doh, stride_k, stride_kh, stride_v, stride_vh,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, IS_PREFIX: tl.constexpr,
    HEADS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BK2: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys: over all heads that share them and all rows that see them.

    `cu_keys` bounds the documents' keys: their own rows, or prefixes, which all rows of the document see. A document
    of fewer rows than a tile comes in small ones, masked.
    """
    i_kv, i_x = deal(H, blocks, HEADS)
    i_n, row_k, S, first = locate(cu_keys, i_x, N, BN)
    if first >= S:
        return
    row = tl.load(cu + i_n)
    L = tl.load(cu + i_n + 1) - row
    o_n = first + tl.arange(0, BN)
    m_n, o_s = o_n < S, (row_k + o_n).to(tl.int64)
    b_k, b_k2 = load_rows(k, o_s, m_n, stride_k, i_kv, stride_kh, K, BK, BK2)
    b_v, _ = load_rows(v, o_s, m_n, stride_v, i_kv, stride_vh, V, BV, 0)
    b_dk = tl.zeros([BN, BK], dtype=tl.float32)
    b_dk2 = tl.zeros([BN, BK2 if BK2 else 1], dtype=tl.float32)
    b_dv = tl.zeros([BN, BV], dtype=tl.float32)
    low = 0 if IS_PREFIX else first
    steps = tl.cdiv(L - low, BM) if L >= BM else 0
    for i in range(0, steps * GROUP):
        i_h, i_m = i_kv, low + i * BM
        if GROUP > 1:
            i_h, i_m = i_kv * GROUP + i // steps, low + i % steps * BM
        # The last tile ends with the document, and leaves out what the one before had.
        at = tl.minimum(i_m, L - BM)
        o_m = tl.arange(0, BM)
        p_row = i_h.to(tl.int64) * T + row + at + o_m
        b_do = do.load([i_h, row + at, 0]).reshape(BM, BV)
        b_q, b_q2 = described_rows(q, q2, i_h, row + at, BM, BK, BK2)
        b_dk, b_dk2, b_dv = add_rows(
            b_dk, b_dk2, b_dv, b_k, b_k2, b_v, b_q, b_q2, b_do, lse + p_row, delta + p_row, o_m >= i_m - at,
            at - first, scale, BN, BM, not IS_PREFIX, BK2,
        )  # fmt: skip
    steps = tl.cdiv(L - low, SHORT) if L < BM else 0
    for i in range(0, steps * GROUP):
        i_h, at = i_kv * GROUP + i // steps, low + i % steps * SHORT
        o_m = at + tl.arange(0, SHORT)
        m_m, o_t = o_m < L, (row + o_m).to(tl.int64)
        p_row = i_h.to(tl.int64) * T + o_t
        b_do = load_rows(do_rows, o_t, m_m, stride_do, i_h, stride_doh, V, BV, 0)[0]
        b_q, b_q2 = load_rows(q_rows, o_t, m_m, stride_q, i_h, stride_qh, K, BK, BK2)
        b_dk, b_dk2, b_dv = add_rows(
            b_dk, b_dk2, b_dv, b_k, b_k2, b_v, b_q, b_q2, b_do, lse + p_row, delta + p_row, m_m,
            at - first, scale, BN, SHORT, not IS_PREFIX, BK2,
        )  # fmt: skip
    store_rows(dk, o_s * H + i_kv, m_n, b_dk * dscale, b_dk2 * dscale, K, BK, BK2)
    store_rows(dv, o_s * H + i_kv, m_n, b_dv, b_dv, V, BV, 0)


class Blocks(NamedTuple):
    """How a kernel cuts its work: BM rows of queries, BN keys, of HEADS heads at a time."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int
    HEADS: int = 4


# For Hopper's 227 KiB of shared memory, and what covers keys and values at most 320 wide together; and for all else.
BLOCKS = {"fwd": Blocks(128, 64, 8, 3), "dq": Blocks(128, 64, 8, 3), "dkv": Blocks(64, 128, 8, 2)}
SMALL_BLOCKS = {"fwd": Blocks(64, 32, 4, 2), "dq": Blocks(64, 32, 4, 2), "dkv": Blocks(32, 64, 4, 2)}


@functools.cache
def constants(kernel: str, device: torch.device, K: int, V: int) -> dict[str, int]:
    """Blocks, and what covers the widths: powers of two from 16, for K two of them where needed (192 = 128 + 64)."""
    BK = max(triton.next_power_of_2(K + 1) // 2, 16)
    BK2 = max(triton.next_power_of_2(K - BK), 16) if K > BK else 0
    BV = max(triton.next_power_of_2(V), 16)
    hopper = device.type != "cuda" or is_hopper(device)
    blocks = BLOCKS if hopper and BK + BK2 + BV <= 320 else SMALL_BLOCKS
    return {"K": K, "V": V, "BK": BK, "BK2": BK2, "BV": BV, **blocks[kernel]._asdict()}


def readable(x: Tensor) -> Tensor:
    """x [T, H, X] with channels side by side and rows on 16 bytes, as tensor descriptors need them; else a copy."""
    step = 16 // x.element_size()
    stride_t, stride_h, stride_x = x.stride()
    if stride_x == 1 and stride_t % step == stride_h % step == 0 and stride_t > 0 < stride_h and x.data_ptr() % 16 == 0:
        return x
    T, H, X = x.shape
    return torch.empty(T, H, triton.cdiv(X, step) * step, dtype=x.dtype, device=x.device)[..., :X].copy_(x)


def described(x: Tensor, B: int, W: int) -> TensorDescriptor | None:
    """Reads blocks [1, B, W] of x [T, H, X], heads first; nothing if W is 0."""
    T, H, X = x.shape
    stride_t, stride_h, _ = x.stride()
    return TensorDescriptor(x, [H, T, X], [stride_h, stride_t, 1], [1, B, W]) if W else None


def keys(
    k: Tensor | None, v: Tensor | None, c: dict[str, int], k_rope: Tensor | None = None
) -> tuple[TensorDescriptor | None, ...]:
    """Keys in two pieces, the second of `k_rope` [S, R] where given, and values; nothing where there is no prefix."""
    if k is None or v is None or len(k) == 0:
        return None, None, None
    k = readable(k)
    k2 = k if k_rope is None else readable(k_rope[:, None])
    return described(k, c["BN"], c["BK"]), described(k2, c["BN"], c["BK2"]), described(readable(v), c["BN"], c["BV"])


def takes_shared_keys(k: Tensor, k_rope: Tensor) -> bool:
    """Whether k's own channels are just the first of the pieces that keys lie in."""
    c = constants("fwd", k.device, k.shape[2] + k_rope.shape[1], 16)
    return k.shape[2] == c["BK"]


@kernel_op("dsv2::mla_prefill")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float,
    k_prefix: Tensor | None, v_prefix: Tensor | None, cu_seqlens_prefix: Tensor | None,
    k_rope: Tensor | None = None, k_rope_prefix: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [T, H, V], and log-sum-exp [H, T] to base 2."""
    (T, H, K), V = q.shape, v.shape[2]
    o = torch.empty(T, H, V, dtype=q.dtype, device=q.device)
    lse = torch.empty(H, T, dtype=torch.float32, device=q.device)
    if T == 0:
        return o, lse
    if k_prefix is None and _is_for_hopper(q, k, v, k_rope):
        _hopper_forward(q, k, v, cu_seqlens, scale, k_rope, o, lse)
        return o, lse
    c, N, q = constants("fwd", q.device, K, V), len(cu_seqlens) - 1, readable(q)
    blocks, prefix = T // c["BM"] + N, keys(k_prefix, v_prefix, c, k_rope_prefix)
    _mla_prefill_fwd_kernel[(blocks * H,)](
        q, *keys(k, v, c, k_rope), cu_seqlens, *prefix, cu_seqlens_prefix, o, lse, scale * LOG2_E, T, N, H, blocks,
        q.stride(0), q.stride(1), GROUP=H // k.shape[1], HAS_PREFIX=prefix[0] is not None, SHARED=k_rope is not None,
        **c,
    )  # fmt: skip
    return o, lse


def _is_for_hopper(q: Tensor, k: Tensor, v: Tensor, k_rope: Tensor | None) -> bool:
    """MLA's widths, with keys and values for every head; `k_rope` holds the keys' last 64 channels, or k itself."""
    is_official = (q.shape[2], v.shape[2]) == (192, 128) and k.shape[1:] == (q.shape[1], 192 if k_rope is None else 128)
    return is_official and q.dtype == torch.bfloat16 and is_hopper(q.device)


def _hopper_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, k_rope: Tensor | None, o: Tensor, lse: Tensor
) -> None:
    from dsv2.kernels.mla_prefill import hopper

    k = readable(k)
    k_rope = k[..., 128:] if k_rope is None else readable(k_rope[:, None])
    hopper.forward(readable(q), k, readable(v), k_rope, cu_seqlens, scale * LOG2_E, o, lse)


@_forward.register_fake
def _(
    q, k, v, cu_seqlens, scale, k_prefix, v_prefix, cu_seqlens_prefix, k_rope=None, k_rope_prefix=None
) -> tuple[Tensor, Tensor]:
    T, H, _ = q.shape
    return q.new_empty(T, H, v.shape[2]), q.new_empty(H, T, dtype=torch.float32)


@kernel_op("dsv2::mla_prefill_backward")
def _backward(
    do: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float,
    k_prefix: Tensor | None, v_prefix: Tensor | None, cu_seqlens_prefix: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Of q, k, v and prefix. Given a row's log-sum-exp over all it sees, own keys and prefix are independent."""
    (T, H, K), V = q.shape, v.shape[2]
    q, do, N = readable(q), readable(do), len(cu_seqlens) - 1
    delta = torch.empty(H, T, dtype=torch.float32, device=q.device)
    dq = torch.empty(T, H, K, dtype=q.dtype, device=q.device)
    if T:
        c = constants("dq", q.device, K, V)
        blocks, prefix = T // c["BM"] + N, keys(k_prefix, v_prefix, c)
        _mla_prefill_dq_kernel[(blocks * H,)](
            q, *keys(k, v, c), cu_seqlens, *prefix, cu_seqlens_prefix, do, o, lse, delta, dq, scale * LOG2_E, scale,
            T, N, H, blocks, q.stride(0), q.stride(1), do.stride(0), do.stride(1),
            GROUP=H // k.shape[1], HAS_PREFIX=prefix[0] is not None, **c,
        )  # fmt: skip
    given = q, do, lse, delta, cu_seqlens, scale
    grads = [dq, *_keys_backward(*given, k, v, cu_seqlens, is_prefix=False)]
    if k_prefix is not None:
        grads += _keys_backward(*given, k_prefix, v_prefix, cu_seqlens_prefix, is_prefix=True)
    return grads


@_backward.register_fake
def _(do, o, lse, q, k, v, cu_seqlens, scale, k_prefix, v_prefix, cu_seqlens_prefix) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, k_prefix, v_prefix) if x is not None]


def _keys_backward(
    q: Tensor, do: Tensor, lse: Tensor, delta: Tensor, cu_seqlens: Tensor, scale: float,
    k: Tensor, v: Tensor, cu_keys: Tensor, is_prefix: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (T, H, K), (S, H_kv, V) = q.shape, v.shape
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    if T == 0:
        return dk.zero_(), dv.zero_()
    if S:
        c, N, k, v = constants("dkv", q.device, K, V), len(cu_keys) - 1, readable(k), readable(v)
        blocks = S // c["BN"] + N
        _mla_prefill_dkv_kernel[(blocks * H_kv,)](
            *(described(x, c["BM"], c[W]) for x, W in ((q, "BK"), (q, "BK2"), (do, "BV"))), q, do, k, v, cu_seqlens,
            cu_keys, lse, delta, dk, dv, scale * LOG2_E, scale, T, N, H_kv, blocks,
            q.stride(0), q.stride(1), do.stride(0), do.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            GROUP=H // H_kv, IS_PREFIX=is_prefix, **c,
        )  # fmt: skip
    return dk, dv


def _setup(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, ctx.scale, *prefix, _, _ = inputs
    ctx.save_for_backward(*output, q, k, v, cu_seqlens, *prefix)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, do: Tensor, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    o, lse, q, k, v, cu_seqlens, *prefix = ctx.saved_tensors
    dq, dk, dv, *dprefix = _backward(do, o, lse, q, k, v, cu_seqlens, ctx.scale, *prefix)
    return dq, dk, dv, None, None, *(dprefix or (None, None)), None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)


def mla_prefill(
    q, k, v, cu_seqlens, scale, k_prefix=None, v_prefix=None, cu_seqlens_prefix=None, k_rope=None, k_rope_prefix=None
) -> Tensor:
    if k_rope is not None and (torch.is_grad_enabled() or not takes_shared_keys(k, k_rope)):
        k = with_rope(k, k_rope)
        k_prefix = None if k_prefix is None else with_rope(k_prefix, k_rope_prefix)
        k_rope = k_rope_prefix = None
    return _forward(q, k, v, cu_seqlens, scale, k_prefix, v_prefix, cu_seqlens_prefix, k_rope, k_rope_prefix)[0]
