"""Attention inside packed documents through F.scaled_dot_product_attention, for callers who know where documents end.

Documents of equal length are computed together: packed training windows mostly have one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def mla_prefill(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], scale: float) -> Tensor:
    """Document i is the rows bounds[i]:bounds[i + 1]."""
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for i, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        groups[stop - start].append(i)
    outputs: list[Tensor] = [q] * (len(bounds) - 1)
    for length, members in groups.items():
        starts = [bounds[i] for i in members]
        out_BLHV = causal(_stack(q, starts, length), _stack(k, starts, length), _stack(v, starts, length), scale)
        if len(groups) == 1:
            return out_BLHV.flatten(0, 1)
        for i, out_LHV in zip(members, out_BLHV.unbind(0), strict=True):
            outputs[i] = out_LHV
    return torch.cat(outputs)


def causal(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHV: Tensor, scale: float) -> Tensor:
    """[B, L, H, V], in whose memory heads lie side by side as in q."""
    K, V = q_BLHK.shape[-1], v_BLHV.shape[-1]
    if q_BLHK.device.type == "cpu" and K > V:
        # The CPU's flash kernel wants one width; padding values is a third faster than falling off it.
        v_BLHV = F.pad(v_BLHV, (0, K - V))
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLHK, v_BLHV))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[..., :V].transpose(1, 2)


def _stack(x_THd: Tensor, starts: Sequence[int], length: int) -> Tensor:
    """[B, L, H, d] of B documents of L rows each: a view where they lie side by side."""
    if starts[-1] - starts[0] == length * (len(starts) - 1):
        return x_THd[starts[0] : starts[-1] + length].unflatten(0, (len(starts), length))
    return torch.stack([x_THd[i : i + length] for i in starts])
