"""Causal attention of a step's rows over keys and values of every head: what MLA's expanded form and GQA share."""

from __future__ import annotations

from torch import Tensor

from dsv2.kernels.mla_prefill import mla_prefill
from dsv2.model.context import Context


def attention(
    q_THK: Tensor, k_SHK: Tensor, v_SHV: Tensor, context: Context, scale: float, k_rope_SR: Tensor | None = None
) -> Tensor:
    """Keys and values, of as many heads or fewer, are those of cached tokens, then those of the step. [T, H, V].

    `k_rope_SR` are the keys' last channels where all heads share them. A step's first rows may attend elsewhere.
    """
    past = len(k_SHK) - len(q_THK)
    rope = {} if k_rope_SR is None else {"k_rope": k_rope_SR[past:]}
    prefix = {}
    if context.paged is not None and past:
        prefix = {"k_prefix": k_SHK[:past], "v_prefix": v_SHV[:past], "cu_seqlens_prefix": context.paged.cu_past}
        if k_rope_SR is not None:
            rope |= {"k_rope_prefix": k_rope_SR[:past]}
    return mla_prefill(
        q_THK, k_SHK[past:], v_SHV[past:], context.cu_seqlens, scale, bounds=context.bounds, **prefix, **rope
    )
