"""`ModelConfig` <-> Hugging Face `config.json`, for five model types.

Every key of a file is read, known to be without effect, or required to have the one value that this package
implements; anything else is an error, so a misspelt or unsupported setting never passes silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv2.config.model import (
    MODEL_TYPES,
    GQAConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    YarnConfig,
)
from dsv2.config.schema import read_object, require, unknown_key_error

ROPE_TYPES = ("default", "yarn")

ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}

# Without effect on what the model computes.
_METADATA = frozenset(
    [
        "architectures",
        "auto_map",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "pretraining_tp",
        "_name_or_path",
        "pad_token_id",
        "model_type",
        "ep_size",
        "aux_loss_alpha",
        "seq_aux",
        "output_router_logits",
        "router_aux_loss_coef",
        "max_window_layers",
        "qk_head_dim",
    ]
)

# Settings with one implemented value; None stands for "absent or null".
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "moe_layer_freq": (1,),
    "scoring_func": ("softmax",),
    "use_sliding_window": (False, None),
    "router_jitter_noise": (0, None),
    "partial_rotary_factor": (1, None),
}

_COMMON = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "intermediate_size",
    "sliding_window",
    "layer_types",
]
_DEEPSEEK_MOE = [
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "norm_topk_prob",
]
_KEYS: dict[str, tuple[str, ...]] = {
    "deepseek_v2": (
        *_DEEPSEEK_MOE,
        *["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"],
        *["topk_method", "n_group", "topk_group", "routed_scaling_factor"],
    ),
    "deepseek": tuple(_DEEPSEEK_MOE),
    "llama": (),
    "qwen2": (),
    "mixtral": ("num_local_experts", "num_experts_per_tok"),
}

_INTEGERS = frozenset(
    ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
    + ["max_position_embeddings", "intermediate_size", "bos_token_id", "first_k_dense_replace", "moe_intermediate_size"]
    + ["n_routed_experts", "n_shared_experts", "num_local_experts", "num_experts_per_tok", "n_group", "topk_group"]
    + ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
    + ["original_max_position_embeddings"]
)
_NUMBERS = frozenset(
    ["initializer_range", "rms_norm_eps", "rope_theta", "routed_scaling_factor"]
    + ["factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"]
)
_FLAGS = frozenset(["norm_topk_prob", "tie_word_embeddings"])

# Where a file does not say; the libraries' own defaults.
_DEFAULT_THETA = {"mixtral": 1e6}

_ROPE_KEYS = [
    "type",
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "truncate",
    "partial_rotary_factor",
]


def from_hf(source: Mapping[str, Any] | str | Path) -> ModelConfig:
    """Read a `config.json`: a dictionary, a file, or a directory that holds one.

    Raises ValueError for a missing file, invalid JSON, an unknown `model_type`, router or rope type, an unknown
    or missing key, and a setting that this package does not implement.
    """
    data = source if isinstance(source, Mapping) else _read(Path(source))
    model_type = data.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type={model_type!r} must be one of {', '.join(MODEL_TYPES)}")
    _check_keys(model_type, data)
    return ModelConfig(
        model_type=model_type,
        vocab_size=_get(data, "vocab_size"),
        hidden_size=_get(data, "hidden_size"),
        num_layers=_get(data, "num_hidden_layers"),
        num_heads=_get(data, "num_attention_heads"),
        intermediate_size=_get(data, "intermediate_size"),
        attention=_mla(data) if model_type == "deepseek_v2" else _gqa(model_type, data),
        moe=_moe(model_type, data),
        rope=_rope(model_type, data),
        norm_eps=float(_get(data, "rms_norm_eps")),
        tie_embeddings=bool(data.get("tie_word_embeddings", False)),
        initializer_std=_number(data, "initializer_range", 0.02),
        max_position_embeddings=_get(data, "max_position_embeddings"),
        bos_token_id=data.get("bos_token_id"),
        eos_token_id=_eos(data.get("eos_token_id")),
    )


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The `config.json` dictionary, in the spelling of the official files (`rope_scaling` with `type`)."""
    out: dict[str, Any] = {
        "architectures": [ARCHITECTURES[cfg.model_type]],
        "model_type": cfg.model_type,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "intermediate_size": cfg.intermediate_size,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_position_embeddings,
        "initializer_range": cfg.initializer_std,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "attention_dropout": 0.0,
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": list(cfg.eos_token_id) if isinstance(cfg.eos_token_id, tuple) else cfg.eos_token_id,
        "rope_theta": cfg.rope.theta,
        "rope_scaling": _yarn_to_hf(cfg.rope.yarn),
        "use_cache": True,
    }
    out |= _attention_to_hf(cfg)
    out |= _moe_to_hf(cfg)
    return out


def _read(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    require(file.is_file(), f"no config.json at {file}")
    return read_object(file)


def _check_keys(model_type: str, data: Mapping[str, Any]) -> None:
    known = {*_COMMON, *_KEYS[model_type], *_METADATA, *_FIXED}
    where = f"config.json ({model_type})"
    for key, value in data.items():
        if key == "quantization_config":
            raise ValueError(f"{where}: quantised checkpoints (quantization_config) are not supported")
        if key not in known:
            raise unknown_key_error(key, known, where)
        _check_kind(where, key, value)
        if key in _FIXED and value not in _FIXED[key]:
            raise ValueError(f"{where}: {key}={value!r} is not supported, only {_FIXED[key][0]!r}")
    if any(kind != "full_attention" for kind in data.get("layer_types") or ()):
        raise ValueError(f"{where}: layer_types may only name 'full_attention'")
    if data.get("sliding_window") is not None and data.get("use_sliding_window") is not False:
        raise ValueError(f"{where}: sliding_window={data['sliding_window']!r} is not supported, only null")


def _check_kind(where: str, key: str, value: Any) -> None:
    """JSON kinds; null counts as absent."""
    kinds: tuple[tuple[frozenset[str], tuple[type, ...], str], ...] = (
        (_INTEGERS, (int,), "an integer"),
        (_NUMBERS, (int, float), "a number"),
        (_FLAGS, (bool,), "true or false"),
    )
    for keys, types, expected in kinds:
        if key in keys and value is not None and type(value) not in types:
            raise ValueError(f"{where}: {key}={value!r} must be {expected}")


def _number(data: Mapping[str, Any], key: str, default: float) -> float:
    return float(default if data.get(key) is None else data[key])


def _get(data: Mapping[str, Any], key: str) -> Any:
    if data.get(key) is None:
        raise ValueError(f"config.json: missing key '{key}'")
    return data[key]


def _eos(value: Any) -> int | tuple[int, ...] | None:
    return tuple(value) if isinstance(value, list) else value


def _mla(data: Mapping[str, Any]) -> MLAConfig:
    heads, kv_heads = _get(data, "num_attention_heads"), data.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise ValueError(f"num_key_value_heads={kv_heads} must equal num_attention_heads={heads} with MLA")
    if "q_lora_rank" not in data:
        # NOTE: null means "no query compression" (V2-Lite); libraries default to 1536, so absence is ambiguous.
        raise ValueError("config.json: missing key 'q_lora_rank' (null for uncompressed queries)")
    return MLAConfig(
        q_lora_rank=data["q_lora_rank"],
        kv_lora_rank=_get(data, "kv_lora_rank"),
        qk_nope_head_dim=_get(data, "qk_nope_head_dim"),
        qk_rope_head_dim=_get(data, "qk_rope_head_dim"),
        v_head_dim=_get(data, "v_head_dim"),
    )


def _gqa(model_type: str, data: Mapping[str, Any]) -> GQAConfig:
    heads = _get(data, "num_attention_heads")
    head_dim = data.get("head_dim") or _get(data, "hidden_size") // heads
    kv_heads = data.get("num_key_value_heads") or heads
    return GQAConfig(num_kv_heads=kv_heads, head_dim=head_dim, qkv_bias=model_type == "qwen2")


def _moe(model_type: str, data: Mapping[str, Any]) -> MoEConfig | None:
    if model_type == "mixtral":
        return MoEConfig(
            num_experts=_get(data, "num_local_experts"),
            experts_per_token=_get(data, "num_experts_per_tok"),
            expert_intermediate_size=_get(data, "intermediate_size"),
            norm_topk_prob=True,
        )
    first_dense = data.get("first_k_dense_replace") or 0
    dense_only = data.get("n_routed_experts") is None or first_dense >= _get(data, "num_hidden_layers")
    if model_type not in ("deepseek_v2", "deepseek") or dense_only:
        return None
    return MoEConfig(
        num_experts=data["n_routed_experts"],
        experts_per_token=_get(data, "num_experts_per_tok"),
        expert_intermediate_size=_get(data, "moe_intermediate_size"),
        num_shared_experts=data.get("n_shared_experts") or 0,
        first_dense_layers=first_dense,
        router=data.get("topk_method") or "greedy",
        num_groups=data.get("n_group") or 1,
        groups_per_token=data.get("topk_group") or 1,
        norm_topk_prob=bool(data.get("norm_topk_prob")),
        routed_scaling_factor=_number(data, "routed_scaling_factor", 1.0),
    )


def _rope(model_type: str, data: Mapping[str, Any]) -> RopeConfig:
    spec = _rope_spec(data)
    kind = spec.get("rope_type", spec.get("type"))
    if kind is None and spec.keys() - {"rope_theta"}:
        raise ValueError("config.json rope_scaling: missing key 'type'")
    if kind not in (None, *ROPE_TYPES):
        raise ValueError(f"rope type {kind!r} must be one of {', '.join(ROPE_TYPES)}")
    default_theta = _number(data, "rope_theta", _DEFAULT_THETA.get(model_type, 10000.0))
    layout = "interleaved" if model_type == "deepseek_v2" else "half"
    yarn = _yarn(spec) if kind == "yarn" else None
    return RopeConfig(theta=_number(spec, "rope_theta", default_theta), layout=layout, yarn=yarn)


def _rope_spec(data: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters`, or `rope_scaling` as it is called in older files, its keys checked."""
    spec, where = data.get("rope_parameters") or data.get("rope_scaling") or {}, "config.json rope_scaling"
    if not isinstance(spec, Mapping):
        raise ValueError(f"{where} must be an object or null, got {spec!r}")
    for key, value in spec.items():
        if key not in _ROPE_KEYS:
            raise unknown_key_error(key, _ROPE_KEYS, where)
        _check_kind(where, key, value)
    for key, only in (("truncate", True), ("partial_rotary_factor", 1)):
        if spec.get(key, only) != only:
            raise ValueError(f"{where}: {key}={spec[key]!r} is not supported, only {only!r}")
    return dict(spec)


def _yarn(spec: Mapping[str, Any]) -> YarnConfig:
    for key in ("factor", "original_max_position_embeddings"):
        if spec.get(key) is None:
            raise ValueError(f"config.json rope_scaling: missing key '{key}'")
    optional = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
    return YarnConfig(
        factor=float(spec["factor"]),
        original_max_position_embeddings=spec["original_max_position_embeddings"],
        **{key: float(spec[key]) for key in optional if spec.get(key) is not None},
    )


def _yarn_to_hf(yarn: YarnConfig | None) -> dict[str, Any] | None:
    if yarn is None:
        return None
    out: dict[str, Any] = {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
    for key in ("mscale", "mscale_all_dim", "attention_factor"):
        if getattr(yarn, key) is not None:
            out[key] = getattr(yarn, key)
    return out


def _attention_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    a = cfg.attention
    if isinstance(a, MLAConfig):
        return {
            "num_key_value_heads": cfg.num_heads,
            "q_lora_rank": a.q_lora_rank,
            "kv_lora_rank": a.kv_lora_rank,
            "qk_nope_head_dim": a.qk_nope_head_dim,
            "qk_rope_head_dim": a.qk_rope_head_dim,
            "v_head_dim": a.v_head_dim,
            "attention_bias": False,
        }
    out: dict[str, Any] = {"num_key_value_heads": a.num_kv_heads}
    # Qwen2's own configuration class derives the head width and knows no such key.
    if a.head_dim * cfg.num_heads != cfg.hidden_size or cfg.model_type != "qwen2":
        out["head_dim"] = a.head_dim
    return out


def _moe_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    moe = cfg.moe
    if cfg.model_type == "mixtral" and moe is not None:
        return {"num_local_experts": moe.num_experts, "num_experts_per_tok": moe.experts_per_token}
    if cfg.model_type not in ("deepseek_v2", "deepseek"):
        return {}
    if moe is None:
        # Other programs build expert layers unless every layer is declared dense.
        return {"first_k_dense_replace": cfg.num_layers, "n_routed_experts": 1, "num_experts_per_tok": 1}
    out: dict[str, Any] = {
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.expert_intermediate_size,
        "first_k_dense_replace": moe.first_dense_layers,
        "moe_layer_freq": 1,
        "norm_topk_prob": moe.norm_topk_prob,
        "scoring_func": "softmax",
    }
    if cfg.model_type == "deepseek_v2":
        out |= {
            "topk_method": moe.router,
            "n_group": moe.num_groups,
            "topk_group": moe.groups_per_token,
            "routed_scaling_factor": moe.routed_scaling_factor,
        }
    return out
