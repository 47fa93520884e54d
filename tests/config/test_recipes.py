"""The recipes of the repository: they load, and V2's and V2-Lite's say what the paper publishes, key by key."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from dsv2.config import ModelConfig, RopeConfig
from dsv2.config.data import load_prepare
from dsv2.config.run import DataConfig, TrainConfig, load_pretrain

RECIPES = Path(__file__).parents[2] / "recipes"

# Sections 2.2.3, 2.2.4 and 3.1.2; what differs in appendix B.
PUBLISHED: dict[str, Any] = {
    "tokens": 8.1e12,
    "batch_sequences": 9216,
    "batch_ramp_from": 2304,
    "batch_ramp_tokens": 225e9,
    "lr_peak": 2.4e-4,
    "warmup_steps": 2000,
    "decay_at": (0.6, 0.9),
    "decay_factor": 0.316,
    "beta1": 0.9,
    "beta2": 0.95,
    "weight_decay": 0.1,
    "grad_clip": 1.0,
    "expert_balance_alpha": 0.003,
    "device_balance_alpha": 0.05,
    "communication_balance_alpha": 0.02,
    "capacity_factor": 1.0,
    "exempt_share": 0.1,
}
PUBLISHED_LITE = PUBLISHED | {
    "tokens": 5.7e12,
    "batch_sequences": 4608,
    "batch_ramp_from": None,
    "batch_ramp_tokens": None,
    "lr_peak": 4.2e-4,
    "decay_at": (0.8, 0.9),
    "expert_balance_alpha": 0.001,
    "device_balance_alpha": 0.0,
    "communication_balance_alpha": 0.0,
    "capacity_factor": math.inf,
    "exempt_share": 0.0,
}
BOTH = pytest.mark.parametrize("name", ["v2", "v2-lite"])


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.toml")), ids=lambda file: file.stem)
def test_every_recipe_loads(file: Path) -> None:
    assert load_prepare(file) if file.stem == "data" else load_pretrain(file)


@pytest.mark.parametrize(("name", "published"), [("v2", PUBLISHED), ("v2-lite", PUBLISHED_LITE)])
def test_training_is_as_published(name: str, published: dict[str, Any]) -> None:
    train = load_pretrain(RECIPES / f"{name}.toml").train
    assert {key: getattr(train, key) for key in published} == published


@BOTH
def test_the_model_is_the_released_one_before_its_context_was_extended(name: str) -> None:
    released = ModelConfig.preset(name).replace(bos_token_id=None, eos_token_id=None)  # the tokenizer's to say
    cfg = load_pretrain(RECIPES / f"{name}.toml")
    assert cfg.model == released.replace(rope=RopeConfig(theta=10000.0), max_position_embeddings=4096)
    assert cfg.model.initializer_std == 0.006
    assert cfg.data.sequence_length == 4096


@BOTH
def test_no_value_is_left_to_a_default(name: str) -> None:
    """A default may change; what was published does not. Absent are only the ramp and the device that runs it."""
    data = tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))
    absent = {"steps", "device"} | ({"batch_ramp_from", "batch_ramp_tokens"} if name == "v2-lite" else set())
    assert set(data["train"]) == set(TrainConfig.__dataclass_fields__) - absent
    assert set(data["data"]) == set(DataConfig.__dataclass_fields__)
