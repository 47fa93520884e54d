"""The model on a CUDA device against the same model on the CPU. Run with `make test-gpu` where there is a device."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dsv2.config import ModelConfig
from dsv2.config.run import TrainConfig
from dsv2.data.batches import Batch
from dsv2.engine.generate import generate
from dsv2.model import Cache, Context, Transformer
from dsv2.train.optim import adamw
from dsv2.train.step import train_step
from tests.numerics import random_model, rel_err

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BOUNDS = [0, 33, 40, 104]


def configs() -> dict[str, ModelConfig]:
    """Official head widths (128 + 64, 128) at a toy size, with and without query compression, and GQA."""
    tiny = ModelConfig.preset("tiny")
    wide = dataclasses.replace(
        tiny.attention, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512
    )
    lite = ModelConfig.preset("deepseekmoe-16b")
    assert lite.moe is not None
    gqa = lite.replace(
        vocab_size=512,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        intermediate_size=128,
        attention=dataclasses.replace(lite.attention, num_kv_heads=2, head_dim=16),
        moe=dataclasses.replace(lite.moe, num_experts=8, experts_per_token=2, expert_intermediate_size=32),
    )
    return {"tiny": tiny, "official-widths": tiny.replace(attention=wide), "gqa-moe": gqa}


@pytest.fixture(params=configs().keys())
def pair(request: pytest.FixtureRequest) -> tuple[Transformer, torch.Tensor]:
    model = random_model(configs()[request.param], seed=0, std=0.1)
    return model, torch.randint(0, 512, (BOUNDS[-1],), generator=torch.Generator().manual_seed(1))


def test_fp32_logits_on_the_gpu_equal_those_on_the_cpu(pair):
    model, tokens = pair
    expected = model(tokens, BOUNDS).detach()
    assert rel_err(model.cuda()(tokens.cuda(), BOUNDS).detach().cpu(), expected) < 1e-5


def test_bf16_logits_stay_within_the_bf16_budget_of_fp32(pair):
    model, tokens = pair
    model = model.bfloat16()
    expected = model.float()(tokens, BOUNDS).detach()
    got = model.bfloat16().cuda()(tokens.cuda(), BOUNDS).detach().float().cpu()
    assert rel_err(got, expected) < 5e-2


def test_gradients_on_the_gpu_equal_those_on_the_cpu(pair):
    model, tokens = pair
    model(tokens, BOUNDS).square().mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.cuda()(tokens.cuda(), BOUNDS).square().mean().backward()
    for name, p in model.named_parameters():
        assert rel_err(p.grad.cpu(), expected[name]) < 1e-4, name


def test_absorbed_equals_expanded_on_the_gpu(pair):
    model, tokens = pair
    if model.cfg.attention.kind != "mla":
        pytest.skip("only MLA has an absorbed form")
    model, tokens = model.cuda(), tokens.cuda()
    expanded = model(tokens, BOUNDS).detach()
    absorbed = model(tokens, context=Context.packed(BOUNDS, "cuda", absorb=True)).detach()
    assert rel_err(absorbed.cpu(), expanded.cpu()) < 1e-5


def test_cached_equals_full_on_the_gpu(pair):
    model, tokens = pair
    model, tokens = model.cuda(), tokens.cuda()
    full = model(tokens[:33]).detach()
    cache = Cache(model.cfg, num_slots=1, capacity=40, device="cuda")
    steps = [model(tokens[:30], context=cache.extend([30])).detach()]
    mla = model.cfg.attention.kind == "mla"
    steps += [model(tokens[i : i + 1], context=cache.extend([1], absorb=mla)).detach() for i in range(30, 33)]
    assert rel_err(torch.cat(steps).cpu(), full.cpu()) < 1e-5


def test_greedy_generation_on_the_gpu_equals_that_on_the_cpu(pair):
    model, tokens = pair
    prompts = [tokens[:5].tolist(), tokens[5:25].tolist()]
    expected = generate(model, prompts, max_new_tokens=8, stop_ids=[])
    assert generate(model.cuda(), prompts, max_new_tokens=8, stop_ids=[]) == expected


def test_training_steps_on_the_gpu_follow_those_on_the_cpu(pair):
    model, tokens = pair
    ids = tokens[:96].numpy()
    batch = Batch(tokens=ids, targets=ids, cu_seqlens=torch.tensor([0, 48, 96]).numpy(), sequence_ids=ids[:2])
    train = TrainConfig(steps=3, batch_sequences=2, lr_peak=1e-3, warmup_steps=0)
    losses = {}
    for device in ("cpu", "cuda"):
        copy = Transformer(model.cfg)
        copy.load_state_dict(model.state_dict())
        copy.to(device)
        optimizer = adamw(copy, train)
        losses[device] = [float(train_step(copy, optimizer, [batch], train, 1e-3).loss) for _ in range(3)]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-4)
