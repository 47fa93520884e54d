"""Closed forms: parameters, cache and arithmetic of a `ModelConfig` (DeepSeek-V2 table 1, spec of each layer).

Counted from the formulas alone; a test compares them with the modules themselves on the meta device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dsv2.config.model import GQAConfig, MLAConfig, ModelConfig, MoEConfig


def attention_parameters(cfg: ModelConfig) -> int:
    """Parameters of one attention layer, norms of the latents included."""
    D, H, a = cfg.hidden_size, cfg.num_heads, cfg.attention
    if isinstance(a, GQAConfig):
        qkv = (H + 2 * a.num_kv_heads) * a.head_dim
        return qkv * D + (qkv if a.qkv_bias else 0) + H * a.head_dim * D
    C, R, Q = a.kv_lora_rank, a.qk_rope_head_dim, a.q_lora_rank
    query = D * H * a.qk_head_dim if Q is None else D * Q + Q + Q * H * a.qk_head_dim
    key_value = D * (C + R) + C + C * H * (a.qk_nope_head_dim + a.v_head_dim)
    return query + key_value + H * a.v_head_dim * D


def _swiglu(D: int, F: int) -> int:
    return 3 * D * F


def _moe_layer(cfg: ModelConfig, moe: MoEConfig, experts: int) -> int:
    D = cfg.hidden_size
    gate = moe.num_experts * D
    return gate + _swiglu(D, moe.shared_intermediate_size) + experts * _swiglu(D, moe.expert_intermediate_size)


def _count(cfg: ModelConfig, experts: int, embeddings: int) -> int:
    D = cfg.hidden_size
    total = embeddings * cfg.vocab_size * D + D  # and the final norm
    for layer in range(cfg.num_layers):
        total += attention_parameters(cfg) + 2 * D
        if cfg.moe is not None and cfg.is_moe_layer(layer):
            total += _moe_layer(cfg, cfg.moe, experts)
        else:
            total += _swiglu(D, cfg.intermediate_size)
    return total


def parameters(cfg: ModelConfig) -> int:
    """All parameters."""
    return _count(cfg, cfg.moe.num_experts if cfg.moe else 0, 1 if cfg.tie_embeddings else 2)


def active_parameters(cfg: ModelConfig) -> int:
    """Parameters that a token passes: its experts only, both embeddings."""
    return _count(cfg, cfg.moe.experts_per_token if cfg.moe else 0, 1 if cfg.tie_embeddings else 2)


def active_parameters_without_embedding(cfg: ModelConfig) -> int:
    """As `active_parameters`, without the input embedding, which is a look-up: what arithmetic follows from."""
    return _count(cfg, cfg.moe.experts_per_token if cfg.moe else 0, 1)


def kv_elements_per_token(cfg: ModelConfig) -> int:
    """Cached elements a token in all layers: (C + R) L for MLA, 2 n_kv d_h L otherwise (table 1)."""
    a = cfg.attention
    if isinstance(a, MLAConfig):
        return (a.kv_lora_rank + a.qk_rope_head_dim) * cfg.num_layers
    return 2 * a.num_kv_heads * a.head_dim * cfg.num_layers


def attention_flops_per_token(cfg: ModelConfig, context_length: int) -> int:
    """Forward FLOPs of scores and values for one token, averaged over a causal sequence of that length."""
    a = cfg.attention
    widths = a.qk_head_dim + a.v_head_dim if isinstance(a, MLAConfig) else 2 * a.head_dim
    return cfg.num_layers * cfg.num_heads * widths * context_length  # 2 FLOPs on half of the keys


def flops_per_token(cfg: ModelConfig, context_length: int = 4096) -> int:
    """Training FLOPs a token: 6 per active parameter (input embedding left out) plus causal attention, x3."""
    linear = 6 * active_parameters_without_embedding(cfg)
    return linear + 3 * attention_flops_per_token(cfg, context_length)


def with_heads_cached(cfg: ModelConfig, num_kv_heads: int) -> ModelConfig:
    """The same shape with grouped-query attention instead of MLA, for comparing caches. Its router is a greedy one."""
    a, moe = cfg.attention, cfg.moe
    head_dim = a.v_head_dim if isinstance(a, MLAConfig) else a.head_dim
    attention = GQAConfig(num_kv_heads=num_kv_heads, head_dim=head_dim, qkv_bias=cfg.model_type == "qwen2")
    if cfg.model_type != "deepseek_v2":
        return cfg.replace(attention=attention)
    if moe is not None:
        moe = replace(moe, router="greedy", num_groups=1, groups_per_token=1, routed_scaling_factor=1.0)
    return cfg.replace(model_type="deepseek", attention=attention, moe=moe, rope=replace(cfg.rope, layout="half"))


def describe(cfg: ModelConfig, context_length: int = 4096) -> dict[str, Any]:
    """Everything `dsv2 describe --json` reports, bytes for a 16-bit cache."""
    kv = kv_elements_per_token(cfg)
    return {
        "model_type": cfg.model_type,
        "parameters": parameters(cfg),
        "active_parameters": active_parameters(cfg),
        "active_parameters_without_embedding": active_parameters_without_embedding(cfg),
        "kv_elements_per_token": kv,
        "kv_bytes_per_token": 2 * kv,
        "context_length": context_length,
        "flops_per_token": flops_per_token(cfg, context_length),
        "forward_flops_per_token": flops_per_token(cfg, context_length) // 3,
    }
