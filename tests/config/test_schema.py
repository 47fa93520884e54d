"""Dataclasses from plain dictionaries: nothing passes unread, and every error names its key."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from dsv2.config import ModelConfig, schema


@dataclass(frozen=True, kw_only=True)
class Round:
    kind: Literal["round"] = "round"
    radius: float


@dataclass(frozen=True, kw_only=True)
class Square:
    kind: Literal["square"] = "square"
    side: int


@dataclass(frozen=True, kw_only=True)
class Drawing:
    title: str
    shape: Round | Square
    scale: float = 1.0
    visible: bool = True
    colour: Literal["red", "blue"] = "red"
    points: tuple[int, ...] = ()
    layer: int | None = None
    owner: int | str = 0
    frame: Square | None = None


PLAIN: dict[str, Any] = {"title": "a", "shape": {"kind": "round", "radius": 2.0}}


def drawing(**changes: Any) -> Drawing:
    return schema.from_dict(Drawing, PLAIN | changes, "drawing")


def test_absent_keys_take_their_defaults() -> None:
    assert drawing() == Drawing(title="a", shape=Round(radius=2.0))


def test_a_full_dictionary_is_read_into_nested_types() -> None:
    read = drawing(shape={"kind": "square", "side": 3}, points=[1, 2], layer=4, owner="me", frame={"side": 5})
    assert read == Drawing(title="a", shape=Square(side=3), points=(1, 2), layer=4, owner="me", frame=Square(side=5))


def test_to_dict_is_the_inverse_of_from_dict() -> None:
    original = drawing(points=[1, 2], frame={"side": 5}, visible=False)
    assert schema.from_dict(Drawing, schema.to_dict(original)) == original


def test_none_is_left_out_because_toml_has_no_null() -> None:
    assert "layer" not in schema.to_dict(drawing())


def test_an_integer_is_a_float_where_one_is_wanted() -> None:
    assert isinstance(drawing(scale=2).scale, float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"titel": "b"}, r"drawing: unknown key 'titel' \(did you mean 'title'\?\)"),
        ({"zzz": 1}, "drawing: unknown key 'zzz'; known keys: colour, frame"),
        ({"shape": {"kind": "round", "radus": 1.0}}, r"drawing.shape: unknown key 'radus' \(did you mean 'radius'"),
        ({"shape": {"kind": "round"}}, "drawing.shape: missing key 'radius'"),
        ({"shape": {"radius": 1.0}}, "drawing.shape.kind must be one of 'round', 'square'; got None"),
        ({"shape": {"kind": "oval"}}, "drawing.shape.kind must be one of 'round', 'square'; got 'oval'"),
        ({"title": 3}, "drawing.title must be str, got 3"),
        ({"visible": 1}, "drawing.visible must be bool, got 1"),
        ({"scale": True}, "drawing.scale must be float, got True"),
        ({"scale": "2"}, "drawing.scale must be float, got '2'"),
        ({"layer": 1.5}, "drawing.layer must be int, got 1.5"),
        ({"owner": 1.5}, "drawing.owner must be int or str, got 1.5"),
        ({"colour": "green"}, "drawing.colour must be one of 'red', 'blue'; got 'green'"),
        ({"points": 3}, "drawing.points must be a list, got 3"),
        ({"points": [1, "x"]}, r"drawing.points\[1\] must be int, got 'x'"),
        ({"frame": 3}, "drawing.frame must be a table, got 3"),
    ],
)
def test_a_wrong_key_or_value_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drawing(**changes)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ValueError, match="drawing: missing key 'title'"):
        schema.from_dict(Drawing, {"shape": PLAIN["shape"]}, "drawing")


def test_something_other_than_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="Drawing must be a table, got 3"):
        schema.from_dict(Drawing, 3)  # type: ignore[arg-type]


def test_merge_overrides_leaf_by_leaf() -> None:
    base = {"a": 1, "t": {"x": 1, "y": {"z": 1}}}
    assert schema.merge(base, {"b": 2, "t": {"y": {"z": 3, "w": 4}}}) == {
        "a": 1,
        "b": 2,
        "t": {"x": 1, "y": {"z": 3, "w": 4}},
    }


def test_merge_leaves_its_arguments_alone() -> None:
    base = {"t": {"x": 1}}
    schema.merge(base, {"t": {"x": 2}})
    assert base == {"t": {"x": 1}}


def test_merge_replaces_a_table_by_a_value() -> None:
    assert schema.merge({"t": {"x": 1}}, {"t": 2}) == {"t": 2}


def test_a_model_names_the_path_of_a_misspelt_key() -> None:
    data = ModelConfig.preset("tiny").to_dict()
    data["moe"]["num_expert"] = data["moe"].pop("num_experts")
    with pytest.raises(ValueError, match=r"model.moe: unknown key 'num_expert' \(did you mean 'num_experts'\?\)"):
        ModelConfig.from_dict(data)


def test_a_model_with_everything_optional_set_survives_the_dictionary() -> None:
    cfg = ModelConfig.preset("v2")
    assert cfg.rope.yarn is not None
    yarn = dataclasses.replace(cfg.rope.yarn, attention_factor=1.25)
    full = cfg.replace(eos_token_id=(7, 8), rope=dataclasses.replace(cfg.rope, yarn=yarn))
    assert ModelConfig.from_dict(full.to_dict()) == full
