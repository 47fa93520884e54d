"""Multi-head Latent Attention (DeepSeek-V2 section 2.1, equations 9 to 19), in two forms over the same weights.

Expanded: keys and values of every head are made from the latent (training, prefill). Absorbed: W_UK moves to the query
and W_UV behind the attention, so that all heads attend to the latent itself (decode); the two are never multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv2.config import MLAConfig, ModelConfig
from dsv2.kernels.latent_cache import write_latent
from dsv2.kernels.mla_decode import mla_decode
from dsv2.kernels.rope import rope, rope_
from dsv2.model.attention import attention
from dsv2.model.context import Context, Paged
from dsv2.model.layers import RMSNorm, join, linear_pair

# The official code leaves the latents' norms at this default whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6

EXPANSION_ELEMENTS = 2**30
"""Keys and values of a cached history that exist at once, of one layer, unless those of a single head are more."""


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

    def join(self) -> None:
        join(*self._first_projections())

    def _first_projections(self) -> tuple[Tensor, Tensor]:
        """What the input is multiplied by, for queries and for latents."""
        down = self.q_proj if self.dims.q_lora_rank is None else self.q_a_proj
        return down.weight, self.kv_a_proj_with_mqa.weight

    def forward(self, h_TD: Tensor, tables: tuple[Tensor, Tensor], context: Context) -> Tensor:
        q_THK, kv_TX = self._project(h_TD)
        if context.paged is None or torch.is_grad_enabled():
            q_THK = self._rotated(q_THK, tables)
        if context.paged is not None:
            out_THV = self._cached(q_THK, kv_TX, tables, context, context.paged)
        elif context.absorb:
            q_latent_THC, q_rope_THR = self._absorb(q_THK)
            latents = self._latents(kv_TX, tables)
            out_THV = self._project_values(
                packed_latent_attention(q_latent_THC, q_rope_THR, *latents, context.bounds, self.scale)
            )
        else:
            out_THV = self._expanded(q_THK, *self._latents(kv_TX, tables), context)
        return self.o_proj(out_THV.flatten(1))

    def _project(self, h_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [T, H, N + R], not rotated yet, and what latent and shared key are made of [T, C + R].

        Equations 9, 12 to 14 (37 to 39 with heads).
        """
        a = self.dims
        q_T, kv_TX = linear_pair(h_TD, *self._first_projections())
        if a.q_lora_rank is not None:
            q_T = self.q_b_proj(self.q_a_layernorm(q_T))
        return q_T.unflatten(-1, (self.num_heads, a.qk_head_dim)), kv_TX

    def _rotated(self, q_THK: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Queries with their last R channels turned by position: equation 14. In place where gradients allow it."""
        q_nope_THN, q_rope_THR = self._parts(q_THK)
        if torch.is_grad_enabled():
            return torch.cat((q_nope_THN, rope(q_rope_THR, *tables, self.layout)), -1)
        rope_(q_rope_THR, *tables, self.layout)
        return q_THK

    def _parts(self, q_THK: Tensor) -> tuple[Tensor, Tensor]:
        """Content queries [T, H, N] and rotary queries [T, H, R]."""
        q_nope_THN, q_rope_THR = q_THK.split((self.dims.qk_nope_head_dim, self.dims.qk_rope_head_dim), -1)
        return q_nope_THN, q_rope_THR

    def _latents(self, kv_TX: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What is cached: the normalised latent [T, C], and the rotated key shared by all heads [T, R]."""
        c_kv_TC, k_rope_TR = self._latent_parts(kv_TX)
        return self.kv_a_layernorm(c_kv_TC), rope(k_rope_TR[:, None], *tables, self.layout)[:, 0]

    def _latent_parts(self, rows_TX: Tensor) -> tuple[Tensor, Tensor]:
        """Of cached rows, or what they are made of: the latent [T, C] and the shared key [T, R]."""
        c_kv_TC, k_rope_TR = rows_TX.split((self.dims.kv_lora_rank, self.dims.qk_rope_head_dim), -1)
        return c_kv_TC, k_rope_TR

    def _cached(
        self, q_THK: Tensor, kv_TX: Tensor, tables: tuple[Tensor, Tensor], context: Context, paged: Paged
    ) -> Tensor:
        """Writes the step's latents, then attends: the first rows in the absorbed form, the others in the expanded."""
        norm, pages, n = self.kv_a_layernorm, paged.layers[self.layer], paged.num_absorbed
        q_rope = None if torch.is_grad_enabled() else self._parts(q_THK)[1]
        write_latent(kv_TX, norm.weight, norm.eps, *tables, self.layout, pages, paged.slots_T, q_rope)
        parts = []
        if n or not len(kv_TX):
            q_latent_THC, q_rope_THR = self._absorb(q_THK[:n])
            y_THC, _ = mla_decode(
                q_latent_THC, q_rope_THR, pages, paged.page_table, paged.lengths, self.scale, paged.plan
            )
            parts.append(self._project_values(y_THC))
        if n < len(kv_TX):
            c_kv_SC, k_rope_SR = self._latent_parts(paged.read(self.layer))
            parts.append(self._expanded(q_THK[n:], c_kv_SC, k_rope_SR, context))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _expanded(self, q_THK: Tensor, c_kv_SC: Tensor, k_rope_SR: Tensor, context: Context) -> Tensor:
        """Keys and values of so many heads at once that, over a long history, they stay within EXPANSION_ELEMENTS."""
        a, H = self.dims, self.num_heads
        w_HxC = self.kv_b_proj.weight.unflatten(0, (H, a.qk_nope_head_dim + a.v_head_dim))
        num_heads = H
        if context.paged is not None:
            elements_a_head = len(c_kv_SC) * (a.qk_nope_head_dim + a.v_head_dim)
            num_heads = min(max(EXPANSION_ELEMENTS // max(elements_a_head, 1), 1), H)
        outputs = [
            self._expanded_heads(q, w, c_kv_SC, k_rope_SR, context)
            for q, w in zip(q_THK.split(num_heads, 1), w_HxC.split(num_heads), strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _expanded_heads(
        self, q_THK: Tensor, w_HxC: Tensor, c_kv_SC: Tensor, k_rope_SR: Tensor, context: Context
    ) -> Tensor:
        kv_SHx = F.linear(c_kv_SC, w_HxC.flatten(0, 1)).unflatten(-1, tuple(w_HxC.shape[:2]))
        k_nope_SHN, v_SHV = kv_SHx.split((self.dims.qk_nope_head_dim, self.dims.v_head_dim), -1)
        return attention(q_THK, k_nope_SHN, v_SHV, context, self.scale, k_rope_SR)

    def _absorb(self, q_THK: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of the latent [T, H, C], W_UK moved to the other side of the product, and rotated ones [T, H, R]."""
        q_nope_THN, q_rope_THR = self._parts(q_THK)
        return torch.einsum("thn,hnc->thc", q_nope_THN, self._up_projections()[0]), q_rope_THR

    def _project_values(self, y_THC: Tensor) -> Tensor:
        """W_UV, applied to what attention took of the latents. [T, H, V]."""
        w_uv_HVC = self._up_projections()[1]
        if torch.is_grad_enabled():
            return torch.einsum("thc,hvc->thv", y_THC, w_uv_HVC)
        # Written where it belongs: a product by heads gives heads first, and would have to be copied.
        out_THV = y_THC.new_empty(*y_THC.shape[:2], w_uv_HVC.shape[1])
        torch.bmm(y_THC.transpose(0, 1), w_uv_HVC.transpose(1, 2), out=out_THV.transpose(0, 1))
        return out_THV

    def _up_projections(self) -> tuple[Tensor, Tensor]:
        """W_UK [H, N, C] and W_UV [H, V, C]."""
        a = self.dims
        w_HxC = self.kv_b_proj.weight.unflatten(0, (self.num_heads, a.qk_nope_head_dim + a.v_head_dim))
        w_uk_HNC, w_uv_HVC = w_HxC.split((a.qk_nope_head_dim, a.v_head_dim), 1)
        return w_uk_HNC, w_uv_HVC


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
