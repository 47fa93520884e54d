"""RMSNorm of the latent, rotation of the key and the write to their page in Triton, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2.kernels.rms_norm.kernel import blocks, inverse_rms, rows_of
from dsv2.kernels.rope.kernel import rotate_rows


@triton.jit(do_not_specialize=["T", "num_slots"])
def _write_latent_kernel(
    kv, w, cos, sin, cache, slots, stride_kv, T, num_slots, eps,
    C: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
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


@torch.library.custom_op("dsv2::write_latent", mutates_args={"cache"})
def write_latent(
    kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, layout: str, cache: Tensor, slots: Tensor
) -> None:
    rows = rows_of(kv)
    T, C = rows.shape[0], weight.shape[0]
    R = rows.shape[1] - C
    if T:
        b = blocks(C)
        _write_latent_kernel[(triton.cdiv(T, b["BT"]),)](
            rows, weight.contiguous(), cos.contiguous(), sin.contiguous(), cache, slots.contiguous(),
            rows.stride(0), T, cache.shape[0] * cache.shape[1], eps, C=C, R=R,
            BT=b["BT"], BC=b["BD"], BR=triton.next_power_of_2(R), INTERLEAVED=layout == "interleaved",
            num_warps=b["num_warps"],
        )  # fmt: skip


@write_latent.register_fake
def _(
    kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, layout: str, cache: Tensor, slots: Tensor
) -> None:
    return None
