"""Multi-head Latent Attention (DeepSeek-V2 section 2.1, equations 9 to 19), in two forms over the same weights.

Expanded: keys and values of every head are made from the latent (training, prefill). Absorbed: W_UK moves to the query
and W_UV behind the attention, so that all heads attend to the latent itself (decode); the two are never multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from dsv2.config import MLAConfig, ModelConfig
from dsv2.kernels.latent_cache import write_latent
from dsv2.kernels.mla_decode import mla_decode
from dsv2.kernels.rope import rope
from dsv2.model.attention import attention
from dsv2.model.context import Context
from dsv2.model.layers import RMSNorm

# The official code leaves the latents' norms at this default whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


class MLA(nn.Module):
    """Parameter names and shapes are the official checkpoint's. Input and output [T, D]."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        if not isinstance(cfg.attention, MLAConfig):
            raise ValueError(f"MLA needs attention.kind='mla', got {cfg.attention.kind!r}")
        self.dims = a = cfg.attention
        self.layer, self.num_heads, self.layout = layer, cfg.num_heads, cfg.rope.layout
        # 1/sqrt(N + R) in both forms, although absorbed keys are C + R wide.
        self.scale = a.qk_head_dim**-0.5 * cfg.rope.softmax_factor
        D, H = cfg.hidden_size, cfg.num_heads
        if a.q_lora_rank is None:
            self.q_proj = nn.Linear(D, H * a.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(D, a.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(a.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(a.q_lora_rank, H * a.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, a.kv_lora_rank + a.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(a.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(a.kv_lora_rank, H * (a.qk_nope_head_dim + a.v_head_dim), bias=False)
        self.o_proj = nn.Linear(H * a.v_head_dim, D, bias=False)

    def forward(self, h_TD: Tensor, tables: tuple[Tensor, Tensor], context: Context) -> Tensor:
        q_nope_THN, q_rope_THR = self._queries(h_TD, tables)
        kv_TX = self.kv_a_proj_with_mqa(h_TD)
        if context.paged is not None:
            norm, pages = self.kv_a_layernorm, context.paged.layers[self.layer]
            write_latent(kv_TX, norm.weight, norm.eps, *tables, self.layout, pages, context.paged.slots_T)
        if not context.absorb:
            out_THV = self._expanded(q_nope_THN, q_rope_THR, kv_TX, tables, context)
        else:
            out_THV = self._absorbed(q_nope_THN, q_rope_THR, kv_TX, tables, context)
        return self.o_proj(out_THV.flatten(1))

    def _queries(self, h_TD: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Content queries [T, H, N] and rotated queries [T, H, R]: equations 12 to 15 (37 to 40 with heads)."""
        a = self.dims
        q_T = self.q_proj(h_TD) if a.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(h_TD)))
        q_THK = q_T.unflatten(-1, (self.num_heads, a.qk_head_dim))
        q_nope_THN, q_rope_THR = q_THK.split((a.qk_nope_head_dim, a.qk_rope_head_dim), -1)
        return q_nope_THN, rope(q_rope_THR, *tables, self.layout)

    def _latents(self, kv_TX: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What is cached: the normalised latent [T, C], and the rotated key shared by all heads [T, R]."""
        c_kv_TC, k_rope_TR = kv_TX.split((self.dims.kv_lora_rank, self.dims.qk_rope_head_dim), -1)
        return self.kv_a_layernorm(c_kv_TC), rope(k_rope_TR[:, None], *tables, self.layout)[:, 0]

    def _expanded(
        self, q_nope_THN: Tensor, q_rope_THR: Tensor, kv_TX: Tensor, tables: tuple[Tensor, Tensor], context: Context
    ) -> Tensor:
        a, H = self.dims, self.num_heads
        if context.paged is None:
            c_kv_SC, k_rope_SR = self._latents(kv_TX, tables)
        else:
            c_kv_SC, k_rope_SR = context.paged.read(self.layer).split((a.kv_lora_rank, a.qk_rope_head_dim), -1)
        kv_SHx = self.kv_b_proj(c_kv_SC).unflatten(-1, (H, a.qk_nope_head_dim + a.v_head_dim))
        k_nope_SHN, v_SHV = kv_SHx.split((a.qk_nope_head_dim, a.v_head_dim), -1)
        q_THK = torch.cat((q_nope_THN, q_rope_THR), -1)
        k_SHK = torch.cat((k_nope_SHN, k_rope_SR[:, None].expand(-1, H, -1)), -1)
        return attention(q_THK, k_SHK, v_SHV, context, self.scale)

    def _absorbed(
        self, q_nope_THN: Tensor, q_rope_THR: Tensor, kv_TX: Tensor, tables: tuple[Tensor, Tensor], context: Context
    ) -> Tensor:
        a, H = self.dims, self.num_heads
        w_HxC = self.kv_b_proj.weight.unflatten(0, (H, a.qk_nope_head_dim + a.v_head_dim))
        w_uk_HNC, w_uv_HVC = w_HxC.split((a.qk_nope_head_dim, a.v_head_dim), 1)
        q_latent_THC = torch.einsum("thn,hnc->thc", q_nope_THN, w_uk_HNC)
        if (paged := context.paged) is None:
            y_THC = packed_latent_attention(
                q_latent_THC, q_rope_THR, *self._latents(kv_TX, tables), context.bounds, self.scale
            )
        else:
            pages = paged.layers[self.layer]
            y_THC, _ = mla_decode(
                q_latent_THC, q_rope_THR, pages, paged.page_table, paged.lengths, self.scale, paged.plan
            )
        return torch.einsum("thc,hvc->thv", y_THC, w_uv_HVC)


def packed_latent_attention(
    q_THC: Tensor, q_THR: Tensor, c_kv_TC: Tensor, k_rope_TR: Tensor, bounds: Sequence[int], scale: float
) -> Tensor:
    """Absorbed attention inside documents, without a cache: all heads share the key [c_kv, k_rope] and the value c_kv.

    Differentiable; what decoding is compared with. Softmax in fp32. Returns y [T, H, C].
    """
    outputs = [q_THC[:0]]
    for start, stop in pairwise(bounds):
        q_tHC, q_tHR, c_kv_tC, k_rope_tR = (x[start:stop] for x in (q_THC, q_THR, c_kv_TC, k_rope_TR))
        scores_HtS = torch.einsum("thc,sc->hts", q_tHC, c_kv_tC) + torch.einsum("thr,sr->hts", q_tHR, k_rope_tR)
        sees_tS = torch.ones(scores_HtS.shape[1:], dtype=torch.bool, device=q_THC.device).tril()
        probs_HtS = (scores_HtS.float() * scale).masked_fill(~sees_tS, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hts,sc->thc", probs_HtS.to(c_kv_TC.dtype), c_kv_tC))
    return torch.cat(outputs)
