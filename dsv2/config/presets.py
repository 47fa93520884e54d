"""Architectures by name: DeepSeek-V2 (section 3.1.2), V2-Lite (appendix B), the paper's rivals, small ones."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from dsv2.config.model import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig, YarnConfig

_V2_YARN = YarnConfig(factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707)
_HALF = RopeConfig(layout="half")


def _v2() -> ModelConfig:
    return ModelConfig(
        model_type="deepseek_v2",
        vocab_size=102400,
        hidden_size=5120,
        num_layers=60,
        num_heads=128,
        intermediate_size=12288,
        attention=MLAConfig(
            q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        moe=MoEConfig(
            num_experts=160,
            experts_per_token=6,
            expert_intermediate_size=1536,
            num_shared_experts=2,
            first_dense_layers=1,
            router="group_limited_greedy",
            num_groups=8,
            groups_per_token=3,
            routed_scaling_factor=16.0,
        ),
        rope=RopeConfig(yarn=_V2_YARN),
        max_position_embeddings=163840,
        bos_token_id=100000,
        eos_token_id=100001,
    )


def _v2_lite() -> ModelConfig:
    return ModelConfig(
        model_type="deepseek_v2",
        vocab_size=102400,
        hidden_size=2048,
        num_layers=27,
        num_heads=16,
        intermediate_size=10944,
        attention=MLAConfig(
            q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        moe=MoEConfig(
            num_experts=64,
            experts_per_token=6,
            expert_intermediate_size=1408,
            num_shared_experts=2,
            first_dense_layers=1,
        ),
        rope=RopeConfig(yarn=_V2_YARN),
        max_position_embeddings=163840,
        bos_token_id=100000,
        eos_token_id=100001,
    )


def _deepseekmoe_16b() -> ModelConfig:
    return ModelConfig(
        model_type="deepseek",
        vocab_size=102400,
        hidden_size=2048,
        num_layers=28,
        num_heads=16,
        intermediate_size=10944,
        attention=GQAConfig(num_kv_heads=16, head_dim=128),
        moe=MoEConfig(
            num_experts=64,
            experts_per_token=6,
            expert_intermediate_size=1408,
            num_shared_experts=2,
            first_dense_layers=1,
        ),
        rope=_HALF,
        bos_token_id=100000,
        eos_token_id=100001,
    )


def _deepseek_67b() -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        vocab_size=102400,
        hidden_size=8192,
        num_layers=95,
        num_heads=64,
        intermediate_size=22016,
        attention=GQAConfig(num_kv_heads=8, head_dim=128),
        rope=_HALF,
        bos_token_id=100000,
        eos_token_id=100001,
    )


def _qwen15_72b() -> ModelConfig:
    return ModelConfig(
        model_type="qwen2",
        vocab_size=152064,
        hidden_size=8192,
        num_layers=80,
        num_heads=64,
        intermediate_size=24576,
        attention=GQAConfig(num_kv_heads=64, head_dim=128, qkv_bias=True),
        rope=RopeConfig(layout="half", theta=1e6),
        initializer_std=0.02,
        max_position_embeddings=32768,
        bos_token_id=151643,
        eos_token_id=151643,
    )


def _llama3_70b() -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=8192,
        num_layers=80,
        num_heads=64,
        intermediate_size=28672,
        attention=GQAConfig(num_kv_heads=8, head_dim=128),
        rope=RopeConfig(layout="half", theta=5e5),
        norm_eps=1e-5,
        initializer_std=0.02,
        max_position_embeddings=8192,
        bos_token_id=128000,
        eos_token_id=128001,
    )


def _mixtral_8x22b() -> ModelConfig:
    return ModelConfig(
        model_type="mixtral",
        vocab_size=32000,
        hidden_size=6144,
        num_layers=56,
        num_heads=48,
        intermediate_size=16384,
        attention=GQAConfig(num_kv_heads=8, head_dim=128),
        moe=MoEConfig(num_experts=8, experts_per_token=2, expert_intermediate_size=16384, norm_topk_prob=True),
        rope=RopeConfig(layout="half", theta=1e6),
        norm_eps=1e-5,
        initializer_std=0.02,
        max_position_embeddings=65536,
        bos_token_id=1,
        eos_token_id=2,
    )


def _tiny() -> ModelConfig:
    """For tests: every mechanism of V2 (query compression, groups, shared experts, YaRN) at toy widths."""
    return ModelConfig(
        model_type="deepseek_v2",
        vocab_size=512,
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        intermediate_size=128,
        attention=MLAConfig(q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16),
        moe=MoEConfig(
            num_experts=8,
            experts_per_token=3,
            expert_intermediate_size=32,
            num_shared_experts=2,
            first_dense_layers=1,
            router="group_limited_greedy",
            num_groups=4,
            groups_per_token=2,
            routed_scaling_factor=2.0,
        ),
        rope=RopeConfig(
            yarn=YarnConfig(factor=4.0, original_max_position_embeddings=64, mscale=0.707, mscale_all_dim=0.707)
        ),
        initializer_std=0.02,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )


def _demo() -> ModelConfig:
    """What `make demo` trains on two CPU cores: V2-Lite's structure at a width that learns in minutes."""
    return ModelConfig(
        model_type="deepseek_v2",
        vocab_size=4096,
        hidden_size=192,
        num_layers=4,
        num_heads=4,
        intermediate_size=512,
        attention=MLAConfig(q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32),
        moe=MoEConfig(
            num_experts=16,
            experts_per_token=3,
            expert_intermediate_size=96,
            num_shared_experts=1,
            first_dense_layers=1,
        ),
        initializer_std=0.02,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "v2": _v2,
    "v2-lite": _v2_lite,
    "deepseekmoe-16b": _deepseekmoe_16b,
    "deepseek-67b": _deepseek_67b,
    "qwen1.5-72b": _qwen15_72b,
    "llama3-70b": _llama3_70b,
    "mixtral-8x22b": _mixtral_8x22b,
    "tiny": _tiny,
    "demo": _demo,
}


def preset(name: str) -> ModelConfig:
    """The named architecture. Raises ValueError that suggests the nearest name."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise ValueError(f"unknown preset '{name}'{hint}; presets: {', '.join(PRESETS)}")
    return PRESETS[name]()
