"""The names and shapes of layout.py against the published sizes of the checkpoints.

Paper: section 3.1.2 and appendix B. It reads no file and does not test dsv2.
"""

import math
from typing import Any

import numpy as np
import pytest

from tests.paper.layout import random_tensors, tensor_shapes

V2: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 5120,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 12288,
    "first_k_dense_replace": 1,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1536,
}
LITE = {
    **V2,
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "intermediate_size": 10944,
    "n_routed_experts": 64,
    "moe_intermediate_size": 1408,
}
QWEN_72B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "intermediate_size": 24576,
}
LLAMA3_70B = {
    **QWEN_72B,
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
}
MIXTRAL_8X22B = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 6144,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "intermediate_size": 16384,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize(
    ("config", "billions"),
    [(V2, 235.741), (LITE, 15.706), (QWEN_72B, 72.29), (LLAMA3_70B, 70.55), (MIXTRAL_8X22B, 140.62)],
    ids=["v2", "lite", "qwen1.5-72b", "llama3-70b", "mixtral-8x22b"],
)
def test_the_tensors_of_a_checkpoint_add_up_to_its_parameters(config, billions):
    total = sum(math.prod(shape) for shape in tensor_shapes(config).values())
    assert total / 1e9 == pytest.approx(billions, rel=1e-4)


@pytest.mark.parametrize(("config", "num_tensors"), [(V2, 29102), (LITE, 5291)], ids=["v2", "lite"])
def test_a_checkpoint_has_the_official_number_of_tensors(config, num_tensors):
    assert len(tensor_shapes(config)) == num_tensors


@pytest.mark.parametrize(
    ("config", "name", "shape"),
    [
        (V2, "model.layers.59.self_attn.kv_a_proj_with_mqa.weight", (576, 5120)),
        (V2, "model.layers.0.mlp.down_proj.weight", (5120, 12288)),
        (V2, "model.layers.1.mlp.shared_experts.up_proj.weight", (3072, 5120)),
        (LITE, "model.layers.0.self_attn.q_proj.weight", (3072, 2048)),
        (QWEN_72B, "model.layers.79.self_attn.k_proj.bias", (8192,)),
        (MIXTRAL_8X22B, "model.layers.0.block_sparse_moe.gate.weight", (8, 6144)),
        (MIXTRAL_8X22B, "model.layers.0.block_sparse_moe.experts.7.w2.weight", (6144, 16384)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_has_its_published_name_and_shape(config, name, shape):
    assert tensor_shapes(config)[name] == shape


def test_random_tensors_have_gains_near_one_but_not_one():
    small = {**LLAMA3_70B, "vocab_size": 8, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 8}
    tensors = random_tensors(small, seed=0, std=0.3)
    gains = np.concatenate([w for name, w in tensors.items() if name.endswith("norm.weight")])
    assert 0.05 < np.std(gains) < 0.15
    assert abs(np.mean(gains) - 1) < 0.05


def test_random_tensors_have_the_given_std():
    small = {
        **LLAMA3_70B,
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
    }
    tensors = random_tensors(small, seed=0, std=0.3)
    assert np.std(tensors["lm_head.weight"]) == pytest.approx(0.3, rel=0.05)
