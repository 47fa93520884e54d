"""mla_decode for Hopper, in Gluon: pages by the bulk copy engine, warp-group matrix instructions, two pages in flight.

A program owns one part of the work table and one tile of query rows, and walks its pages in order; while it computes on
one page the next is on its way. A page is read once and serves as keys and as values.

Up to 32 rows a tile the operands are swapped: scores^T = K q^T and y^T += V^T p^T, so that cache rows and latent
channels fill the 64-row side of the instruction and no query row is padding. Tiles of 64 rows have one warp
group for scores and their softmax, and two for the values of the page before, 256 channels of y each.
"""

from __future__ import annotations

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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PAGE = gl.constexpr(64)
LATENT = gl.constexpr(512)
ROPE = gl.constexpr(64)
STAGES = gl.constexpr(2)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _num_pages(lengths, seq, end_seq, end_page):
    """Pages of a sequence that belong to this part, counted from its first."""
    pages = (gl.load(lengths + seq) + PAGE - 1) // PAGE
    return gl.where(seq == end_seq, end_page, pages)


@gluon.jit
def _next_page(lengths, table, stride_table, seq, page, limit, end_seq, end_page):
    """The place after (seq, page) in this part's walk, and the id of the page there; seq > end_seq when it is over."""
    page += 1
    while (page >= limit) & (seq <= end_seq):
        seq += 1
        page = seq * 0
        limit = seq * 0
        if seq <= end_seq:
            limit = _num_pages(lengths, seq, end_seq, end_page)
    page_id = gl.load(table + seq.to(gl.int64) * stride_table + page, mask=seq <= end_seq, other=0)
    return seq, page, limit, page_id


@gluon.jit
def _first_page(lengths, table, stride_table, begin_seq, begin_page, end_seq, end_page):
    """Where the walk begins. The page's id is asked for together with the length that tells whether there is one."""
    seq, page = begin_seq, begin_page
    page_id = gl.load(table + seq.to(gl.int64) * stride_table + page, mask=seq <= end_seq, other=0)
    limit = _num_pages(lengths, seq, end_seq, end_page)
    if page >= limit:
        seq, page, limit, page_id = _next_page(lengths, table, stride_table, seq, page - 1, limit, end_seq, end_page)
    return seq, page, limit, page_id


@gluon.jit
def _load_page(latent_desc, rope_desc, page_id, c_smem, k_smem, bars, stage, pred):
    bar = bars.index(stage)
    mbarrier.expect(bar, PAGE * (LATENT + ROPE) * 2, pred=pred)
    row = page_id * PAGE
    tma.async_copy_global_to_shared(latent_desc, [row, 0], bar, c_smem.index(stage), pred=pred)
    tma.async_copy_global_to_shared(rope_desc, [row, LATENT], bar, k_smem.index(stage), pred=pred)


@gluon.jit
def _clear_tail(c_smem, num_valid, num_warps: gl.constexpr):
    """Zero the rows of a page past the end: a probability of 0 times NaN would be NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    m_s = gl.arange(0, PAGE, layout=gl.SliceLayout(1, layout)) < num_valid
    for i in gl.static_range(LATENT // 64):
        part = c_smem.slice(i * 64, 64, dim=1)
        part.store(gl.where(m_s[:, None], part.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def _query_part(q, stride_t, stride_h, first_token, row0, num_rows, H, column, ROWS: gl.constexpr, WIDTH: gl.constexpr,
                layout: gl.constexpr):  # fmt: skip
    """[ROWS, WIDTH] of the queries of a sequence; row = token * H + head."""
    o_r = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    o_q = (first_token.to(gl.int64) + o_r // H) * stride_t + (o_r % H).to(gl.int64) * stride_h
    o_c = column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    return gl.load(q + o_q[:, None] + o_c[None, :], mask=(o_r < num_rows)[:, None], other=0.0)


@gluon.jit
def _copy_queries(q_c, q_r, stride_ct, stride_ch, stride_rt, stride_rh, first_token, row0, num_rows, H,
                  qc_smem, qr_smem, ROWS: gl.constexpr, num_warps: gl.constexpr):  # fmt: skip
    """The queries of a sequence to shared memory, in pieces that fit the registers."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [num_warps, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    for i in gl.static_range(2):
        b_q = _query_part(
            q_c, stride_ct, stride_ch, first_token, row0, num_rows, H, i * (LATENT // 2), ROWS, LATENT // 2, wide
        )
        qc_smem.slice(i * (LATENT // 2), LATENT // 2, dim=1).store(b_q)
    b_q = _query_part(q_r, stride_rt, stride_rh, first_token, row0, num_rows, H, 0, ROWS, ROPE, narrow)
    qr_smem.store(b_q)
    fence_async_shared()


@gluon.jit
def _place(parts, splits, seq, begin_seq):
    """Where a sequence's result goes: its slot among the partial results, or (not cut) its own place."""
    slot = gl.load(parts + gl.program_id(0) * 8 + 4)
    first_slot = gl.load(splits + seq)
    is_split = gl.load(splits + seq + 1) > first_slot
    place = gl.where(is_split, gl.where(seq == begin_seq, slot, first_slot), seq)
    return place.to(gl.int64), is_split


@gluon.jit
def _store_lse(lse, part_lse, b_lse, o_r, place, is_split, num_rows):
    """Base 2 for the merge, slots of a row side by side; natural where it is final."""
    if is_split:
        gl.store(part_lse + o_r.to(gl.int64) * (2 * gl.num_programs(0)) + place, b_lse, mask=o_r < num_rows)
    else:
        gl.store(lse + place * num_rows + o_r, b_lse * LN2, mask=o_r < num_rows)


@gluon.jit
def _mla_decode_swapped_kernel(
    q_c, q_r, latent_desc, rope_desc, table, lengths, parts, splits, out, lse, part_out, part_lse,
    stride_ct, stride_ch, stride_rt, stride_rh, stride_table, H, num_rows, query_len, scale_log2,
    ROWS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Tiles of 16 or 32 query rows. [LATENT, ROWS] of y^T in registers, four warps."""
    gdc_wait()
    gdc_launch_dependents()
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, ROWS, 16])
    kv_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    p_layout: gl.constexpr = gl.NVMMASharedLayout(ROWS * 2, 16, rank=2)
    c_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, PAGE, LATENT], kv_layout)
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, PAGE, ROPE], kv_layout)
    qc_smem = gl.allocate_shared_memory(gl.bfloat16, [ROWS, LATENT], kv_layout)
    qr_smem = gl.allocate_shared_memory(gl.bfloat16, [ROWS, ROPE], kv_layout)
    p_smem = gl.allocate_shared_memory(gl.bfloat16, [PAGE, ROWS], p_layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)

    i_p = gl.program_id(0)
    row0 = gl.program_id(1) * ROWS
    begin_seq = gl.load(parts + i_p * 8)
    begin_page = gl.load(parts + i_p * 8 + 1)
    end_seq = gl.load(parts + i_p * 8 + 2)
    end_page = gl.load(parts + i_p * 8 + 3)

    o_s = gl.arange(0, PAGE, layout=gl.SliceLayout(1, mma))
    o_r = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(0, mma))

    # Asked for first: behind the pages' loads they would wait for all of those.
    _copy_queries(q_c, q_r, stride_ct, stride_ch, stride_rt, stride_rh, begin_seq * query_len, row0, num_rows, H,
                  qc_smem, qr_smem, ROWS, num_warps)  # fmt: skip
    # The walk of the loads runs ahead of the walk of the arithmetic by as many pages as there are stages.
    l_seq, l_page, l_limit, page_id = _first_page(
        lengths, table, stride_table, begin_seq, begin_page, end_seq, end_page
    )
    for i in gl.static_range(STAGES):
        _load_page(latent_desc, rope_desc, page_id, c_smem, k_smem, bars, i, l_seq <= end_seq)
        l_seq, l_page, l_limit, page_id = _next_page(
            lengths, table, stride_table, l_seq, l_page, l_limit, end_seq, end_page
        )

    it = begin_seq * 0
    for seq in range(begin_seq, end_seq + 1):
        length = gl.load(lengths + seq)
        first = gl.where(seq == begin_seq, begin_page, 0)
        last = _num_pages(lengths, seq, end_seq, end_page)
        place, is_split = _place(parts, splits, seq, begin_seq)
        if seq != begin_seq:
            _copy_queries(q_c, q_r, stride_ct, stride_ch, stride_rt, stride_rh, seq * query_len, row0, num_rows, H,
                          qc_smem, qr_smem, ROWS, num_warps)  # fmt: skip
        # A query token sees itself and what lies before it.
        first_limit = length - query_len + 1
        b_limit = first_limit + o_r // H
        b_m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(0, mma))
        b_l = gl.zeros([PAGE, ROWS], gl.float32, mma)
        b_y = gl.zeros([LATENT, ROWS], gl.float32, mma)
        for page in range(first, last):
            stage = it % STAGES
            mbarrier.wait(bars.index(stage), (it // STAGES) & 1)
            b_s = gl.zeros([PAGE, ROWS], gl.float32, mma)
            b_s = warpgroup_mma(c_smem.index(stage), qc_smem.permute((1, 0)), b_s, use_acc=False, is_async=True)
            b_s = warpgroup_mma(k_smem.index(stage), qr_smem.permute((1, 0)), b_s, is_async=True)
            b_s = warpgroup_mma_wait(0, deps=[b_s])
            if (page + 1) * PAGE > first_limit:
                b_s = gl.where((page * PAGE + o_s)[:, None] < b_limit[None, :], b_s, float("-inf"))
            b_new = gl.maximum(b_m, gl.max(b_s, 0))
            b_base = gl.where(b_new == float("-inf"), 0.0, b_new * scale_log2)
            b_alpha = gl.exp2(b_m * scale_log2 - b_base)
            b_p = gl.exp2(b_s * scale_log2 - b_base[None, :])
            b_l = b_l * b_alpha[None, :] + b_p
            b_m = b_new
            p_smem.store(b_p.to(gl.bfloat16))
            if (page + 1) * PAGE > length:
                _clear_tail(c_smem.index(stage), length - page * PAGE, num_warps)
            fence_async_shared()
            b_y = b_y * b_alpha[None, :]
            b_y = warpgroup_mma(c_smem.index(stage).permute((1, 0)), p_smem, b_y, is_async=True)
            b_y = warpgroup_mma_wait(0, deps=[b_y])
            gl.thread_barrier()
            _load_page(latent_desc, rope_desc, page_id, c_smem, k_smem, bars, stage, l_seq <= end_seq)
            l_seq, l_page, l_limit, page_id = _next_page(
                lengths, table, stride_table, l_seq, l_page, l_limit, end_seq, end_page
            )
            it += 1

        # Rows that see nothing have l = 0, y = 0 and m = -inf.
        b_sum = gl.sum(b_l, 0)
        b_sum = gl.where(b_sum > 0, b_sum, 1.0)
        b_y = b_y * (1 / b_sum)[None, :]
        b_lse = b_m * scale_log2 + gl.log2(b_sum)
        store: gl.constexpr = gl.BlockedLayout([8, 1], [32, 1], [2, num_warps // 2], [0, 1])
        o_c = gl.arange(0, LATENT, layout=gl.SliceLayout(1, store))
        o_y = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(0, store))
        b_y = gl.convert_layout(b_y, store)
        p_y = (place * num_rows + o_y)[None, :] * LATENT + o_c[:, None]
        _store_lse(lse, part_lse, b_lse, o_r, place, is_split, num_rows)
        if is_split:
            gl.store(part_out + p_y, b_y, mask=(o_y < num_rows)[None, :])
        else:
            gl.store(out + p_y, b_y.to(gl.bfloat16), mask=(o_y < num_rows)[None, :])


@gluon.jit
def _scores(
    q_c, q_r, lengths, parts, splits, lse, part_lse, stride_ct, stride_ch, stride_rt, stride_rh, H, num_rows, query_len,
    scale_log2, c_smem, k_smem, qc_smem, qr_smem, p_smem, alpha_smem, sum_smem,
    bars, alpha_full, p_full, p_free, sum_full, sum_free,
):  # fmt: skip
    """One warp group: scores and their softmax. Hands over p, and what y is to be rescaled by first."""
    ROWS: gl.constexpr = qc_smem.shape[0]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAGE, 16])
    p_part = parts + gl.program_id(0) * 8
    begin_seq = gl.load(p_part)
    begin_page = gl.load(p_part + 1)
    end_seq = gl.load(p_part + 2)
    end_page = gl.load(p_part + 3)
    row0 = gl.program_id(1) * ROWS
    o_r = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    o_s = gl.arange(0, PAGE, layout=gl.SliceLayout(0, mma))
    it = gl.to_tensor(0)
    for seq in range(begin_seq, end_seq + 1):
        length = gl.load(lengths + seq)
        first = gl.where(seq == begin_seq, begin_page, 0)
        last = _num_pages(lengths, seq, end_seq, end_page)
        place, is_split = _place(parts, splits, seq, begin_seq)
        if seq != begin_seq:
            _copy_queries(q_c, q_r, stride_ct, stride_ch, stride_rt, stride_rh, seq * query_len, row0, num_rows, H,
                          qc_smem, qr_smem, ROWS, 4)  # fmt: skip
        # A query token sees itself and what lies before it.
        first_limit = length - query_len + 1
        b_limit = first_limit + o_r // H
        b_m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, mma))
        b_l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, mma))
        for page in range(first, last):
            stage = it % STAGES
            mbarrier.wait(bars.index(stage), it // STAGES & 1)
            b_s = gl.zeros([ROWS, PAGE], gl.float32, mma)
            b_s = warpgroup_mma(qc_smem, c_smem.index(stage).permute((1, 0)), b_s, use_acc=False, is_async=True)
            b_s = warpgroup_mma(qr_smem, k_smem.index(stage).permute((1, 0)), b_s, is_async=True)
            b_s = warpgroup_mma_wait(0, deps=[b_s])
            if (page + 1) * PAGE > first_limit:
                b_s = gl.where((page * PAGE + o_s)[None, :] < b_limit[:, None], b_s, float("-inf"))
            b_new = gl.maximum(b_m, gl.max(b_s, 1))
            b_base = gl.where(b_new == float("-inf"), 0.0, b_new * scale_log2)
            b_alpha = gl.exp2(b_m * scale_log2 - b_base)
            alpha_smem.index(stage).store(b_alpha)
            mbarrier.arrive(alpha_full, count=1)
            b_p = gl.exp2(b_s * scale_log2 - b_base[:, None])
            mbarrier.wait(p_free, (it & 1) ^ 1)
            p_smem.store(b_p.to(gl.bfloat16))
            if (page + 1) * PAGE > length:
                _clear_tail(c_smem.index(stage), length - page * PAGE, 4)
            fence_async_shared()
            mbarrier.arrive(p_full, count=1)
            b_l = b_l * b_alpha + gl.sum(b_p, 1)
            b_m = b_new
            it += 1
        # Rows that see nothing have l = 0, y = 0 and m = -inf.
        b_l = gl.where(b_l > 0, b_l, 1.0)
        mbarrier.wait(sum_free, (seq - begin_seq & 1) ^ 1)
        sum_smem.store(b_l)
        mbarrier.arrive(sum_full, count=1)
        _store_lse(lse, part_lse, b_m * scale_log2 + gl.log2(b_l), o_r, place, is_split, num_rows)


@gluon.jit
def _values(
    latent_desc, rope_desc, table, lengths, parts, splits, out, part_out, stride_table, num_rows,
    c_smem, k_smem, p_smem, alpha_smem, sum_smem, bars, alpha_full, p_full, p_free, sum_full, sum_free,
):  # fmt: skip
    """Two warp groups: y, [ROWS, LATENT] in registers, 256 channels each; a page's place is filled anew once read."""
    ROWS: gl.constexpr = p_smem.shape[0]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, LATENT // 2, 16])
    p_part = parts + gl.program_id(0) * 8
    begin_seq = gl.load(p_part)
    begin_page = gl.load(p_part + 1)
    end_seq = gl.load(p_part + 2)
    end_page = gl.load(p_part + 3)
    o_r = gl.program_id(1) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    o_c = gl.arange(0, LATENT, layout=gl.SliceLayout(0, mma))
    m_r = (o_r < num_rows)[:, None]
    l_seq, l_page, l_limit, page_id = _first_page(
        lengths, table, stride_table, begin_seq, begin_page, end_seq, end_page
    )
    for i in gl.static_range(STAGES):
        _load_page(latent_desc, rope_desc, page_id, c_smem, k_smem, bars, i, l_seq <= end_seq)
        l_seq, l_page, l_limit, page_id = _next_page(
            lengths, table, stride_table, l_seq, l_page, l_limit, end_seq, end_page
        )

    it = gl.to_tensor(0)
    for seq in range(begin_seq, end_seq + 1):
        first = gl.where(seq == begin_seq, begin_page, 0)
        last = _num_pages(lengths, seq, end_seq, end_page)
        place, is_split = _place(parts, splits, seq, begin_seq)
        b_y = gl.zeros([ROWS, LATENT], gl.float32, mma)
        for _ in range(first, last):
            stage = it % STAGES
            mbarrier.wait(alpha_full, it & 1)
            b_y = b_y * alpha_smem.index(stage).load(gl.SliceLayout(1, mma))[:, None]
            mbarrier.wait(p_full, it & 1)
            b_y = warpgroup_mma(p_smem, c_smem.index(stage), b_y, is_async=True)
            b_y = warpgroup_mma_wait(0, deps=[b_y])
            mbarrier.arrive(p_free, count=1)
            _load_page(latent_desc, rope_desc, page_id, c_smem, k_smem, bars, stage, l_seq <= end_seq)
            l_seq, l_page, l_limit, page_id = _next_page(
                lengths, table, stride_table, l_seq, l_page, l_limit, end_seq, end_page
            )
            it += 1
        mbarrier.wait(sum_full, seq - begin_seq & 1)
        b_y = b_y * (1 / sum_smem.load(gl.SliceLayout(1, mma)))[:, None]
        mbarrier.arrive(sum_free, count=1)
        o_y = (place * num_rows + o_r)[:, None] * LATENT + o_c[None, :]
        if is_split:
            gl.store(part_out + o_y, b_y, mask=m_r)
        else:
            gl.store(out + o_y, b_y.to(gl.bfloat16), mask=m_r)


@gluon.jit
def _mla_decode_kernel(
    q_c, q_r, latent_desc, rope_desc, table, lengths, parts, splits, out, lse, part_out, part_lse,
    stride_ct, stride_ch, stride_rt, stride_rh, stride_table, H, num_rows, query_len, scale_log2, ROWS: gl.constexpr,
):  # fmt: skip
    """Tiles of 64 query rows: four warps make scores while eight gather the values of the tile before, and load."""
    gdc_wait()
    gdc_launch_dependents()
    kv_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    row_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bar_layout: gl.constexpr = mbarrier.MBarrierLayout()
    c_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, PAGE, LATENT], kv_layout)
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, PAGE, ROPE], kv_layout)
    qc_smem = gl.allocate_shared_memory(gl.bfloat16, [ROWS, LATENT], kv_layout)
    qr_smem = gl.allocate_shared_memory(gl.bfloat16, [ROWS, ROPE], kv_layout)
    p_smem = gl.allocate_shared_memory(gl.bfloat16, [ROWS, PAGE], kv_layout)
    alpha_smem = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], row_layout)
    sum_smem = gl.allocate_shared_memory(gl.float32, [ROWS], row_layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    alpha_full = gl.allocate_shared_memory(gl.int64, [1], bar_layout)
    p_full = gl.allocate_shared_memory(gl.int64, [1], bar_layout)
    p_free = gl.allocate_shared_memory(gl.int64, [1], bar_layout)
    sum_full = gl.allocate_shared_memory(gl.int64, [1], bar_layout)
    sum_free = gl.allocate_shared_memory(gl.int64, [1], bar_layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    mbarrier.init(alpha_full, count=1)
    mbarrier.init(p_full, count=1)
    mbarrier.init(p_free, count=1)
    mbarrier.init(sum_full, count=1)
    mbarrier.init(sum_free, count=1)
    # Asked for first: behind the pages' loads they would wait for all of those.
    _copy_queries(q_c, q_r, stride_ct, stride_ch, stride_rt, stride_rh,
                  gl.load(parts + gl.program_id(0) * 8) * query_len, gl.program_id(1) * ROWS, num_rows, H,
                  qc_smem, qr_smem, ROWS, 4)  # fmt: skip
    gl.warp_specialize(
        [
            (_scores, (q_c, q_r, lengths, parts, splits, lse, part_lse, stride_ct, stride_ch, stride_rt, stride_rh, H,
                       num_rows, query_len, scale_log2, c_smem, k_smem, qc_smem, qr_smem, p_smem, alpha_smem, sum_smem,
                       bars, alpha_full, p_full, p_free, sum_full, sum_free)),
            (_values, (latent_desc, rope_desc, table, lengths, parts, splits, out, part_out, stride_table, num_rows,
                       c_smem, k_smem, p_smem, alpha_smem, sum_smem,
                       bars, alpha_full, p_full, p_free, sum_full, sum_free)),
        ],
        [8],
        [176],
    )  # fmt: skip


def walk(grid, tile, q_latent, q_rope, cache, *arguments) -> None:
    """Launch the kernel for tiles of 16, 32 or 64 query rows."""
    if tile == 64:
        _mla_decode_kernel[grid](q_latent, q_rope, *_descriptors(cache), *arguments, ROWS=tile, num_warps=4)
    else:
        _mla_decode_swapped_kernel[grid](
            q_latent, q_rope, *_descriptors(cache), *arguments, ROWS=tile, num_warps=4, launch_pdl=True
        )


def _descriptors(cache):
    """For bulk copies of a page: the latent and the rotary columns of the cache as [P * 64, 576]."""
    layout = gl.NVMMASharedLayout(128, 16, rank=2)
    rows = cache.view(-1, cache.shape[-1])
    return (
        TensorDescriptor.from_tensor(rows, [PAGE.value, LATENT.value], layout),
        TensorDescriptor.from_tensor(rows, [PAGE.value, ROPE.value], layout),
    )
