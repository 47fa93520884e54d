"""Grouped-query attention: what MLA is compared with. MHA has as many KV heads as heads, MQA has one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv2.config import GQAConfig, ModelConfig
from dsv2.kernels.rope import rope
from dsv2.model.attention import attention
from dsv2.model.context import Context


class GQA(nn.Module):
    """Llama's attention, with Qwen's biases on request. Parameter names are the checkpoints'. [T, D] to [T, D]."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        if not isinstance(cfg.attention, GQAConfig):
            raise ValueError(f"GQA needs attention.kind='gqa', got {cfg.attention.kind!r}")
        self.dims = a = cfg.attention
        self.layer, self.num_heads, self.layout = layer, cfg.num_heads, cfg.rope.layout
        self.scale = a.head_dim**-0.5
        D = cfg.hidden_size
        self.q_proj = nn.Linear(D, cfg.num_heads * a.head_dim, bias=a.qkv_bias)
        self.k_proj = nn.Linear(D, a.num_kv_heads * a.head_dim, bias=a.qkv_bias)
        self.v_proj = nn.Linear(D, a.num_kv_heads * a.head_dim, bias=a.qkv_bias)
        self.o_proj = nn.Linear(cfg.num_heads * a.head_dim, D, bias=False)

    def forward(self, h_TD: Tensor, tables: tuple[Tensor, Tensor], context: Context) -> Tensor:
        heads = (-1, self.dims.head_dim)
        q_THK, k_SHK, v_SHV = (p(h_TD).unflatten(-1, heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        q_THK, k_SHK = (rope(x, *tables, self.layout) for x in (q_THK, k_SHK))
        if context.paged is not None:
            context.paged.write(self.layer, torch.cat((k_SHK.flatten(1), v_SHV.flatten(1)), -1))
            k_SHK, v_SHV = (x.unflatten(-1, heads) for x in context.paged.read(self.layer).chunk(2, -1))
        return self.o_proj(attention(q_THK, k_SHK, v_SHV, context, self.scale).flatten(1))
