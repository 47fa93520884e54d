"""Causal softmax attention over packed segments: the arithmetic that MLA and GQA share.

Segments of equal shape are computed together, since packed training windows mostly have one length. Keys and values
of each segment come from the caller; nothing here reads a cache or knows how keys were made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.model.context import Segment


def packed_attention(q_THK: Tensor, k_THK: Tensor, v_THV: Tensor, segments: Sequence[Segment], scale: float) -> Tensor:
    """Attention inside each segment, which holds its whole sequence. Keys may have fewer heads. Returns [T, H, V]."""
    if not segments:
        return q_THK.new_zeros(0, q_THK.shape[1], v_THV.shape[-1])
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for i, s in enumerate(segments):
        groups[s.num_new].append(i)
    outputs: list[Tensor] = [q_THK] * len(segments)
    for members in groups.values():
        spans = [segments[i] for i in members]
        out_BHTV = _sdpa(_stack(q_THK, spans), _stack(k_THK, spans), _stack(v_THV, spans), scale)
        for i, out_HTV in zip(members, out_BHTV.unbind(0), strict=True):
            outputs[i] = out_HTV.transpose(0, 1)
    return torch.cat(outputs)


def cached_attention(
    q_THK: Tensor,
    segments: Sequence[Segment],
    keys_values: Callable[[Segment], tuple[Tensor, Tensor]],
    scale: float,
) -> Tensor:
    """Attention of each segment's rows over its cached history, [S, H', K] and [S, H', V] from `keys_values`."""
    outputs = []
    for s in segments:
        k_SHK, v_SHV = keys_values(s)
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THK[s.start : s.stop], k_SHK, v_SHV))
        outputs.append(_sdpa(q, k, v, scale)[0].transpose(0, 1))
    return torch.cat(outputs)


def latent_attention(q_THC: Tensor, q_THR: Tensor, c_kv_SC: Tensor, k_rope_SR: Tensor, scale: float) -> Tensor:
    """The absorbed form (section 2.1.2): all heads share one key [c_kv, k_rope] and one value c_kv.

    The rows are the last T of the S tokens. Softmax in fp32. Returns y [T, H, C].
    """
    T, S = q_THC.shape[0], c_kv_SC.shape[0]
    scores_HTS = torch.einsum("thc,sc->hts", q_THC, c_kv_SC) + torch.einsum("thr,sr->hts", q_THR, k_rope_SR)
    scores_HTS = scores_HTS.float() * scale
    if T > 1:
        scores_HTS = scores_HTS.masked_fill(~_causal_mask(T, S, q_THC.device), float("-inf"))
    probs_HTS = scores_HTS.softmax(-1).to(c_kv_SC.dtype)
    return torch.einsum("hts,sc->thc", probs_HTS, c_kv_SC)


def _stack(x_THd: Tensor, spans: Sequence[Segment]) -> Tensor:
    """[B, H, n, d] of B segments of n rows each: a view where they lie side by side."""
    first, last, n = spans[0], spans[-1], spans[0].num_new
    if last.stop - first.start == n * len(spans):
        stacked = x_THd[first.start : last.stop].unflatten(0, (len(spans), n))
    else:
        stacked = torch.stack([x_THd[s.start : s.stop] for s in spans])
    return stacked.transpose(1, 2)


def _sdpa(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, scale: float) -> Tensor:
    """Causal attention of the last T of S positions, [B, H, T, V]."""
    T, S, V = q_BHTK.shape[2], k_BHSK.shape[2], v_BHSV.shape[-1]
    if q_BHTK.device.type == "cpu" and q_BHTK.shape[-1] > V:
        # The CPU's flash kernel wants one width; padding values is a third faster than falling off it.
        v_BHSV = F.pad(v_BHSV, (0, q_BHTK.shape[-1] - V))
    gqa = q_BHTK.shape[1] != k_BHSK.shape[1]
    mask = _causal_mask(T, S, q_BHTK.device) if 1 < T < S else None
    out = F.scaled_dot_product_attention(
        q_BHTK, k_BHSK, v_BHSV, attn_mask=mask, is_causal=T == S, scale=scale, enable_gqa=gqa
    )
    return out[..., :V]


def _causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """True where row i (position S - T + i) may see key j."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
