"""Causal attention inside packed documents in plain torch, one document after another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    k_prefix: Tensor | None = None,
    v_prefix: Tensor | None = None,
    cu_seqlens_prefix: Tensor | None = None,
    k_rope: Tensor | None = None,
    k_rope_prefix: Tensor | None = None,
    bounds: Sequence[int] | None = None,
) -> Tensor:
    if k_rope is not None:
        k = with_rope(k, k_rope)
    if k_rope_prefix is not None and k_prefix is not None:
        k_prefix = with_rope(k_prefix, k_rope_prefix)
    documents = pairwise(cu_seqlens.tolist() if bounds is None else bounds)
    prefixes = None if cu_seqlens_prefix is None else list(pairwise(cu_seqlens_prefix.tolist()))
    outputs = [attention(q[:0], k[:0], v[:0], scale)]
    for i, (start, stop) in enumerate(documents):
        k_SHK, v_SHV = k[start:stop], v[start:stop]
        if k_prefix is not None and v_prefix is not None and prefixes is not None:
            cached = slice(*prefixes[i])
            k_SHK, v_SHV = torch.cat((k_prefix[cached], k_SHK)), torch.cat((v_prefix[cached], v_SHV))
        outputs.append(attention(q[start:stop], k_SHK, v_SHV, scale))
    return torch.cat(outputs)


def attention(q_THK: Tensor, k_SHK: Tensor, v_SHV: Tensor, scale: float) -> Tensor:
    """Equation 18, causal: the T rows are the last of S positions. Computed in fp32 at least."""
    (T, H, _), S, dtype = q_THK.shape, len(k_SHK), torch.promote_types(q_THK.dtype, torch.float32)
    k_SHK, v_SHV = (x.to(dtype).repeat_interleave(H // x.shape[1], 1) for x in (k_SHK, v_SHV))
    scores_HTS = torch.einsum("thk,shk->hts", q_THK.to(dtype), k_SHK) * scale
    sees_TS = torch.ones(T, S, dtype=torch.bool, device=q_THK.device).tril(S - T)
    probs_HTS = scores_HTS.masked_fill(~sees_TS, float("-inf")).softmax(-1)
    return torch.einsum("hts,shv->thv", probs_HTS, v_SHV).to(q_THK.dtype)


def with_rope(k_SHN: Tensor, k_rope_SR: Tensor) -> Tensor:
    """Keys of every head (equation 17): their own channels, then those that all share."""
    return torch.cat((k_SHN, k_rope_SR[:, None].expand(-1, k_SHN.shape[1], -1)), -1)
