"""RMSNorm of the latent, rotation of the key and the write to their page in Triton, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv2.kernels.backend import early_launch, kernel_op
from dsv2.kernels.rms_norm.kernel import blocks, inverse_rms, rows_of
from dsv2.kernels.rope.kernel import rotate_rows


@triton.jit(do_not_specialize=["T", "num_slots", "num_latent_programs"])
def _write_latent_kernel(
    kv, w, cos, sin, cache, slots, q, stride_kv, stride_qt, stride_qh, T, num_slots, num_latent_programs, eps,
    C: tl.constexpr, R: tl.constexpr, H: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    BN: tl.constexpr, INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    i_p = tl.program_id(0)
    if i_p >= num_latent_programs:
        # Queries: rows and heads flattened. [BN, 1]
        o_q = (i_p - num_latent_programs).to(tl.int64) * BN + tl.arange(0, BN)[:, None]
        o_qt = o_q // H
        p_q = q + o_qt * stride_qt + o_q % H * stride_qh
        p_cos, p_sin = cos + o_qt * (R // 2), sin + o_qt * (R // 2)
        rotate_rows(p_q, p_q, p_cos, p_sin, o_qt < T, o_qt < T, BN, R, BR, INTERLEAVED, False)
    else:
        o_n = i_p.to(tl.int64) * BT + tl.arange(0, BT)
        # NOTE: as a vector; a column [BT, 1] would be loaded once for every channel that a thread holds.
        b_slot = tl.load(slots + o_n, mask=o_n < T, other=-1)[:, None]
        o_t = o_n[:, None]
        o_c = tl.arange(0, BC)[None, :]
        m_t, m_c = o_t < T, o_c < C
        # Padding is read like any row, so that no load has to wait for the slots. [BT, 1], [BT, BC] and [1, BC]
        p_kv = kv + o_t * stride_kv
        b_c = tl.load(p_kv + o_c, mask=m_t & m_c, other=0.0).to(tl.float32)
        b_w = tl.load(w + o_c, mask=m_c, other=0.0)
        m_slot = (b_slot >= 0) & (b_slot < num_slots)
        p_cache = cache + b_slot * (C + R)
        rotate_rows(
            p_kv + C, p_cache + C, cos + o_t * (R // 2), sin + o_t * (R // 2),
            m_t, m_slot, BT, R, BR, INTERLEAVED, False,
        )  # fmt: skip
        b_n = (b_c * inverse_rms(b_c, eps, C)).to(cache.dtype.element_ty)
        tl.store(p_cache + o_c, b_n * b_w, mask=m_slot & m_c)


@kernel_op("dsv2::write_latent", mutates_args={"cache", "q_rope"})
def _write_latent(
    kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, layout: str, cache: Tensor, slots: Tensor,
    q_rope: Tensor | None,
) -> None:  # fmt: skip
    rows = rows_of(kv)
    T, C = rows.shape[0], weight.shape[0]
    R = rows.shape[1] - C
    if not T:
        return
    b, BR = blocks(C), triton.next_power_of_2(R)
    H, stride_qt, stride_qh = (1, 0, 0) if q_rope is None else (q_rope.shape[1], *q_rope.stride()[:2])
    # One access of 16 bytes a thread, where the dtype has two bytes.
    BN = max(256 * b["num_warps"] // BR, 1)
    num_latent = triton.cdiv(T, b["BT"])
    num_query = 0 if q_rope is None else triton.cdiv(T * H, BN)
    _write_latent_kernel[(num_latent + num_query,)](
        rows, weight.contiguous(), cos.contiguous(), sin.contiguous(), cache, slots.contiguous(),
        rows if q_rope is None else q_rope,
        rows.stride(0), stride_qt, stride_qh, T, cache.shape[0] * cache.shape[1], num_latent, eps,
        C=C, R=R, H=max(H, 1), BT=b["BT"], BC=b["BD"], BR=BR, BN=BN, INTERLEAVED=layout == "interleaved",
        num_warps=b["num_warps"], **early_launch(kv),
    )  # fmt: skip


@_write_latent.register_fake
def _(kv, weight, eps, cos, sin, layout, cache, slots, q_rope) -> None:
    return None


def write_latent(kv, weight, eps, cos, sin, layout, cache, slots, q_rope=None) -> None:
    # The dispatcher of torch 2.11 drops arguments that have their defaults, and fails to find those it mutates.
    _write_latent(kv, weight, eps, cos, sin, layout, cache, slots, q_rope)
