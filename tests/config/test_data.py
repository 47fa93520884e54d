"""Recipes of `dsv2 data prepare`: what cannot work is refused by name, before a file is opened."""

from pathlib import Path
from typing import Any

import pytest

from dsv2.config import schema
from dsv2.config.data import PrepareConfig, load_prepare

ROOT = Path(__file__).parents[2]
PLAIN: dict[str, Any] = {"tokenizer": "tokenizer", "sources": [{"name": "web", "paths": ["web"]}]}


def config(**changes: Any) -> PrepareConfig:
    return schema.from_dict(PrepareConfig, PLAIN | changes)


def test_a_recipe_comes_back_as_it_was_written() -> None:
    cfg = config(mixture={"by": "source", "weights": {"web": 2}})
    assert schema.from_dict(PrepareConfig, cfg.to_dict()) == cfg


def test_the_recipe_of_the_repository_weighs_chinese_12_percent_above_english() -> None:
    weights = load_prepare(ROOT / "recipes" / "data.toml").mixture.weights
    assert weights["chinese"] == pytest.approx(1.12 * weights["english"])


def test_overrides_reach_nested_tables(tmp_path: Path) -> None:
    recipe = tmp_path / "data.toml"
    recipe.write_text('tokenizer = "t"\n[[sources]]\nname = "web"\ncorpus = "code"\n', encoding="utf-8")
    cfg = load_prepare(recipe, ["filters.min_words=7", "dedup.method=exact"])
    assert (cfg.filters.min_words, cfg.dedup.method) == (7, "exact")


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no source": ({"sources": []}, "sources must name at least one"),
    "two places": (
        {"sources": [{"name": "web", "paths": ["a"], "corpus": "code"}]},
        "sources.web must have one of paths, dataset and corpus; got paths, corpus",
    ),
    "no place": ({"sources": [{"name": "web"}]}, "got none"),
    "same name": ({"sources": [{"name": "a", "corpus": "code"}] * 2}, "expected distinct ones"),
    "name as path": ({"sources": [{"name": "../web", "corpus": "code"}]}, "sources.name='../web'"),
    "rate": ({"sources": [{"name": "web", "corpus": "code", "fim_rate": 1.5}]}, "sources.web.fim_rate=1.5"),
    "unknown weight": (
        {"mixture": {"by": "source", "weights": {"wab": 1.0}}},
        "mixture.weights: unknown key 'wab' (did you mean 'web'?)",
    ),
    "weight of nothing": ({"mixture": {"by": "source", "weights": {"web": 0.0}}}, "mixture.weights.web=0.0"),
    "weight as text": ({"mixture": {"by": "source", "weights": {"web": "1"}}}, "mixture.weights.web must be float"),
    "weights without by": ({"mixture": {"weights": {"web": 1.0}}}, "need mixture.by"),
    "tokens without by": ({"mixture": {"tokens": 5}}, "need mixture.by"),
    "weights as a list": ({"mixture": {"weights": [1.0]}}, "mixture.weights must be a table"),
    "held out": ({"held_out_fraction": 1.0}, "held_out_fraction=1.0"),
    "unknown filter": ({"filters": {"min_word": 3}}, "did you mean 'min_words'?"),
    "method": ({"dedup": {"method": "fuzzy"}}, "dedup.method must be one of"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_recipe_that_cannot_work_is_refused_by_key(name: str) -> None:
    changes, message = MISTAKES[name]
    with pytest.raises(ValueError) as caught:
        config(**changes)
    assert message in str(caught.value)
