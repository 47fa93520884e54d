"""Recipes: what TOML and `--set` say is what the run gets, or an error that names the key."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2.config import ModelConfig
from dsv2.config.run import PretrainConfig, TrainConfig, load_pretrain, parse_override, pretrain_from_dict, to_toml

PLAIN: dict[str, Any] = {
    "model": {"preset": "tiny"},
    "data": {"train": "shards/train", "tokenizer": "tokenizer"},
    "train": {"steps": 10, "batch_sequences": 4, "lr_peak": 1e-3},
}


def changed(key: str, value: Any) -> dict[str, Any]:
    """`PLAIN` with one key of one section replaced."""
    section, name = key.split(".")
    return PLAIN | {section: PLAIN[section] | {name: value}}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(PLAIN), encoding="utf-8")
    return file


# Recipes ----------------------------------------------------------------------------------------------------------


def test_keys_that_a_recipe_leaves_out_are_the_papers(recipe: Path) -> None:
    train = load_pretrain(recipe).train
    assert (train.beta1, train.beta2, train.weight_decay, train.grad_clip) == (0.9, 0.95, 0.1, 1.0)
    assert (train.warmup_steps, train.decay_at, train.decay_factor) == (2000, (0.6, 0.9), 0.316)
    assert train.balance_alphas == (0.003, 0.05, 0.02)
    assert (train.capacity_factor, train.exempt_share) == (1.0, 0.1)


def test_a_preset_is_the_model(recipe: Path) -> None:
    assert load_pretrain(recipe).model == ModelConfig.preset("tiny")


def test_keys_beside_a_preset_are_laid_over_it(recipe: Path) -> None:
    recipe.write_text(to_toml(changed("model.moe", {"num_experts": 16})), encoding="utf-8")
    tiny = ModelConfig.preset("tiny").to_dict()
    assert load_pretrain(recipe).model == ModelConfig.from_dict(tiny | {"moe": tiny["moe"] | {"num_experts": 16}})


def test_a_model_can_be_spelt_out_without_a_preset() -> None:
    model = ModelConfig.preset("v2-lite")
    assert pretrain_from_dict(PLAIN | {"model": model.to_dict()}).model == model


@pytest.mark.parametrize("preset", ["v2", "v2-lite", "llama3-70b", "mixtral-8x22b", "tiny"])
def test_toml_read_back_is_the_recipe(preset: str) -> None:
    cfg = pretrain_from_dict(PLAIN | {"model": {"preset": preset}})
    text = to_toml(cfg.to_dict())
    assert pretrain_from_dict(tomllib.loads(text)) == cfg


TOML_SCALARS = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
TOML_VALUES = TOML_SCALARS | st.lists(st.integers(0, 9)) | st.lists(st.text("a\"\\'", max_size=3))
TOML_TABLES = st.recursive(
    st.dictionaries(st.sampled_from("abc"), TOML_VALUES),
    lambda inner: st.dictionaries(st.sampled_from("abcdef"), TOML_VALUES | inner, max_size=4),
    max_leaves=8,
)


@given(TOML_TABLES)
def test_any_table_survives_toml(table: dict[str, Any]) -> None:
    def without_empty_tables(data: dict[str, Any]) -> dict[str, Any]:
        kept = {k: without_empty_tables(v) if isinstance(v, dict) else v for k, v in data.items()}
        return {k: v for k, v in kept.items() if v != {}}

    assert without_empty_tables(tomllib.loads(to_toml(table))) == without_empty_tables(table)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no recipe at .*absent\.toml"):
        load_pretrain(tmp_path / "absent.toml")


@pytest.mark.parametrize("content", [b"[model\n", b"steps = \xff", b"a = 1\na = 2"])
def test_what_is_not_toml_is_named(recipe: Path, content: bytes) -> None:
    recipe.write_bytes(content)
    with pytest.raises(ValueError, match=r"recipe\.toml is not valid TOML"):
        load_pretrain(recipe)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed("train.lr_peek", 1.0), r"recipe.train: unknown key 'lr_peek' \(did you mean 'lr_peak'\?\)"),
        (changed("model.hiden_size", 8), r"recipe.model: unknown key 'hiden_size' \(did you mean 'hidden_size'\?\)"),
        (changed("model.moe", {"num_expert": 8}), r"recipe.model.moe: unknown key 'num_expert' \(did you mean"),
        (changed("model.preset", "v2-lit"), r"unknown preset 'v2-lit' \(did you mean 'v2-lite'\?\)"),
        (changed("model.preset", 3), "preset.* must be .*, got 3"),
        (changed("model.preset", ["tiny"]), r"preset.* must be .*, got \['tiny'\]"),
        (PLAIN | {"trian": {}}, r"recipe: unknown key 'trian' \(did you mean 'train'\?\)"),
        ({k: v for k, v in PLAIN.items() if k != "data"}, "recipe: missing key 'data'"),
        (PLAIN | {"train": {"steps": 1, "batch_sequences": 4}}, "recipe.train: missing key 'lr_peak'"),
        (PLAIN | {"data": {"train": "x"}}, "recipe.data: missing key 'tokenizer'"),
        (PLAIN | {"model": "tiny"}, "recipe.model must be a table, got 'tiny'"),
        (changed("train.steps", "many"), "recipe.train.steps must be int, got 'many'"),
        (changed("train.steps", 10.0), "recipe.train.steps must be int, got 10.0"),
        (changed("train.lr_peak", "1e-3"), "recipe.train.lr_peak must be float, got '1e-3'"),
        (changed("train.decay_at", 0.6), "recipe.train.decay_at must be a list, got 0.6"),
        (changed("data.train", 3), "recipe.data.train must be str, got 3"),
    ],
)
def test_a_wrong_key_or_type_is_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pretrain_from_dict(data)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(f"train.{k}", 0) for k in ("steps", "batch_sequences", "lr_peak", "grad_clip", "log_every", "eval_every")],
        *[(f"train.{k}", 0) for k in ("eval_tokens", "checkpoint_every", "keep_checkpoints")],
        *[(f"train.{k}", -1) for k in ("warmup_steps", "weight_decay", "expert_balance_alpha", "seed")],
        *[(f"train.{k}", float("nan")) for k in ("lr_peak", "weight_decay", "decay_factor", "beta1", "adam_eps")],
        *[(f"train.{k}", 1.0) for k in ("beta1", "beta2")],
        *[(f"train.{k}_balance_alpha", x) for k in ("device", "communication") for x in (-1.0, float("inf"))],
        ("train.lr_peak", float("inf")),
        *[("train.capacity_factor", x) for x in (0.0, -1.0, float("nan"))],
        *[("train.exempt_share", x) for x in (-0.1, 1.1, float("nan"))],
        ("train.adam_eps", 0.0),
        ("train.decay_factor", -0.316),
        ("train.decay_at", [0.9, 0.6]),
        ("train.decay_at", [0.0, 0.6]),
        ("train.decay_at", [0.6, 1.1]),
        ("train.decay_at", [float("nan")]),
        ("data.sequence_length", 0),
    ],
)
def test_a_value_out_of_range_is_named(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key}=.* must"):
        pretrain_from_dict(changed(key, value))


def test_groups_of_experts_that_the_router_would_not_heed_are_refused() -> None:
    with pytest.raises(ValueError, match="model.moe.num_groups=4 needs model.moe.router='group_limited_greedy'"):
        pretrain_from_dict(changed("model.moe", {"router": "greedy"}))


@pytest.mark.parametrize("micro", [0, -1, 3, 8])
def test_a_micro_batch_must_divide_the_batch(micro: int) -> None:
    with pytest.raises(
        ValueError, match=f"train.batch_sequences=4 must be a multiple of micro_batch_sequences={micro}"
    ):
        TrainConfig(steps=1, batch_sequences=4, lr_peak=1.0, micro_batch_sequences=micro)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tokens": 10}, "train.steps=1 and train.tokens=10: give one of them"),
        ({"steps": None}, "train.steps=None and train.tokens=None: give one of them"),
        ({"steps": None, "tokens": 0}, "train.tokens=0 must be positive"),
        ({"batch_ramp_from": 2}, "train.batch_ramp_from=2 and train.batch_ramp_tokens=None: give both or none"),
        ({"batch_ramp_from": 2, "batch_ramp_tokens": 0}, "train.batch_ramp_tokens=0 must be positive"),
        ({"batch_ramp_from": 2, "batch_ramp_tokens": 9}, "train.batch_ramp_from needs micro_batch_sequences"),
        (
            {"batch_ramp_from": 3, "batch_ramp_tokens": 9, "micro_batch_sequences": 2},
            "train.batch_ramp_from=3 must be a multiple of micro_batch_sequences=2, at most batch_sequences=4",
        ),
        (
            {"batch_ramp_from": 6, "batch_ramp_tokens": 9, "micro_batch_sequences": 2},
            "train.batch_ramp_from=6 must be .* at most batch_sequences=4",
        ),
    ],
)
def test_lengths_and_ramps_that_cannot_be_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**({"steps": 1, "batch_sequences": 4, "lr_peak": 1.0} | keys))


# Overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=3", 3),
        ("a.b=-0.5", -0.5),
        ("a.b=1e-3", 1e-3),
        ("a.b=true", True),
        ("a.b=cuda", "cuda"),
        ('a.b="3"', "3"),
        ("a.b=path/to=it", "path/to=it"),
        ("a.b=", ""),
        ("a.b=[0.8, 0.9]", [0.8, 0.9]),
        (" a.b =7", 7),
        ("a.b={c = 1}", {"c": 1}),
    ],
)
def test_an_override_is_toml_or_else_a_string(text: str, value: Any) -> None:
    assert parse_override(text) == {"a": {"b": value}}


@pytest.mark.parametrize("text", ["train.steps", "=3", " = 3", ""])
def test_an_override_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must read section.key=value"):
        parse_override(text)


def overridden(recipe: Path, *overrides: str) -> PretrainConfig:
    return load_pretrain(recipe, overrides)


def test_an_override_wins_over_the_recipe(recipe: Path) -> None:
    assert overridden(recipe, "train.steps=3", "data.held_out=shards/held_out").train.steps == 3


def test_the_last_override_of_a_key_wins(recipe: Path) -> None:
    assert overridden(recipe, "train.steps=3", "train.steps=4").train.steps == 4


def test_an_override_reaches_into_the_preset(recipe: Path) -> None:
    moe = overridden(recipe, "model.moe.num_experts=16").model.moe
    assert moe is not None
    assert (moe.num_experts, moe.experts_per_token) == (16, 3)


def test_an_override_can_choose_the_preset(recipe: Path) -> None:
    assert overridden(recipe, "model.preset=v2-lite").model == ModelConfig.preset("v2-lite")


def test_an_override_can_give_a_list(recipe: Path) -> None:
    assert overridden(recipe, "train.decay_at=[0.8, 0.9]").train.decay_at == (0.8, 0.9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lr_peek=1", r"recipe\.toml\.train: unknown key 'lr_peek' \(did you mean 'lr_peak'\?\)"),
        ("tran.steps=1", r"recipe\.toml: unknown key 'tran' \(did you mean 'train'\?\)"),
        ("train.steps=ten", r"train\.steps must be int, got 'ten'"),
        ("train=1", r"recipe\.toml\.train must be a table, got 1"),
        ("train.steps.deep=1", r"train\.steps must be int, got {'deep': 1}"),
        ("model.moe.num_experts=9", "moe.num_experts=9 must be divisible by num_groups=4"),
    ],
)
def test_a_wrong_override_is_named(recipe: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overridden(recipe, text)
