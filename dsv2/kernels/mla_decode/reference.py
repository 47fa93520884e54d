"""Absorbed attention over pages, sequence by sequence, and the deal of pages to programs."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv2.kernels.mla_decode import OVERHEAD_PAGES, PAGE


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
    q_THX = torch.cat((q_latent, q_rope), -1)
    softmax_dtype = torch.promote_types(q_latent.dtype, torch.float32)
    y_THC = torch.zeros_like(q_latent)
    lse_TH = torch.full((T, H), float("-inf"), dtype=softmax_dtype, device=q_latent.device)
    for b, S in enumerate(lengths.tolist()):
        if S == 0 or n == 0:
            continue
        rows, pages = slice(b * n, (b + 1) * n), page_table[b, : -(-S // PAGE)]
        kv_SX = cache.index_select(0, pages).flatten(0, 1)[:S]
        scores_nHS = (q_THX[rows].flatten(0, 1) @ kv_SX.T).to(softmax_dtype).unflatten(0, (n, H)) * scale
        if n > 1:
            sees_nS = torch.ones(n, S, dtype=torch.bool, device=cache.device).tril(S - n)
            scores_nHS = scores_nHS.masked_fill(~sees_nS[:, None], float("-inf"))
        # Tokens before the sequence's first see nothing: their weights are 0, and so is the sum.
        top_nH1 = scores_nHS.amax(-1, keepdim=True).clamp(min=torch.finfo(softmax_dtype).min)
        weights_nHS = (scores_nHS - top_nH1).exp()
        total_nH1 = weights_nHS.sum(-1, keepdim=True)
        y_THC[rows] = (weights_nHS / total_nH1.clamp(min=1)).to(cache.dtype) @ kv_SX[:, :C]
        lse_TH[rows] = (top_nH1 + total_nH1.log()).squeeze(-1)
    return y_THC, lse_TH


def plan_decode(lengths: Tensor, num_parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fill part after part, each up to the same cost in pages; beginning a sequence costs OVERHEAD_PAGES more.

    Where as many of the longest as a part gets on average cost at most a twentieth more, nothing is cut: a part then
    ends before the sequence that does not fit, and has at least that average, so that none is left over.
    """
    pages = [-(-n // PAGE) for n in lengths.tolist()]
    payload = -(-sum(p + OVERHEAD_PAGES for p in pages) // num_parts) + OVERHEAD_PAGES
    longest = max(pages, default=0) + OVERHEAD_PAGES
    whole = -(-len(pages) // num_parts) * longest
    may_cut = 20 * whole > 21 * payload
    payload = payload if may_cut else whole
    parts, splits, cut = [], [0], []
    seq = page = slot = 0
    for _ in range(num_parts):
        part, room = [seq, page, -1, 0, slot, 0, 0, 0], payload
        while seq < len(pages) and room > 0:
            left = pages[seq] - page
            if room >= left + OVERHEAD_PAGES:
                part[2:4] = seq, pages[seq]
                if page > 0:
                    slot += 1
                    cut.append(seq)
                seq, page, room = seq + 1, 0, room - left - OVERHEAD_PAGES
                splits.append(slot)
                continue
            if may_cut and room > OVERHEAD_PAGES:
                page, slot = page + room - OVERHEAD_PAGES, slot + 1
                part[2:4] = seq, page
            room = 0
        parts.append(part if part[2] >= 0 else [0, 0, -1, 0, 0, 0, 0, 0])
    cut += [-1] * (num_parts - len(cut))
    table = (torch.tensor(x, dtype=torch.int32, device=lengths.device) for x in (parts, splits, cut))
    parts_P8, splits_B1, cut_P = table
    return parts_P8, splits_B1, cut_P
