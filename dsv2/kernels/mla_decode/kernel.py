"""mla_decode in Triton: the deal of pages, the walk of one part, the merge of cut sequences.

On Hopper at DeepSeek-V2's widths (512 + 64, bf16) the walk is `hopper.py`'s; this one runs elsewhere, and interpreted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv2.kernels.backend import check_aligned, early_launch, is_hopper, kernel_op, unit_stride
from dsv2.kernels.mla_decode import OVERHEAD_PAGES, PAGE, DecodePlan

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _plan_kernel(lengths, parts, splits, cut, B, P, PAGE: tl.constexpr, OVERHEAD: tl.constexpr, BLOCK: tl.constexpr):
    """One program; the same greedy walk as the reference."""
    total = 0
    longest = 0
    for i in range(0, B, BLOCK):
        o_b = i + tl.arange(0, BLOCK)
        b_pages = (tl.load(lengths + o_b, mask=o_b < B, other=0) + PAGE - 1) // PAGE
        total += tl.sum(tl.where(o_b < B, b_pages + OVERHEAD, 0))
        longest = tl.maximum(longest, tl.max(b_pages))
    payload = (total + P - 1) // P + OVERHEAD
    longest += OVERHEAD
    whole = (B + P - 1) // P * longest
    may_cut = 20 * whole > 21 * payload
    payload = tl.where(may_cut, payload, whole)
    seq = 0
    page = 0
    slot = 0
    num_cut = 0
    pages = (tl.load(lengths, mask=B > 0, other=0) + PAGE - 1) // PAGE
    tl.store(splits, 0)
    for i_p in range(P):
        begin_seq, begin_page, begin_slot = seq, page, slot
        end_seq = -1
        end_page = 0
        room = payload
        while (seq < B) & (room > 0):
            left = pages - page
            if room >= left + OVERHEAD:
                end_seq = seq
                end_page = pages
                if page > 0:
                    slot += 1
                    tl.store(cut + num_cut, seq)
                    num_cut += 1
                seq += 1
                page = 0
                room -= left + OVERHEAD
                tl.store(splits + seq, slot)
                pages = (tl.load(lengths + seq, mask=seq < B, other=0) + PAGE - 1) // PAGE
            else:
                if may_cut & (room > OVERHEAD):
                    end_seq = seq
                    page += room - OVERHEAD
                    end_page = page
                    slot += 1
                room = 0
        is_used = end_seq >= 0
        tl.store(parts + i_p * 8, tl.where(is_used, begin_seq, 0))
        tl.store(parts + i_p * 8 + 1, tl.where(is_used, begin_page, 0))
        tl.store(parts + i_p * 8 + 2, end_seq)
        tl.store(parts + i_p * 8 + 3, end_page)
        tl.store(parts + i_p * 8 + 4, tl.where(is_used, begin_slot, 0))
        for i in range(5, 8):
            tl.store(parts + i_p * 8 + i, 0)
    for i in range(num_cut, P):
        tl.store(cut + i, -1)


@triton.jit
def _mla_decode_kernel(
    q_c, q_r, cache, table, lengths, parts, splits, out, lse, part_out, part_lse,
    stride_ct, stride_ch, stride_rt, stride_rh, stride_table, H, num_rows, query_len, scale_log2,
    C, R, ROWS: tl.constexpr, PAGE: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One part of the plan and one tile of ROWS query rows (row = token * H + head)."""
    i_p = tl.program_id(0)
    o_r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < num_rows
    o_s = tl.arange(0, PAGE)
    o_c = tl.arange(0, BC)
    o_k = tl.arange(0, BR)
    begin_seq = tl.load(parts + i_p * 8)
    begin_page = tl.load(parts + i_p * 8 + 1)
    end_seq = tl.load(parts + i_p * 8 + 2)
    end_page = tl.load(parts + i_p * 8 + 3)
    slot = tl.load(parts + i_p * 8 + 4)
    for seq in range(begin_seq, end_seq + 1):
        i_b = begin_seq.to(tl.int64) + (seq - begin_seq)
        length = tl.load(lengths + seq)
        first = tl.where(seq == begin_seq, begin_page, 0)
        last = tl.where(seq == end_seq, end_page, (length + PAGE - 1) // PAGE)
        o_t = i_b * query_len + o_r // H
        o_h = (o_r % H).to(tl.int64)
        # [ROWS, BC] and [ROWS, BR]
        p_c = q_c + (o_t * stride_ct + o_h * stride_ch)[:, None] + o_c[None, :]
        p_r = q_r + (o_t * stride_rt + o_h * stride_rh)[:, None] + o_k[None, :]
        b_qc = tl.load(p_c, mask=m_r[:, None] & (o_c < C)[None, :], other=0.0)
        b_qr = tl.load(p_r, mask=m_r[:, None] & (o_k < R)[None, :], other=0.0)
        # A query token sees itself and what lies before it.
        b_limit = length - query_len + 1 + o_r // H
        b_m = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        b_l = tl.zeros([ROWS], dtype=tl.float32)
        b_y = tl.zeros([ROWS, BC], dtype=tl.float32)
        for page in range(first, last):
            page_id = tl.load(table + i_b * stride_table + page).to(tl.int64)
            p_row = cache + (page_id * PAGE + o_s)[:, None] * (C + R)
            m_s = (page * PAGE + o_s < length)[:, None]
            # [PAGE, BC]: key and value at once
            b_c = tl.load(p_row + o_c[None, :], mask=m_s & (o_c < C)[None, :], other=0.0)
            b_k = tl.load(p_row + C + o_k[None, :], mask=m_s & (o_k < R)[None, :], other=0.0)
            b_s = tl.dot(b_qc, tl.trans(b_c), input_precision="ieee")
            b_s = tl.dot(b_qr, tl.trans(b_k), b_s, input_precision="ieee")
            b_s = tl.where((page * PAGE + o_s)[None, :] < b_limit[:, None], b_s * scale_log2, float("-inf"))
            b_new = tl.maximum(b_m, tl.max(b_s, 1))
            b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_alpha = tl.exp2(b_m - b_base)
            b_p = tl.exp2(b_s - b_base[:, None])
            b_l = b_l * b_alpha + tl.sum(b_p, 1)
            b_y = tl.dot(b_p.to(b_c.dtype), b_c, b_y * b_alpha[:, None], input_precision="ieee")
            b_m = b_new
        # Rows that see nothing have l = 0, y = 0 and m = -inf.
        b_l = tl.where(b_l > 0, b_l, 1.0)
        b_y = b_y / b_l[:, None]
        b_lse = b_m + tl.log2(b_l)
        first_slot = tl.load(splits + seq)
        m_y = m_r[:, None] & (o_c < C)[None, :]
        if tl.load(splits + seq + 1) > first_slot:
            slot_of = tl.where(seq == begin_seq, slot, first_slot).to(tl.int64)
            place = slot_of * num_rows
            tl.store(part_lse + o_r.to(tl.int64) * (2 * tl.num_programs(0)) + slot_of, b_lse, mask=m_r)
            tl.store(part_out + (place + o_r)[:, None] * C + o_c[None, :], b_y, mask=m_y)
        else:
            place = i_b * num_rows
            tl.store(lse + place + o_r, b_lse * LN2, mask=m_r)
            tl.store(out + (place + o_r)[:, None] * C + o_c[None, :], b_y.to(out.dtype.element_ty), mask=m_y)


@triton.jit
def _combine_kernel(
    part_out, part_lse, splits, cut, out, lse, num_rows, num_slots, C,
    ROWS: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the pieces of one cut sequence, for ROWS rows and BC channels, by their log-sum-exps (base 2)."""
    # The plan was there before the walk began; the walk's results are awaited.
    seq = tl.load(cut + tl.program_id(0)).to(tl.int64)
    first = tl.load(splits + seq, mask=seq >= 0, other=0).to(tl.int64)
    num = tl.load(splits + seq + 1, mask=seq >= 0, other=0) - first
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if seq >= 0:
        o_s = tl.arange(0, BS)
        o_c = tl.program_id(2) * BC + tl.arange(0, BC)
        m_c = (o_c < C)[None, :]
        for row in range(tl.program_id(1) * ROWS, min(tl.program_id(1) * ROWS + ROWS, num_rows)):
            p_lse = part_lse + (first + row * num_slots)
            o_y = (first + o_s) * num_rows + row
            # [BS, BC]: the first pieces are on their way while the weights are computed; few cut sequences have more.
            b_part = tl.load(part_out + o_y[:, None] * C + o_c[None, :], mask=(o_s < num)[:, None] & m_c, other=0.0)
            b_w = tl.load(p_lse + o_s, mask=o_s < num, other=float("-inf"))
            top = tl.max(b_w)
            for i in range(BS, num, BS):
                top = tl.maximum(top, tl.max(tl.load(p_lse + i + o_s, mask=i + o_s < num, other=float("-inf"))))
            base = tl.where(top == float("-inf"), 0.0, top)
            b_w = tl.exp2(b_w - base)
            b_total = b_w
            b_y = tl.sum(b_w[:, None] * b_part, 0)
            for i in range(BS, num, BS):
                m_s = i + o_s < num
                b_w = tl.exp2(tl.load(p_lse + i + o_s, mask=m_s, other=float("-inf")) - base)
                o_y += BS * num_rows
                b_part = tl.load(part_out + o_y[:, None] * C + o_c[None, :], mask=m_s[:, None] & m_c, other=0.0)
                b_y += tl.sum(b_w[:, None] * b_part, 0)
                b_total += b_w
            total = tl.sum(b_total)
            total = tl.where(total > 0, total, 1.0)
            p_out = out + (seq * num_rows + row) * C + o_c
            tl.store(p_out, (b_y / total).to(out.dtype.element_ty), mask=o_c < C)
            if tl.program_id(2) == 0:
                tl.store(lse + seq * num_rows + row, (top + tl.log2(total)) * LN2)


@kernel_op("dsv2::mla_decode_plan")
def _plan(lengths: Tensor, num_parts: int) -> tuple[Tensor, Tensor, Tensor]:
    parts, splits, cut = _empty_plan(lengths, num_parts)
    _plan_kernel[(1,)](
        lengths.contiguous(), parts, splits, cut, len(lengths), num_parts,
        PAGE=PAGE, OVERHEAD=OVERHEAD_PAGES, BLOCK=128, num_warps=1,
    )  # fmt: skip
    return parts, splits, cut


@_plan.register_fake
def _empty_plan(lengths: Tensor, num_parts: int) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((num_parts, 8), (len(lengths) + 1,), (num_parts,))
    parts, splits, cut = (torch.empty(size, dtype=torch.int32, device=lengths.device) for size in sizes)
    return parts, splits, cut


def plan_decode(lengths: Tensor, num_parts: int) -> tuple[Tensor, Tensor, Tensor]:
    return _plan(lengths, num_parts)


@kernel_op("dsv2::mla_decode")
def _decode(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    parts: Tensor,
    splits: Tensor,
    cut: Tensor,
) -> tuple[Tensor, Tensor]:
    check_aligned("cache", cache)
    q_latent, q_rope, page_table = (unit_stride(x) for x in (q_latent, q_rope, page_table))
    lengths = lengths.contiguous()
    (T, H, C), R, B = q_latent.shape, q_rope.shape[-1], len(lengths)
    out, lse = _empty_output(q_latent)
    if T == 0:
        return out, lse
    query_len = T // B
    num_rows, P = query_len * H, len(parts)
    # A cut sequence ends at most one slot after each part's end: no more slots than twice the parts.
    part_out = torch.empty(2 * P, num_rows, C, dtype=torch.float32, device=out.device)
    part_lse = torch.empty(num_rows, 2 * P, dtype=torch.float32, device=out.device)
    strides = q_latent.stride()[:2] + q_rope.stride()[:2]
    # Twice the bytes a number: larger tiles of float32 would not fit shared memory at DeepSeek-V2's widths.
    is_wide = q_latent.dtype == torch.float32
    tile = 16 if is_wide else min(max(triton.next_power_of_2(num_rows), 16), 64)
    grid = (P, triton.cdiv(num_rows, tile))
    tables = (page_table, lengths, parts, splits, out, lse, part_out, part_lse)
    sizes = (*strides, page_table.stride(0), H, num_rows, query_len, scale / LN2.value)
    if _is_for_hopper(q_latent, R):
        from dsv2.kernels.mla_decode import hopper

        hopper.walk(grid, tile, q_latent, q_rope, cache, *tables, *sizes)
    else:
        _mla_decode_kernel[grid](
            q_latent, q_rope, cache, *tables, *sizes, C, R, ROWS=tile, PAGE=PAGE, BC=max(triton.next_power_of_2(C), 16),
            BR=max(triton.next_power_of_2(R), 16), num_warps=8 if is_wide or tile == 64 else 4, num_stages=1,
        )  # fmt: skip
    # Few sequences have many pieces each: more programs a row. Many are mostly not cut: few programs to skip them.
    num_cut = min(B, P)
    rows, BS, BC = (4, 8, 512) if num_cut * num_rows > 1024 else (1, 8, 512) if num_cut > 8 else (1, 128, 64)
    grid = (num_cut, triton.cdiv(num_rows, rows), triton.cdiv(C, BC))
    _combine_kernel[grid](
        part_out, part_lse, splits, cut, out, lse, num_rows, 2 * P, C,
        ROWS=rows, BS=BS, BC=BC, num_warps=4, **early_launch(q_latent),
    )  # fmt: skip
    return out, lse


@_decode.register_fake
def _(q_latent, q_rope, cache, page_table, lengths, scale, parts, splits, cut) -> tuple[Tensor, Tensor]:
    return _empty_output(q_latent)


def _empty_output(q_latent: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q_latent.shape[:2], dtype=torch.float32, device=q_latent.device)
    return torch.empty(q_latent.shape, dtype=q_latent.dtype, device=q_latent.device), lse


def _is_for_hopper(q_latent: Tensor, R: int) -> bool:
    is_official = (q_latent.shape[-1], R, q_latent.dtype) == (512, 64, torch.bfloat16)
    return is_official and is_hopper(q_latent.device)


def mla_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    plan: DecodePlan,
) -> tuple[Tensor, Tensor]:
    return _decode(q_latent, q_rope, cache, page_table, lengths, scale, *plan)
