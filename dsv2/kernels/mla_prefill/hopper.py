"""mla_prefill's forward for Hopper, in Gluon, at MLA's widths: keys of 128 + 64 channels, values of 128, no prefix.

After FlashAttention-3 (Shah et al., 2024): of a program's three warp groups two compute 64 rows of queries each, and
one warp of the third brings keys and values, 128 rows at a time, two places each. A warp group's scores of the next
keys and its values of the last are under way while it computes a softmax; that the two take turns in giving matrix
instructions, as they do in that paper, was slower. There is a program for every multiprocessor, which takes the next
block of queries from a counter when it has brought what the one before needs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dsv2.kernels.backend import num_multiprocessors

ROWS = gl.constexpr(64)  # of queries, a warp group's
BM = gl.constexpr(128)  # of queries, a program's
BN = gl.constexpr(128)  # of keys; as many as queries, so that the last block of keys is the diagonal
NOPE = gl.constexpr(128)
ROPE = gl.constexpr(64)
VALUE = gl.constexpr(128)
STAGES = gl.constexpr(2)
# Heads side by side: what the programs read at a time is to fit in the L2 cache.
HEADS = gl.constexpr(8)


@gluon.jit
def _locate(cu, i_x, N):
    """The first row and the length of the document that owns block i_x (see `kernel`), and where in it that begins."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    i_n = -1
    for i in range(0, N, 128):
        o_n = i + gl.arange(0, 128, layout=layout)
        m_n = o_n < N
        b_first = gl.load(cu + o_n, mask=m_n, other=0) // BM + o_n
        i_n += gl.sum(((b_first <= i_x) & m_n).to(gl.int32), 0)
    row = gl.load(cu + i_n)
    return row, gl.load(cu + i_n + 1) - row, (i_x - (row // BM + i_n)) * BM


@gluon.jit
def _next_block(i_p, counter, cu, N, H, blocks):
    """Where the block at place i_p of the order lies, or the next one that has rows; i_p is the number of all at last.

    The last blocks of a document have most keys: they go first.
    """
    i_h = gl.to_tensor(0)
    row = gl.to_tensor(0)
    length = gl.to_tensor(0)
    first = gl.to_tensor(0)
    while (i_p < blocks * H) & (first >= length):
        i_g = i_p // (HEADS * blocks)
        i_r = i_p - i_g * HEADS * blocks
        heads = gl.minimum(H - i_g * HEADS, HEADS)
        i_h = i_g * HEADS + i_r % heads
        row, length, first = _locate(cu, blocks - 1 - i_r // heads, N)
        if first >= length:
            i_p = _claim(counter)
    return i_p, i_h, row, length, first


@gluon.jit
def _claim(counter):
    return gl.atomic_add(counter, 1, sem="relaxed") + gl.num_programs(0)


@gluon.jit
def _load_keys(kn_desc, kr_desc, row, column, column_rope, kn_smem, kr_smem, full, free, it):
    stage = it % STAGES
    mbarrier.wait(free.index(stage), (it // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), BN * (NOPE + ROPE) * 2)
    tma.async_copy_global_to_shared(kn_desc, [row, column], full.index(stage), kn_smem.index(stage))
    tma.async_copy_global_to_shared(kr_desc, [row, column_rope], full.index(stage), kr_smem.index(stage))


@gluon.jit
def _load_values(v_desc, row, column, v_smem, full, free, it):
    stage = it % STAGES
    mbarrier.wait(free.index(stage), (it // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), BN * VALUE * 2)
    tma.async_copy_global_to_shared(v_desc, [row, column], full.index(stage), v_smem.index(stage))


@gluon.jit
def _load_queries(qn_desc, qr_desc, row, column, qn_smem, qr_smem, full):
    mbarrier.expect(full, BM * (NOPE + ROPE) * 2)
    for i in gl.static_range(2):
        tma.async_copy_global_to_shared(qn_desc, [row + i * ROWS, column], full, qn_smem.index(i))
        tma.async_copy_global_to_shared(qr_desc, [row + i * ROWS, column + NOPE], full, qr_smem.index(i))


@gluon.jit
def _tell(block_smem, i_h, row, length, first):
    """Which block the queries to come are of; a length of 0 says that there are none."""
    o_i = gl.arange(0, 4, layout=gl.BlockedLayout([1], [32], [1], [0]))
    block_smem.store(gl.where(o_i == 0, i_h, gl.where(o_i == 1, row, gl.where(o_i == 2, length, first))))
    gl.thread_barrier()


@gluon.jit
def _told(block_smem):
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    block = block_smem.load(layout)
    o_i = gl.arange(0, 4, layout=layout)
    i_h = gl.sum(gl.where(o_i == 0, block, 0), 0)
    row = gl.sum(gl.where(o_i == 1, block, 0), 0)
    length = gl.sum(gl.where(o_i == 2, block, 0), 0)
    return i_h, row, length, gl.sum(gl.where(o_i == 3, block, 0), 0)


@gluon.jit
def _bring(
    qn_desc, qr_desc, kn_desc, kr_desc, v_desc, cu, counter, N, H, blocks,
    stride_qh, stride_kh, stride_rh, stride_vh,
    qn_smem, qr_smem, kn_smem, kr_smem, v_smem, block_smem, q_full, q_free, k_full, k_free, v_full, v_free,
):  # fmt: skip
    """One warp: claims blocks of queries, and loads as places come free. A document's keys go from last to first."""
    i_p, i_h, row, length, first = _next_block(gl.program_id(0), counter, cu, N, H, blocks)
    num_blocks = gl.to_tensor(0)
    it = gl.to_tensor(0)
    while i_p < blocks * H:
        last = row + first
        _load_keys(kn_desc, kr_desc, last, i_h * stride_kh, i_h * stride_rh, kn_smem, kr_smem, k_full, k_free, it)
        mbarrier.wait(q_free, (num_blocks & 1) ^ 1)
        _tell(block_smem, i_h, row, length, first)
        _load_queries(qn_desc, qr_desc, last, i_h * stride_qh, qn_smem, qr_smem, q_full)
        for i in range(BN, first + BN, BN):
            _load_keys(
                kn_desc, kr_desc, last - i, i_h * stride_kh, i_h * stride_rh, kn_smem, kr_smem, k_full, k_free, it + 1
            )
            _load_values(v_desc, last - i + BN, i_h * stride_vh, v_smem, v_full, v_free, it)
            it += 1
        _load_values(v_desc, row, i_h * stride_vh, v_smem, v_full, v_free, it)
        it += 1
        num_blocks += 1
        i_p, i_h, row, length, first = _next_block(_claim(counter), counter, cu, N, H, blocks)
    mbarrier.wait(q_free, (num_blocks & 1) ^ 1)
    _tell(block_smem, 0, 0, 0, 0)
    mbarrier.arrive(q_full, count=1)


@gluon.jit
def _clear_tail(v_smem, num_valid):
    """Zero values past the document's end: a probability of 0 times NaN would be NaN. Both warp groups do, alike."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    m_n = gl.arange(0, BN, layout=gl.SliceLayout(1, layout)) < num_valid
    for i in gl.static_range(VALUE // 64):
        part = v_smem.slice(i * 64, 64, dim=1)
        part.store(gl.where(m_n[:, None], part.load(layout), 0.0))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _score(qn_smem, qr_smem, kn_smem, kr_smem, mma: gl.constexpr):
    b_s = gl.zeros([ROWS, BN], gl.float32, mma)
    b_s = warpgroup_mma(qn_smem, kn_smem.permute((1, 0)), b_s, use_acc=False, is_async=True)
    return warpgroup_mma(qr_smem, kr_smem.permute((1, 0)), b_s, is_async=True)


@gluon.jit
def _store(o, lse, b_o, b_m, b_l, i_h, row, length, first, T, H, dtype: gl.constexpr, mma: gl.constexpr):
    """The document's own rows of the output, and their log-sum-exp."""
    # Each four lanes that hold 16 bytes here and there come to hold 64 side by side.
    wide: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [8, 0]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 128],
    )
    o_m = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    gl.store(lse + i_h.to(gl.int64) * T + row + o_m, b_m + gl.log2(b_l), mask=o_m < length)
    o_m = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide))
    o_v = gl.arange(0, VALUE, layout=gl.SliceLayout(0, wide))
    b_y = gl.convert_layout((b_o * (1 / b_l)[:, None]).to(dtype), wide)
    p_o = o + ((row + o_m).to(gl.int64) * H + i_h)[:, None] * VALUE + o_v[None, :]
    gl.store(p_o, b_y, mask=(o_m < length)[:, None])


@gluon.jit
def _attend(
    o, lse, T, H, scale_log2, qn_smem, qr_smem, kn_smem, kr_smem, v_smem, block_smem,
    q_full, q_free, k_full, k_free, v_full, v_free, W: gl.constexpr,
):  # fmt: skip
    """Warp group W of two: running softmax, base 2, of ROWS rows of queries over all keys that they see."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    dtype: gl.constexpr = v_smem.dtype
    o_m = W * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    o_n = gl.arange(0, BN, layout=gl.SliceLayout(0, mma))
    num_blocks = gl.to_tensor(0)
    it = gl.to_tensor(0)
    mbarrier.wait(q_full, 0)
    i_h, row, length, first = _told(block_smem)
    while first < length:
        stage = it % STAGES
        mbarrier.wait(k_full.index(stage), it // STAGES & 1)
        b_s = _score(qn_smem.index(W), qr_smem.index(W), kn_smem.index(stage), kr_smem.index(stage), mma)
        b_s = warpgroup_mma_wait(0, deps=[b_s])
        mbarrier.arrive(k_free.index(stage), count=1)
        b_s = gl.where(o_n[None, :] <= o_m[:, None], b_s, float("-inf"))
        b_m = gl.max(b_s, 1) * scale_log2
        b_e = gl.exp2(b_s * scale_log2 - b_m[:, None])
        b_l = gl.sum(b_e, 1)
        b_p = gl.convert_layout(b_e.to(dtype), left)
        b_o = gl.zeros([ROWS, VALUE], gl.float32, mma)
        if first + BN > length:
            mbarrier.wait(v_full.index(stage), it // STAGES & 1)
            _clear_tail(v_smem.index(stage), length - first)
        rest = first // BN
        mbarrier.wait(k_full.index((it + 1) % STAGES), (it + 1) // STAGES & 1, pred=rest > 0)
        for i in range(rest):
            stage = it % STAGES
            stage_k = (it + 1) % STAGES
            b_s = _score(qn_smem.index(W), qr_smem.index(W), kn_smem.index(stage_k), kr_smem.index(stage_k), mma)
            mbarrier.wait(v_full.index(stage), it // STAGES & 1)
            b_o = warpgroup_mma(b_p, v_smem.index(stage), b_o, is_async=True)
            b_s = warpgroup_mma_wait(1, deps=[b_s])
            mbarrier.arrive(k_free.index(stage_k), count=1)
            b_new = gl.maximum(b_m, gl.max(b_s, 1) * scale_log2)
            b_fade = gl.exp2(b_m - b_new)
            b_e = gl.exp2(b_s * scale_log2 - b_new[:, None])
            b_l = b_l * b_fade + gl.sum(b_e, 1)
            b_m = b_new
            # The next round's keys. Here it also keeps ptxas from awaiting the values ahead of the softmax.
            mbarrier.wait(k_full.index((it + 2) % STAGES), (it + 2) // STAGES & 1, pred=i + 1 < rest)
            b_o, b_p = warpgroup_mma_wait(0, deps=[b_o, b_p])
            mbarrier.arrive(v_free.index(stage), count=1)
            b_o = b_o * b_fade[:, None]
            b_p = gl.convert_layout(b_e.to(dtype), left)
            it += 1
        mbarrier.arrive(q_free, count=1)
        stage = it % STAGES
        mbarrier.wait(v_full.index(stage), it // STAGES & 1)
        b_o = warpgroup_mma(b_p, v_smem.index(stage), b_o, is_async=True)
        b_o = warpgroup_mma_wait(0, deps=[b_o])
        mbarrier.arrive(v_free.index(stage), count=1)
        _store(o, lse, b_o, b_m, b_l, i_h, row, length, first + W * ROWS, T, H, dtype, mma)
        it += 1
        num_blocks += 1
        mbarrier.wait(q_full, num_blocks & 1)
        i_h, row, length, first = _told(block_smem)


@gluon.jit(do_not_specialize=["T", "N", "H", "blocks"])
def _mla_prefill_fwd_kernel(
    qn_desc, qr_desc, kn_desc, kr_desc, v_desc, cu, counter, o, lse, scale_log2, T, N, H, blocks,
    stride_qh, stride_kh, stride_rh, stride_vh,
):  # fmt: skip
    dtype: gl.constexpr = v_desc.dtype
    rows: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    qn_smem = gl.allocate_shared_memory(dtype, [2, ROWS, NOPE], rows)
    qr_smem = gl.allocate_shared_memory(dtype, [2, ROWS, ROPE], rows)
    kn_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, NOPE], rows)
    kr_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, ROPE], rows)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, VALUE], rows)
    block_smem = gl.allocate_shared_memory(gl.int32, [4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_free = gl.allocate_shared_memory(gl.int64, [1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_free, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_attend, (o, lse, T, H, scale_log2, qn_smem, qr_smem, kn_smem, kr_smem, v_smem, block_smem,
                       q_full, q_free, k_full, k_free, v_full, v_free, 0)),
            (_attend, (o, lse, T, H, scale_log2, qn_smem, qr_smem, kn_smem, kr_smem, v_smem, block_smem,
                       q_full, q_free, k_full, k_free, v_full, v_free, 1)),
            (_bring, (qn_desc, qr_desc, kn_desc, kr_desc, v_desc, cu, counter, N, H, blocks,
                      stride_qh, stride_kh, stride_rh, stride_vh,
                      qn_smem, qr_smem, kn_smem, kr_smem, v_smem, block_smem,
                      q_full, q_free, k_full, k_free, v_full, v_free)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, k_rope: Tensor, cu_seqlens: Tensor, scale_log2: float, o: Tensor, lse: Tensor
) -> None:
    """Write o [T, H, V], contiguous, and lse [H, T], base 2. Reads `readable` q [T, H, K] and k, v [T, H, 128 or more].

    k_rope is [T, H, 64], or [T, 1, 64] where heads share it. T is above 0.
    """
    (T, H, _), N = q.shape, len(cu_seqlens) - 1
    blocks = T // BM.value + N
    grid = (min(blocks * H, num_multiprocessors(q.device)),)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    _mla_prefill_fwd_kernel[grid](
        _described(q, ROWS.value, NOPE.value), _described(q, ROWS.value, ROPE.value),
        _described(k, BN.value, NOPE.value), _described(k_rope, BN.value, ROPE.value),
        _described(v, BN.value, VALUE.value), cu_seqlens, counter, o, lse, scale_log2, T, N, H, blocks,
        q.stride(1), k.stride(1), k_rope.stride(1) if k_rope.shape[1] > 1 else 0, v.stride(1), num_warps=4,
    )  # fmt: skip


def _described(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Reads blocks [rows, width] of x [T, H, X], head h from column h * stride."""
    T, H, X = x.shape
    layout = gl.NVMMASharedLayout(128, 16, rank=2)
    return TensorDescriptor(x, [T, (H - 1) * x.stride(1) + X], [x.stride(0), 1], [rows, width], layout)
