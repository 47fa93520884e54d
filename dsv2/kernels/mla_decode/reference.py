"""Absorbed attention over pages, sequence by sequence, and the deal of pages to programs."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv2.kernels.mla_decode import PAGE


def mla_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    plan: object = None,
) -> tuple[Tensor, Tensor]:
    T, H, C = q_latent.shape
    n = T // max(len(lengths), 1)
    y_THC = torch.zeros(T, H, C, dtype=q_latent.dtype, device=q_latent.device)
    softmax_dtype = torch.promote_types(q_latent.dtype, torch.float32)
    lse_TH = torch.full((T, H), float("-inf"), dtype=softmax_dtype, device=q_latent.device)
    for b, S in enumerate(lengths.tolist()):
        pages = page_table[b, : -(-S // PAGE)].long()
        c_kv_SC, k_rope_SR = cache[pages].flatten(0, 1)[:S].split((C, cache.shape[-1] - C), -1)
        for t in range(b * n, (b + 1) * n):
            visible = S - (b + 1) * n + t + 1
            if visible < 1:
                continue
            scores_HS = q_latent[t] @ c_kv_SC[:visible].T + q_rope[t] @ k_rope_SR[:visible].T
            scores_HS = scores_HS.to(softmax_dtype) * scale
            lse_TH[t] = scores_HS.logsumexp(-1)
            y_THC[t] = scores_HS.softmax(-1).to(cache.dtype) @ c_kv_SC[:visible]
    return y_THC, lse_TH


def plan_decode(lengths: Tensor, num_parts: int, overhead_pages: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fill part after part, each up to the same cost in pages; beginning a sequence costs `overhead_pages` more."""
    pages = [-(-n // PAGE) for n in lengths.tolist()]
    payload = -(-sum(p + overhead_pages for p in pages) // num_parts) + overhead_pages
    parts, splits, cut = [], [0], []
    seq = page = slot = 0
    for _ in range(num_parts):
        part, room = [seq, page, -1, 0, slot, 0, 0, 0], payload
        while seq < len(pages) and room > 0:
            left = pages[seq] - page
            if room >= left + overhead_pages:
                part[2:4] = seq, pages[seq]
                if page > 0:
                    slot += 1
                    cut.append(seq)
                seq, page, room = seq + 1, 0, room - left - overhead_pages
                splits.append(slot)
                continue
            if room > overhead_pages:
                page, slot = page + room - overhead_pages, slot + 1
                part[2:4] = seq, page
            room = 0
        parts.append(part if part[2] >= 0 else [0, 0, -1, 0, 0, 0, 0, 0])
    cut += [-1] * (num_parts - len(cut))
    table = (torch.tensor(x, dtype=torch.int32, device=lengths.device) for x in (parts, splits, cut))
    parts_P8, splits_B1, cut_P = table
    return parts_P8, splits_B1, cut_P
