"""Multi-head Latent Attention (DeepSeek-V2 section 2.1, equations 9 to 19), in two forms over the same weights.

Expanded: keys and values of every head are made from the latent (training, prefill). Absorbed: W_UK moves to the query
and W_UV behind the attention, so that all heads attend to the latent itself (decode); the two are never multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv2.config import MLAConfig, ModelConfig
from dsv2.model.attention import cached_attention, latent_attention, packed_attention
from dsv2.model.context import Context, Segment
from dsv2.model.layers import RMSNorm
from dsv2.model.rope import rotate

# The official code leaves the latents' norms at this default whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


class MLA(nn.Module):
    """Parameter names and shapes are the official checkpoint's. Input and output [T, D]."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        if not isinstance(cfg.attention, MLAConfig):
            raise ValueError(f"MLA needs attention.kind='mla', got {cfg.attention.kind!r}")
        self.dims = a = cfg.attention
        self.layer, self.num_heads, self.rope = layer, cfg.num_heads, cfg.rope
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
        c_kv_TC, k_rope_TR = self._latents(h_TD, tables)
        if context.cache is not None:
            context.cache.write(self.layer, torch.cat((c_kv_TC, k_rope_TR), -1), context.segments)
        if context.absorb:
            out_THV = self._absorbed(q_nope_THN, q_rope_THR, c_kv_TC, k_rope_TR, context)
        else:
            out_THV = self._expanded(q_nope_THN, q_rope_THR, c_kv_TC, k_rope_TR, context)
        return self.o_proj(out_THV.flatten(1))

    def _queries(self, h_TD: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Content queries [T, H, N] and rotated queries [T, H, R]: equations 12 to 15 (37 to 40 with heads)."""
        a = self.dims
        q_T = self.q_proj(h_TD) if a.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(h_TD)))
        q_THK = q_T.unflatten(-1, (self.num_heads, a.qk_head_dim))
        q_nope_THN, q_rope_THR = q_THK.split((a.qk_nope_head_dim, a.qk_rope_head_dim), -1)
        return q_nope_THN, rotate(q_rope_THR, tables, self.rope.layout)

    def _latents(self, h_TD: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What is cached: the normalised latent [T, C], and the rotated key shared by all heads [T, R]."""
        a = self.dims
        c_kv_TC, k_rope_TR = self.kv_a_proj_with_mqa(h_TD).split((a.kv_lora_rank, a.qk_rope_head_dim), -1)
        return self.kv_a_layernorm(c_kv_TC), rotate(k_rope_TR[:, None], tables, self.rope.layout)[:, 0]

    def _keys_values(self, c_kv_SC: Tensor, k_rope_SR: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [S, H, K] and values [S, H, V] of every head from the latents."""
        a, H = self.dims, self.num_heads
        kv_SHx = self.kv_b_proj(c_kv_SC).unflatten(-1, (H, a.qk_nope_head_dim + a.v_head_dim))
        k_nope_SHN, v_SHV = kv_SHx.split((a.qk_nope_head_dim, a.v_head_dim), -1)
        return torch.cat((k_nope_SHN, k_rope_SR[:, None].expand(-1, H, -1)), -1), v_SHV

    def _history(self, context: Context, segment: Segment, c_kv_TC: Tensor, k_rope_TR: Tensor) -> tuple[Tensor, Tensor]:
        """Latents that a segment may look at: from the cache where there is one, else its own rows."""
        if context.cache is None:
            rows = slice(segment.start, segment.stop)
            return c_kv_TC[rows], k_rope_TR[rows]
        a = self.dims
        c_kv_SC, k_rope_SR = context.cache.read(self.layer, segment).split((a.kv_lora_rank, a.qk_rope_head_dim), -1)
        return c_kv_SC, k_rope_SR

    def _expanded(
        self, q_nope_THN: Tensor, q_rope_THR: Tensor, c_kv_TC: Tensor, k_rope_TR: Tensor, context: Context
    ) -> Tensor:
        q_THK = torch.cat((q_nope_THN, q_rope_THR), -1)
        if context.cache is None or not context.segments:
            k_THK, v_THV = self._keys_values(c_kv_TC, k_rope_TR)
            return packed_attention(q_THK, k_THK, v_THV, context.segments, self.scale)

        def keys_values(segment: Segment) -> tuple[Tensor, Tensor]:
            return self._keys_values(*self._history(context, segment, c_kv_TC, k_rope_TR))

        return cached_attention(q_THK, context.segments, keys_values, self.scale)

    def _absorbed(
        self, q_nope_THN: Tensor, q_rope_THR: Tensor, c_kv_TC: Tensor, k_rope_TR: Tensor, context: Context
    ) -> Tensor:
        a, H = self.dims, self.num_heads
        w_HxC = self.kv_b_proj.weight.unflatten(0, (H, a.qk_nope_head_dim + a.v_head_dim))
        w_uk_HNC, w_uv_HVC = w_HxC.split((a.qk_nope_head_dim, a.v_head_dim), 1)
        q_latent_THC = torch.einsum("thn,hnc->thc", q_nope_THN, w_uk_HNC)
        pieces = [
            latent_attention(
                q_latent_THC[s.start : s.stop],
                q_rope_THR[s.start : s.stop],
                *self._history(context, s, c_kv_TC, k_rope_TR),
                self.scale,
            )
            for s in context.segments
        ]
        # The empty piece is for steps without a segment.
        y_THC = torch.cat((q_latent_THC[:0], *pieces))
        return torch.einsum("thc,hvc->thv", y_THC, w_uv_HVC)
