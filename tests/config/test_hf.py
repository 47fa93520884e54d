"""`config.json` files of official repositories and of other programs: read exactly, or refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dsv2.config import ModelConfig, YarnConfig
from dsv2.config.hf import from_hf, to_hf

# The keys of the official files, in full.
COMMON: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModel": "modeling_deepseek.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_layer_freq": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V2 = COMMON | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
V2_LITE = COMMON | {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
}
V2_5 = V2 | {"ep_size": 1, "rope_scaling": COMMON["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0}}

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
MIXTRAL = LLAMA | {
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
}
QWEN2 = LLAMA | {"model_type": "qwen2", "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 70}


def preset_with_the_files_initializer(name: str) -> ModelConfig:
    # The paper trains with 0.006; the released files carry the library's default.
    return ModelConfig.preset(name).replace(initializer_std=0.02)


# Reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "name"), [(V2, "v2"), (V2_LITE, "v2-lite")], ids=["v2", "v2-lite"])
def test_the_official_file_is_the_preset(file: dict[str, Any], name: str) -> None:
    assert from_hf(file) == preset_with_the_files_initializer(name)


def test_the_file_of_v2_5_differs_in_the_length_factor_alone() -> None:
    cfg, v2 = from_hf(V2_5), preset_with_the_files_initializer("v2")
    assert v2.rope.yarn is not None
    yarn = dataclasses.replace(v2.rope.yarn, mscale=1.0, mscale_all_dim=1.0)
    assert cfg == v2.replace(rope=dataclasses.replace(v2.rope, yarn=yarn))


@pytest.mark.parametrize("place", ["dictionary", "file", "directory", "string"])
def test_a_dictionary_a_file_and_a_directory_are_read_alike(place: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(V2_LITE), encoding="utf-8")
    source = {"dictionary": V2_LITE, "file": file, "directory": tmp_path, "string": str(tmp_path)}[place]
    assert ModelConfig.from_hf(source) == preset_with_the_files_initializer("v2-lite")


def test_every_key_of_the_official_file_but_metadata_is_written_back() -> None:
    without_effect = {"architectures", "auto_map", "aux_loss_alpha", "pretraining_tp", "seq_aux"}
    without_effect |= {"torch_dtype", "transformers_version"}
    written = to_hf(from_hf(V2))
    assert {k: written.get(k, "absent") for k in V2 if k not in without_effect} == {
        k: v for k, v in V2.items() if k not in without_effect
    }


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": V2["rope_scaling"] | {"rope_type": "yarn"}},
        {"rope_scaling": {("rope_type" if k == "type" else k): v for k, v in V2["rope_scaling"].items()}},
        {"rope_scaling": None, "rope_parameters": V2["rope_scaling"] | {"rope_theta": 10000.0}},
        {
            "rope_scaling": None,
            "rope_theta": None,
            "rope_parameters": V2["rope_scaling"] | {"rope_theta": 10000.0, "rope_type": "yarn"},
        },
    ],
    ids=["type-and-rope_type", "rope_type", "rope_parameters", "theta-in-rope_parameters"],
)
def test_all_spellings_of_rope_scaling_mean_the_same(change: dict[str, Any]) -> None:
    assert from_hf(V2 | change) == from_hf(V2)


def test_theta_inside_rope_parameters_wins() -> None:
    assert from_hf(LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}).rope.theta == 5e5


def test_mscale_is_read_from_the_file_and_absent_by_default() -> None:
    scaling = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    assert from_hf(V2 | {"rope_scaling": scaling}).rope.yarn == YarnConfig(
        factor=40.0, original_max_position_embeddings=4096
    )
    scaling |= {"mscale": 0.5, "mscale_all_dim": 0.25, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5}
    assert from_hf(V2 | {"rope_scaling": scaling}).rope.yarn == YarnConfig(
        factor=40.0,
        original_max_position_embeddings=4096,
        mscale=0.5,
        mscale_all_dim=0.25,
        beta_fast=16.0,
        beta_slow=2.0,
        attention_factor=1.5,
    )


def test_null_and_default_rope_scaling_are_plain_rotary_embedding() -> None:
    for scaling in (None, {"type": "default"}, {"rope_type": "default", "rope_theta": 10000.0}):
        assert from_hf(V2 | {"rope_scaling": scaling}).rope.yarn is None


def test_deepseek_v2_is_interleaved_and_the_others_are_not() -> None:
    assert from_hf(V2).rope.layout == "interleaved"
    assert {from_hf(c).rope.layout for c in (LLAMA, QWEN2, MIXTRAL)} == {"half"}


def test_a_null_query_rank_means_uncompressed_queries() -> None:
    attention = from_hf(V2_LITE).attention
    assert attention.kind == "mla"
    assert attention.q_lora_rank is None


def test_qwen2_has_biases_on_queries_keys_and_values_and_llama_has_none() -> None:
    biases = [a.qkv_bias for c in (QWEN2, LLAMA) if (a := from_hf(c).attention).kind == "gqa"]
    assert biases == [True, False]


def test_head_width_and_kv_heads_follow_from_the_heads_where_absent() -> None:
    attention = from_hf({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}).attention
    assert attention.kind == "gqa"
    assert (attention.num_kv_heads, attention.head_dim) == (4, 16)


def test_mixtral_gates_sum_to_one() -> None:
    moe = from_hf(MIXTRAL).moe
    assert moe is not None
    assert moe.norm_topk_prob


def test_theta_of_a_mixtral_file_without_one_is_a_million() -> None:
    # The library's default for this model; 10,000 for the others.
    assert from_hf({k: v for k, v in MIXTRAL.items() if k != "rope_theta"}).rope.theta == 1e6


def test_several_end_tokens_are_kept() -> None:
    assert from_hf(LLAMA | {"eos_token_id": [2, 3]}).eos_token_ids == (2, 3)


def test_a_file_whose_layers_are_all_dense_has_no_experts() -> None:
    cfg = from_hf(V2_LITE | {"first_k_dense_replace": 27})
    assert cfg.moe is None
    assert from_hf(cfg.to_hf()) == cfg


# Refusing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deepseek_v3"}, "model_type='deepseek_v3' must be one of deepseek_v2, deepseek, llama"),
        ({"model_type": None}, "model_type=None must be one of"),
        ({"topk_method": "noaux_tc"}, "router='noaux_tc' must be one of greedy, group_limited_greedy"),
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid' is not supported, only 'softmax'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ({"attention_bias": True}, "attention_bias=True is not supported, only False"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported, only 1"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8 must equal num_attention_heads=128"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised checkpoints"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear' must be one of default, yarn"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "missing key 'original_max_position_embeddings'"),
        ({"rope_scaling": {"factor": 40, "original_max_position_embeddings": 4096}}, "rope_scaling: missing .*type"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be .*'yarn'"),
        ({"rope_scaling": V2["rope_scaling"] | {"mscale_all": 1}}, r"unknown key 'mscale_all' \(did you mean 'mscale"),
        ({"rope_scaling": V2["rope_scaling"] | {"truncate": False}}, "truncate=False"),
        ({"kv_lora_rnk": 512}, r"unknown key 'kv_lora_rnk' \(did you mean 'kv_lora_rank'\?\)"),
        ({"num_local_experts": 8}, "unknown key 'num_local_experts'"),
        ({"q_lora": 512}, "unknown key 'q_lora'"),
        ({"kv_lora_rank": 0}, "kv_lora_rank=0 must be positive"),
        ({"qk_rope_head_dim": 63}, "rotary width 63 must be even"),
        ({"n_group": 7}, "num_experts=160 must be divisible by num_groups=7"),
        ({"hidden_size": "5120"}, "hidden_size='5120' must be an integer"),
        ({"num_hidden_layers": 60.5}, "num_hidden_layers=60.5 must be an integer"),
        ({"n_routed_experts": True}, "n_routed_experts=True must be an integer"),
        ({"q_lora_rank": "1536"}, "q_lora_rank='1536' must be an integer"),
        ({"n_group": "8"}, "n_group='8' must be an integer"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps='tiny' must be a number"),
        ({"routed_scaling_factor": []}, r"routed_scaling_factor=\[\] must be a number"),
        ({"norm_topk_prob": "no"}, "norm_topk_prob='no' must be true or false"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no' must be true or false"),
    ],
)
def test_what_a_v2_file_may_not_say_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf(V2 | change)


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rms_norm_eps"]
    + ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings"]
    + ["num_experts_per_tok", "moe_intermediate_size"],
)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=f"missing key '{key}'"):
        from_hf({k: v for k, v in V2.items() if k != key})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 4096}, "sliding_window=4096 is not supported, only null"),
        ({"sliding_window": 4096, "use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types may only name 'full_attention'"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"num_key_value_heads": 3}, "num_heads=4 must be divisible by attention.num_kv_heads=3"),
    ],
)
def test_what_a_llama_file_may_not_say_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf(LLAMA | change)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not valid JSON"), ("[1]", "must hold a JSON object, got list"), ("", "not valid")]
)
def test_a_file_that_is_no_json_object_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        from_hf(tmp_path)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no config.json at .*config.json"):
        from_hf(tmp_path)
