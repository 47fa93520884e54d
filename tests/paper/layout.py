"""The checkpoints that paper.py reads: every name with its shape, and random weights under those names.

Paper: section 3.1.2 for the widths; names are those of the official Hugging Face checkpoints.
It imports nothing of dsv2 and does no arithmetic of the model.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Tensors = Mapping[str, Array]  # float64, by checkpoint name
Config = Mapping[str, Any]  # a HF config.json
Shape = tuple[int, ...]

MIXTRAL_WORDS = {
    ".mlp.": ".block_sparse_moe.",
    ".gate_proj.": ".w1.",
    ".up_proj.": ".w3.",
    ".down_proj.": ".w2.",
}


def random_tensors(config: Config, seed: int, std: float) -> dict[str, Array]:
    """A full set of float64 weights: normal(0, std), and 1 + normal(0, 0.1) for the gains of norms."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        noise = rng.standard_normal(shape)
        tensors[name] = 1.0 + 0.1 * noise if name.endswith("norm.weight") else std * noise
    return tensors


def tensor_shapes(config: Config) -> dict[str, Shape]:
    """Every name of the checkpoint with its shape, matrices as [out, in]."""
    if config["model_type"] == "mixtral":
        return {_mixtral_name(name): shape for name, shape in tensor_shapes(mixtral_config(config)).items()}
    D, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, D), "model.norm.weight": (D,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, D)
    for layer in range(config["num_hidden_layers"]):
        attention = _mla_shapes(config) if "kv_lora_rank" in config else _gqa_shapes(config)
        norms: dict[str, Shape] = {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
        for name, shape in (norms | attention | _ffn_shapes(config, layer)).items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            if config["model_type"] == "qwen2" and name.endswith(("q_proj", "k_proj", "v_proj")):
                shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
    return shapes


def is_moe(config: Config, layer: int) -> bool:
    """Whether a layer has experts: from first_k_dense_replace on, every moe_layer_freq-th."""
    if not config.get("n_routed_experts"):
        return False
    return layer >= config.get("first_k_dense_replace", 0) and layer % config.get("moe_layer_freq", 1) == 0


def mixtral_config(config: Config) -> Config:
    """A Mixtral config in DeepSeek's words: all layers MoE, nothing shared, chosen gates made to sum to 1."""
    top_k = config["num_experts_per_tok"]
    if top_k < 2:
        raise ValueError(f"num_experts_per_tok={top_k}: expected 2 or more in Mixtral")
    words = {
        "n_routed_experts": config["num_local_experts"],
        "moe_intermediate_size": config["intermediate_size"],
    }
    return {**config, **words, "model_type": "deepseek", "norm_topk_prob": True}


def mixtral_tensors(tensors: Tensors) -> dict[str, Array]:
    """Mixtral tensors under DeepSeek's names."""
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in MIXTRAL_WORDS.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def _mixtral_name(name: str) -> str:
    for ours, theirs in MIXTRAL_WORDS.items():
        name = name.replace(ours, theirs)
    return name


def _mla_shapes(config: Config) -> dict[str, Shape]:
    D, H, Q, C = (config[k] for k in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank"))
    N, R, V = (config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    shapes: dict[str, Shape] = {
        "self_attn.kv_a_proj_with_mqa": (C + R, D),
        "self_attn.kv_a_layernorm": (C,),
        "self_attn.kv_b_proj": (H * (N + V), C),
        "self_attn.o_proj": (D, H * V),
    }
    if Q is None:
        return shapes | {"self_attn.q_proj": (H * (N + R), D)}
    query = {"q_a_proj": (Q, D), "q_a_layernorm": (Q,), "q_b_proj": (H * (N + R), Q)}
    return shapes | {f"self_attn.{name}": shape for name, shape in query.items()}


def _gqa_shapes(config: Config) -> dict[str, Shape]:
    D, H, K = (config[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    width = config.get("head_dim") or D // H
    return {
        "self_attn.q_proj": (H * width, D),
        "self_attn.k_proj": (K * width, D),
        "self_attn.v_proj": (K * width, D),
        "self_attn.o_proj": (D, H * width),
    }


def _ffn_shapes(config: Config, layer: int) -> dict[str, Shape]:
    D = config["hidden_size"]
    if not is_moe(config, layer):
        return _swiglu_shapes("mlp", D, config["intermediate_size"])
    E, width = config["n_routed_experts"], config["moe_intermediate_size"]
    shapes: dict[str, Shape] = {"mlp.gate": (E, D)}
    for i in range(E):
        shapes |= _swiglu_shapes(f"mlp.experts.{i}", D, width)
    if config.get("n_shared_experts"):
        shapes |= _swiglu_shapes("mlp.shared_experts", D, width * config["n_shared_experts"])
    return shapes


def _swiglu_shapes(prefix: str, D: int, width: int) -> dict[str, Shape]:
    return {
        f"{prefix}.gate_proj": (width, D),
        f"{prefix}.up_proj": (width, D),
        f"{prefix}.down_proj": (D, width),
    }
