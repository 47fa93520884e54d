"""Grouped-query attention: what MLA is compared with. MHA has as many KV heads as heads, MQA has one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv2.config import GQAConfig, ModelConfig
from dsv2.model.attention import cached_attention, packed_attention
from dsv2.model.context import Context, Segment
from dsv2.model.rope import rotate


class GQA(nn.Module):
    """Llama's attention, with Qwen's biases on request. Parameter names are the checkpoints'. [T, D] to [T, D]."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        if not isinstance(cfg.attention, GQAConfig):
            raise ValueError(f"GQA needs attention.kind='gqa', got {cfg.attention.kind!r}")
        self.dims = a = cfg.attention
        self.layer, self.num_heads, self.rope = layer, cfg.num_heads, cfg.rope
        self.scale = a.head_dim**-0.5
        D = cfg.hidden_size
        self.q_proj = nn.Linear(D, cfg.num_heads * a.head_dim, bias=a.qkv_bias)
        self.k_proj = nn.Linear(D, a.num_kv_heads * a.head_dim, bias=a.qkv_bias)
        self.v_proj = nn.Linear(D, a.num_kv_heads * a.head_dim, bias=a.qkv_bias)
        self.o_proj = nn.Linear(cfg.num_heads * a.head_dim, D, bias=False)

    def forward(self, h_TD: Tensor, tables: tuple[Tensor, Tensor], context: Context) -> Tensor:
        heads = (-1, self.dims.head_dim)
        q_THK, k_THK, v_THV = (p(h_TD).unflatten(-1, heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        q_THK, k_THK = (rotate(x, tables, self.rope.layout) for x in (q_THK, k_THK))
        cache = context.cache
        if cache is None or not context.segments:
            out_THV = packed_attention(q_THK, k_THK, v_THV, context.segments, self.scale)
        else:
            cache.write(self.layer, torch.cat((k_THK.flatten(1), v_THV.flatten(1)), -1), context.segments)

            def keys_values(segment: Segment) -> tuple[Tensor, Tensor]:
                k_Sx, v_Sx = cache.read(self.layer, segment).chunk(2, -1)
                return k_Sx.unflatten(-1, heads), v_Sx.unflatten(-1, heads)

            out_THV = cached_attention(q_THK, context.segments, keys_values, self.scale)
        return self.o_proj(out_THV.flatten(1))
