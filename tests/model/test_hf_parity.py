"""The models of transformers 5.17.0 compute the same logits and the same gradient of every parameter.

Weights and gradients travel between the two through checkpoint files, so that names and row orders are compared too.
"""

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RMSNorm

from dsv2 import weights
from dsv2.config import ModelConfig, RopeConfig, YarnConfig
from dsv2.model import Transformer
from dsv2.model.layers import RMSNorm
from tests.numerics import (
    assert_close,
    assert_gradients_close,
    gqa_config,
    gradients,
    mla_config,
    random_model,
    random_tokens,
    rel_err,
)

DOCUMENTS, LENGTH = 2, 37

V2_FAMILY = {
    f"v2-{'compressed' if q else 'plain'}-queries-{'groups' if g else 'greedy'}-{'yarn' if y else 'rope'}": mla_config(
        q_lora_rank=32 if q else None, grouped=g, yarn=y
    )
    for q, g, y in product((True, False), repeat=3)
}
# Here YaRN may stretch frequencies, and must leave the softmax alone.
YARN_HALVES = RopeConfig(
    layout="half", yarn=YarnConfig(factor=4.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=0.7)
)
CONFIGS = V2_FAMILY | {
    "llama": gqa_config("llama"),
    "llama-yarn": gqa_config("llama", rope=YARN_HALVES),
    "llama-tied-one-kv-head": gqa_config("llama", num_kv_heads=1, tie_embeddings=True),
    "qwen2": gqa_config("qwen2"),
    "mixtral": gqa_config("mixtral"),
}


def theirs(model: Transformer, directory: Path) -> Any:
    """The same weights in transformers, which must know every tensor of the file and miss none."""
    weights.save(model, directory)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=model.dtype, output_loading_info=True
    )
    other, report = loaded
    assert not any(report.values()), report
    return other


def their_gradients(model: Any, directory: Path) -> dict[str, Tensor]:
    """Gradients under checkpoint names: written out in place of the weights, in transformers' own layout."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def our_gradients(model: Transformer) -> dict[str, Tensor]:
    found = gradients(model.named_parameters())
    return {name: slot.of(found[slot.parameter]) for name, slot in weights.name_table(model.cfg, model).items()}


def test_the_oracle_is_the_release_with_yarns_softmax_factor() -> None:
    assert transformers.__version__ == "5.17.0"


def test_the_oracle_scales_its_softmax_by_the_square_of_mscale(tmp_path: Path) -> None:
    model = theirs(random_model(mla_config()), tmp_path / "model")
    m = 0.1 * 0.707 * math.log(40) + 1
    assert model.model.layers[0].self_attn.scaling == pytest.approx((16 + 8) ** -0.5 * m * m)
    assert model.model.rotary_emb.attention_scaling == 1.0


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_and_all_gradients_equal_those_of_transformers(cfg: ModelConfig, tmp_path: Path) -> None:
    ours = random_model(cfg)
    oracle = theirs(ours, tmp_path / "weights")
    tokens_T = random_tokens(cfg, DOCUMENTS * LENGTH)
    cotangent = torch.randn(DOCUMENTS * LENGTH, cfg.vocab_size, generator=torch.Generator().manual_seed(1))

    logits = ours(tokens_T, cu_seqlens=[0, LENGTH, 2 * LENGTH])
    logits.backward(cotangent)
    expected = oracle(tokens_T.view(DOCUMENTS, LENGTH)).logits.flatten(0, 1)
    expected.backward(cotangent)

    assert_close(logits, expected, what="logits")
    assert_gradients_close(our_gradients(ours), their_gradients(oracle, tmp_path / "gradients"))


@torch.no_grad()
def test_norms_round_where_transformers_does() -> None:
    # Before the gain, not after it: the order shows in bf16.
    norm = RMSNorm(64, eps=1e-6).bfloat16()
    theirs = DeepseekV2RMSNorm(64, eps=1e-6).bfloat16()
    generator = torch.Generator().manual_seed(0)
    norm.weight.normal_(1.0, 0.3, generator=generator)
    theirs.weight.copy_(norm.weight)
    x_TD = torch.randn(50, 64, generator=generator).bfloat16()
    assert torch.equal(norm(x_TD), theirs(x_TD))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_bf16_loses_no_more_than_it_does_in_transformers(name: str, tmp_path: Path) -> None:
    # Without experts: a choice between two nearly equal ones may fall either way.
    ours = random_model(gqa_config(name)).bfloat16()
    tokens_T = random_tokens(ours.cfg, LENGTH)
    found, expected = ours(tokens_T), theirs(ours, tmp_path / "model")(tokens_T[None]).logits[0]
    exact = ours.float()(tokens_T)
    assert expected.dtype == torch.bfloat16
    assert rel_err(found, exact) < 1.1 * rel_err(expected, exact)


@torch.no_grad()
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (mla_config(), mla_config(yarn=False)),
        (mla_config(), mla_config(grouped=False)),
    ],
    ids=["yarn", "groups"],
)
def test_the_switches_of_the_parity_configurations_are_felt(one: ModelConfig, other: ModelConfig) -> None:
    tokens_T = random_tokens(one, LENGTH)
    assert rel_err(random_model(one)(tokens_T), random_model(other)(tokens_T)) > 0.01
