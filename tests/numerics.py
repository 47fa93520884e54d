"""How tests compare numbers: one metric, one table of budgets, and models whose weights hide nothing.

A budget never depends on a machine. Loosening one needs a reason in the commit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv2.config import GQAConfig, ModelConfig, MoEConfig, RopeConfig, YarnConfig
from dsv2.model import Transformer

BUDGETS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float8_e4m3fn: 5e-2}
"""Largest relative norm of an error in values, by the dtype they were computed in."""

GRADIENT_BUDGETS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The same for gradients, which add up more roundings."""


def rel_err(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64.

    Infinite where shapes, or the places of NaN and infinities, differ; where all of `expected` is zero, ||actual||.
    """
    if actual.shape != expected.shape:
        return float("inf")
    a, e = actual.detach().cpu().double(), expected.detach().cpu().double()
    odd = ~e.isfinite()
    if not torch.equal(odd, ~a.isfinite()) or not torch.equal(a[odd].nan_to_num(), e[odd].nan_to_num()):
        return float("inf")
    difference, norm = (a - e)[~odd].norm().item(), e[~odd].norm().item()
    return difference / norm if norm else difference


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32, what: str = "value") -> None:
    """Within the budget of `dtype`."""
    error = rel_err(actual, expected)
    assert error <= BUDGETS[dtype], f"{what}: relative error {error:.2e} exceeds {BUDGETS[dtype]:.0e}"


def assert_gradients_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same names, and every tensor within the gradient budget of fp32."""
    assert actual.keys() == expected.keys()
    errors = {name: rel_err(actual[name], expected[name]) for name in expected}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= GRADIENT_BUDGETS[torch.float32], f"gradient of {worst}: relative error {errors[worst]:.2e}"


@torch.no_grad()
def random_model(cfg: ModelConfig, seed: int = 0, std: float = 0.1) -> Transformer:
    """Every weight drawn with `std`, biases and norm gains (around 1) too: neither softmax nor routing is flat."""
    model = Transformer(cfg)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.normal_(1.0 if name.endswith("norm.weight") else 0.0, std, generator=generator)
    return model.eval()


def random_tokens(cfg: ModelConfig, num_tokens: int, seed: int = 0) -> Tensor:
    """Token ids [num_tokens] int64 over the whole vocabulary."""
    return torch.randint(cfg.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(seed))


def gradients(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Gradient of every parameter by name, zero where nothing flowed."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters}


# Small models -----------------------------------------------------------------------------------------------------


def mla_config(*, q_lora_rank: int | None = 32, grouped: bool = True, yarn: bool = True, **changes: Any) -> ModelConfig:
    """The `tiny` preset with its three switches: query compression, group-limited routing, YaRN."""
    cfg = ModelConfig.preset("tiny")
    attention = dataclasses.replace(cfg.attention, q_lora_rank=q_lora_rank)
    assert cfg.moe is not None
    moe = cfg.moe if grouped else dataclasses.replace(cfg.moe, router="greedy", num_groups=1, groups_per_token=1)
    # With eight rotary channels these keep two frequencies, halve the stretch of one and stretch one by 40.
    scaling = YarnConfig(factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707)
    fields = {
        "attention": attention,
        "moe": moe,
        "rope": RopeConfig(yarn=scaling if yarn else None),
        "max_position_embeddings": 163840,
    }
    return cfg.replace(**(fields | changes))


def gqa_config(model_type: str, *, num_kv_heads: int = 2, **changes: Any) -> ModelConfig:
    """A small `llama`, `qwen2`, `mixtral` or `deepseek` (DeepSeekMoE) model."""
    moe = None
    if model_type == "mixtral":
        moe = MoEConfig(num_experts=4, experts_per_token=2, expert_intermediate_size=96, norm_topk_prob=True)
    elif model_type == "deepseek":
        moe = MoEConfig(
            num_experts=8,
            experts_per_token=3,
            expert_intermediate_size=24,
            num_shared_experts=2,
            first_dense_layers=1,
        )
    fields = {
        "model_type": model_type,
        "vocab_size": 128,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 96,
        "attention": GQAConfig(num_kv_heads=num_kv_heads, head_dim=16, qkv_bias=model_type == "qwen2"),
        "moe": moe,
        "rope": RopeConfig(layout="half"),
        "initializer_std": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return ModelConfig(**(fields | changes))


SMALL_MODELS: dict[str, Callable[[], ModelConfig]] = {
    "v2": mla_config,
    "v2-lite": partial(mla_config, q_lora_rank=None, grouped=False),
    "v2-plain-rope": partial(mla_config, yarn=False),
    "llama": partial(gqa_config, "llama"),
    "qwen2": partial(gqa_config, "qwen2"),
    "mixtral": partial(gqa_config, "mixtral"),
    "deepseek": partial(gqa_config, "deepseek"),
}
"""One small model of every kind that the package reads and writes."""
