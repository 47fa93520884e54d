"""The model in fp32 equals the paper's equations in float64: logits, choices, gates, cache entries, balance losses."""

import dataclasses
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv2 import weights
from dsv2.config import ModelConfig, MoEConfig, RopeConfig, YarnConfig
from dsv2.model import Cache, Context, Transformer
from dsv2.model.balance import balance_losses
from dsv2.model.context import Routing
from tests.numerics import assert_close, gqa_config, mla_config, random_model, random_tokens
from tests.paper import paper

NUM_TOKENS = 34


def with_router(**changes: Any) -> ModelConfig:
    cfg = mla_config(grouped=False)
    assert cfg.moe is not None
    return cfg.replace(moe=dataclasses.replace(cfg.moe, **changes))


def with_yarn(**changes: Any) -> ModelConfig:
    yarn = YarnConfig(factor=40.0, original_max_position_embeddings=4096, **changes)
    return mla_config(rope=RopeConfig(theta=1000.0, yarn=yarn))


MLA_MODELS = {
    f"{'compressed' if q else 'plain'}-queries-{'groups' if g else 'greedy'}-{'yarn' if y else 'rope'}": mla_config(
        q_lora_rank=32 if q else None, grouped=g, yarn=y
    )
    for q, g, y in product((True, False), repeat=3)
} | {
    "rotary-ratio-above-one": with_yarn(mscale=1.0, mscale_all_dim=0.5),
    "other-betas": with_yarn(mscale=0.7, mscale_all_dim=0.7, beta_fast=64.0, beta_slow=4.0),
    "switch": with_router(experts_per_token=1),
    "gshard": with_router(experts_per_token=2, norm_topk_prob=True, routed_scaling_factor=1.0),
    "no-shared-experts": with_router(num_shared_experts=0),
    "norm-eps": mla_config(norm_eps=0.1),
    "tied": mla_config(tie_embeddings=True),
}
GQA_MODELS = {
    "llama": gqa_config("llama"),
    "llama-mha": gqa_config("llama", num_kv_heads=4),
    "llama-mqa": gqa_config("llama", num_kv_heads=1),
    "qwen2": gqa_config("qwen2"),
    "mixtral": gqa_config("mixtral"),
    "deepseekmoe": gqa_config("deepseek"),
}
MODELS = MLA_MODELS | GQA_MODELS


@dataclasses.dataclass(frozen=True)
class Step:
    """What our model computed for one document."""

    logits: Tensor
    routings: dict[int, Routing]
    cache: Cache


@torch.no_grad()
def compute(name: str, absorb: bool = False) -> Step:
    cfg = MODELS[name]
    kept = Cache(cfg, num_slots=1, capacity=NUM_TOKENS)
    context = dataclasses.replace(kept.extend([NUM_TOKENS], absorb), routings=[])
    logits = random_model(cfg)(random_tokens(cfg, NUM_TOKENS), context=context)
    moe_layers = [layer for layer in range(cfg.num_layers) if cfg.is_moe_layer(layer)]
    assert context.routings is not None
    return Step(logits, dict(zip(moe_layers, context.routings, strict=True)), kept)


@cache
def by_the_paper(name: str, absorbed: bool = False) -> paper.Result:
    cfg = MODELS[name]
    tensors, tokens = float64_tensors(random_model(cfg)), random_tokens(cfg, NUM_TOKENS).tolist()
    if name in GQA_MODELS:
        return paper.gqa_forward(cfg.to_hf(), tensors, tokens)
    return paper.forward(cfg.to_hf(), tensors, tokens, absorbed)


def float64_tensors(model: Transformer) -> paper.Tensors:
    parameters = dict(model.named_parameters())
    return {
        name: slot.of(parameters[slot.parameter]).detach().double().numpy()
        for name, slot in weights.name_table(model.cfg, model).items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_paper(name: str) -> None:
    assert_close(compute(name).logits, torch.from_numpy(by_the_paper(name).logits), what="logits")


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_logits_without_a_cache_are_those_of_the_paper(name: str) -> None:
    cfg = MODELS[name]
    logits = random_model(cfg)(random_tokens(cfg, NUM_TOKENS))
    assert_close(logits, torch.from_numpy(by_the_paper(name).logits), what="logits")


@pytest.mark.parametrize("name", MLA_MODELS)
def test_absorbed_logits_are_those_of_the_papers_absorbed_form(name: str) -> None:
    expected = by_the_paper(name, absorbed=True).logits
    assert_close(compute(name, absorb=True).logits, torch.from_numpy(expected), what="logits")


@pytest.mark.parametrize("name", [n for n, cfg in MODELS.items() if cfg.moe])
def test_the_chosen_experts_are_those_of_the_paper(name: str) -> None:
    found = {layer: [set(row) for row in r.experts_TA.tolist()] for layer, r in compute(name).routings.items()}
    assert found == {layer: r.chosen for layer, r in by_the_paper(name).routing.items()}


@pytest.mark.parametrize("name", [n for n, cfg in MODELS.items() if cfg.moe])
def test_probabilities_and_gates_are_those_of_the_paper(name: str) -> None:
    moe, expected = MODELS[name].moe, by_the_paper(name).routing
    assert moe is not None
    scaling = 1.0 if moe.norm_topk_prob and moe.experts_per_token > 1 else moe.routed_scaling_factor
    for layer, routing in compute(name).routings.items():
        gates_TE = torch.zeros_like(routing.scores_TE).scatter_(1, routing.experts_TA, routing.gates_TA)
        assert_close(routing.scores_TE, torch.from_numpy(expected[layer].scores), what=f"scores of layer {layer}")
        assert_close(gates_TE / scaling, torch.from_numpy(expected[layer].gates), what=f"gates of layer {layer}")


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_holds_what_the_paper_caches(name: str) -> None:
    kept = compute(name).cache
    for layer, (first, second) in enumerate(by_the_paper(name).cache):
        expected = torch.cat([torch.from_numpy(x).flatten(1) for x in (first, second)], dim=1)
        assert_close(kept.layers[layer][0, :NUM_TOKENS], expected, what=f"cache of layer {layer}")


def losses_of_the_paper(moe: MoEConfig, routing: paper.Routing) -> list[float]:
    """Before their alphas; with one device the last two are 1."""
    found = [paper.expert_balance_loss(routing.scores, routing.chosen, 1.0)]
    G, limit = moe.device_limit
    found.append(paper.device_balance_loss(routing.scores, routing.chosen, G, 1.0))
    return [*found, paper.communication_balance_loss(routing.scores, routing.chosen, G, limit, 1.0)]


@pytest.mark.parametrize("name", [n for n, cfg in MODELS.items() if cfg.moe])
def test_the_balance_losses_are_those_of_the_paper(name: str) -> None:
    moe = MODELS[name].moe
    assert moe is not None
    for layer, routing in compute(name).routings.items():
        expected = losses_of_the_paper(moe, by_the_paper(name).routing[layer])
        assert balance_losses(routing, 1, *moe.device_limit).tolist() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["compressed-queries-groups-yarn", "deepseekmoe"])
def test_the_balance_losses_of_a_batch_are_the_mean_over_its_sequences(name: str) -> None:
    cfg, length = MODELS[name], 17
    assert cfg.moe is not None
    model, tokens_T = random_model(cfg), random_tokens(cfg, 2 * length)
    context = dataclasses.replace(Context.packed([0, length, 2 * length]), routings=[])
    model(tokens_T, context=context)
    assert context.routings is not None
    found = sum(balance_losses(routing, 2, *cfg.moe.device_limit) for routing in context.routings)
    forward, expected = paper.gqa_forward if name in GQA_MODELS else paper.forward, np.zeros(3)
    for document in tokens_T.split(length):
        result = forward(cfg.to_hf(), float64_tensors(model), document.tolist())
        expected += sum(np.array(losses_of_the_paper(cfg.moe, r)) for r in result.routing.values()) / 2
    assert torch.as_tensor(found).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
