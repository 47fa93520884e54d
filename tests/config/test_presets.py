"""The presets are the published architectures: their sizes, and that closed forms count what the modules hold."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from dsv2.config import PRESETS, ModelConfig, counts
from dsv2.model import Cache, Transformer

BILLION = 10**9

# DeepSeek-V2 section 3.1.2, appendix B and table 1, from the formulas of its section 2.1.
V2 = {"parameters": 235_741_434_880, "kv_elements_per_token": 34_560}
V2_LITE = {"parameters": 15_706_484_224, "kv_elements_per_token": 15_552}

# Published architectures: total and active parameters in billions, cached elements a token.
PUBLISHED = {
    "v2": (235.741, 21.376, 34_560),
    "v2-lite": (15.706, 2.661, 15_552),
    "deepseek-67b": (67.43, 67.43, 194_560),
    "qwen1.5-72b": (72.29, 72.29, 1_310_720),
    "llama3-70b": (70.55, 70.55, 163_840),
    "mixtral-8x22b": (140.62, 39.15, 114_688),
}


@pytest.fixture(params=PRESETS)
def cfg(request: pytest.FixtureRequest) -> ModelConfig:
    return ModelConfig.preset(request.param)


@pytest.fixture
def meta_model(cfg: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(cfg)


@pytest.mark.parametrize(("name", "expected"), [("v2", V2), ("v2-lite", V2_LITE)])
def test_describe_reports_the_published_sizes_exactly(name: str, expected: dict[str, int]) -> None:
    report = counts.describe(ModelConfig.preset(name))
    assert {key: report[key] for key in expected} == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_within_a_thousandth_of_the_published_ones(name: str) -> None:
    total, active, kv_elements = PUBLISHED[name]
    report = counts.describe(ModelConfig.preset(name))
    assert report["parameters"] == pytest.approx(total * BILLION, rel=1e-3)
    assert report["active_parameters"] == pytest.approx(active * BILLION, rel=1e-3)
    assert report["kv_elements_per_token"] == kv_elements


def test_deepseekmoe_16b_has_16_4b_parameters_of_which_2_8b_are_active() -> None:
    report = counts.describe(ModelConfig.preset("deepseekmoe-16b"))
    assert round(report["parameters"] / BILLION, 1) == 16.4
    assert round(report["active_parameters"] / BILLION, 1) == 2.8


@pytest.mark.parametrize(("name", "billions"), [("v2", 20.852), ("v2-lite", 2.451)])
def test_active_parameters_without_the_input_embedding(name: str, billions: float) -> None:
    count = counts.active_parameters_without_embedding(ModelConfig.preset(name))
    assert count == pytest.approx(billions * BILLION, rel=1e-3)


def test_parameters_equal_a_count_over_the_module(cfg: ModelConfig, meta_model: Transformer) -> None:
    assert counts.parameters(cfg) == sum(p.numel() for p in meta_model.parameters())


def test_active_parameters_equal_a_count_over_the_module(cfg: ModelConfig, meta_model: Transformer) -> None:
    assert counts.active_parameters(cfg) == sum(_passed_by_a_token(cfg, meta_model))


def test_arithmetic_leaves_out_the_input_embedding_alone(cfg: ModelConfig) -> None:
    embedding = 0 if cfg.tie_embeddings else cfg.vocab_size * cfg.hidden_size
    assert counts.active_parameters_without_embedding(cfg) == counts.active_parameters(cfg) - embedding


def test_tied_embeddings_are_counted_once() -> None:
    cfg = ModelConfig.preset("llama3-70b").replace(tie_embeddings=True)
    with torch.device("meta"):
        model = Transformer(cfg)
    assert counts.parameters(cfg) == sum(p.numel() for p in model.parameters())


def test_kv_elements_equal_what_the_cache_holds(cfg: ModelConfig) -> None:
    """A cache holds whole pages: one of 64 tokens here."""
    cache = Cache(cfg, num_slots=1, capacity=64, device="meta")
    assert counts.kv_elements_per_token(cfg) * 64 == sum(t.numel() for t in cache.layers)


def test_cache_bytes_of_v2_in_16_bits_are_twice_its_elements() -> None:
    assert counts.describe(ModelConfig.preset("v2"))["kv_bytes_per_token"] == 69_120


@pytest.mark.parametrize(("name", "elements"), [("v2", 1_966_080), ("v2-lite", 110_592)])
def test_mha_of_the_same_shape_caches_the_published_elements(name: str, elements: int) -> None:
    cfg = ModelConfig.preset(name)
    assert counts.kv_elements_per_token(counts.with_heads_cached(cfg, cfg.num_heads)) == elements


def test_mla_of_v2_caches_as_much_as_gqa_with_two_and_a_quarter_groups() -> None:
    cfg = ModelConfig.preset("v2")
    one_group = counts.kv_elements_per_token(counts.with_heads_cached(cfg, 1))
    assert counts.kv_elements_per_token(cfg) == 2.25 * one_group


def test_training_flops_of_a_dense_model_are_6_per_parameter_plus_causal_attention() -> None:
    cfg, length = ModelConfig.preset("deepseek-67b"), 4096
    matrices_and_gains = counts.parameters(cfg) - cfg.vocab_size * cfg.hidden_size
    # Scores and values: 2 FLOPs each for D channels over half of the keys on average, three times with the backward.
    attention = 3 * cfg.num_layers * 2 * 2 * cfg.hidden_size * length // 2
    assert counts.flops_per_token(cfg, length) == 6 * matrices_and_gains + attention


def test_forward_flops_are_a_third_of_training_flops(cfg: ModelConfig) -> None:
    report = counts.describe(cfg, context_length=1024)
    assert 3 * report["forward_flops_per_token"] == report["flops_per_token"]


def test_presets_survive_our_own_dictionary_form(cfg: ModelConfig) -> None:
    assert ModelConfig.from_dict(cfg.to_dict()) == cfg


def test_presets_survive_config_json(cfg: ModelConfig) -> None:
    assert ModelConfig.from_hf(cfg.to_hf()) == cfg


def test_an_unknown_preset_suggests_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'v2-light' \(did you mean 'v2-lite'\?\)"):
        ModelConfig.preset("v2-light")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0 must be positive"),
        ({"model_type": "gpt2"}, "model_type='gpt2' must be one of deepseek_v2"),
        ({"model_type": "llama"}, "model_type='llama' cannot hold attention.kind='mla'"),
    ],
)
def test_impossible_models_are_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.preset("tiny").replace(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_groups": 3}, "num_experts=8 must be divisible by num_groups=3"),
        ({"groups_per_token": 5}, "groups_per_token=5 must be between 1 and num_groups=4"),
        ({"experts_per_token": 5}, "experts_per_token=5 exceeds the 4 experts of groups_per_token=2 groups"),
        ({"experts_per_token": 9}, "experts_per_token=9 must be between 1 and num_experts=8"),
        ({"router": "sinkhorn"}, "router='sinkhorn' must be one of greedy, group_limited_greedy"),
    ],
)
def test_impossible_routers_are_refused_by_name(changes: dict[str, object], message: str) -> None:
    moe = ModelConfig.preset("tiny").moe
    assert moe is not None
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(moe, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"router": "group_limited_greedy", "num_groups": 8, "groups_per_token": 3},
        {"routed_scaling_factor": 2.5},
    ],
    ids=["groups", "scaling"],
)
def test_routers_that_the_deepseekmoe_layout_cannot_express_are_refused(changes: dict[str, object]) -> None:
    # Its config.json has no such keys, so a saved model would come back as another function.
    cfg = ModelConfig.preset("deepseekmoe-16b")
    assert cfg.moe is not None
    with pytest.raises(ValueError, match="model_type='deepseek'"):
        cfg.replace(moe=dataclasses.replace(cfg.moe, **changes))


@pytest.mark.parametrize("changes", [{"expert_intermediate_size": 8}, {"experts_per_token": 1}], ids=["width", "top-1"])
def test_experts_that_the_mixtral_layout_cannot_express_are_refused(changes: dict[str, object]) -> None:
    # It has one width for everything, and its gates sum to one for a single expert too.
    cfg = ModelConfig.preset("mixtral-8x22b")
    assert cfg.moe is not None
    with pytest.raises(ValueError, match="model_type='mixtral'"):
        cfg.replace(moe=dataclasses.replace(cfg.moe, **changes))


@pytest.mark.parametrize("name", ["v2", "llama3-70b"])
def test_a_rope_layout_that_the_model_type_does_not_have_is_refused(name: str) -> None:
    # config.json does not say how channels pair up: the model type does.
    cfg = ModelConfig.preset(name)
    other = "half" if cfg.rope.layout == "interleaved" else "interleaved"
    with pytest.raises(ValueError, match=f"rope.layout='{other}'"):
        cfg.replace(rope=dataclasses.replace(cfg.rope, layout=other))


def _passed_by_a_token(cfg: ModelConfig, model: Transformer) -> Iterator[float]:
    for name, p in model.named_parameters():
        if ".mlp.experts." in name:
            assert cfg.moe is not None
            yield p.numel() / cfg.moe.num_experts * cfg.moe.experts_per_token
        else:
            yield p.numel()
