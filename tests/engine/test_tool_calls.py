"""An output that must be calls is their markup, word for word, around arguments that fit their schemas."""

from __future__ import annotations

import json
from functools import cache

import pytest

from dsv2.engine.structured import MAX_ALTERNATIVES, Grammars, StructuredOutputs
from dsv2.engine.tool_calls import ToolCalls
from dsv2.text import Tokenizer
from dsv2.text.tools import DEEPSEEK, HERMES, MARKUPS, Markup

MARKERS = [f"<｜tool▁{name}｜>" for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")]
SCHEMA = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
OTHER = json.dumps({"type": "object", "properties": {}, "additionalProperties": False})


@cache
def tokenizer() -> Tokenizer:
    plain = Tokenizer.train(["The quick brown fox. "], 280)
    spec = json.loads(plain._json)
    flags = {"special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"] += [flags | {"content": m, "id": plain.vocab_size + i} for i, m in enumerate(MARKERS)]
    return Tokenizer(json.dumps(spec))


def is_output(markup: Markup, text: str, *, is_several: bool = True, parse_special: bool = True) -> bool:
    form = StructuredOutputs(tool_calls=ToolCalls(markup, (("f", SCHEMA), ("g-1", OTHER)), is_several))
    matcher = Grammars(tokenizer(), tokenizer().vocab_size, [tokenizer().eos_id]).matcher(form)
    try:
        for token_id in tokenizer().encode(text, parse_special=parse_special):
            matcher.accept(token_id)
    except ValueError:
        return False
    return matcher.can_end


def call(markup: Markup, name: str, arguments: str) -> str:
    return markup.call + name + markup.after_name + arguments + markup.call_end


@pytest.mark.parametrize("markup", MARKUPS, ids=lambda markup: markup.name)
def test_calls_in_markup_that_fit_their_schemas_are_the_output(markup: Markup) -> None:
    one, two = call(markup, "f", '{"a": 1}'), call(markup, "g-1", "{}")
    assert is_output(markup, markup.begin + one + markup.end)
    assert is_output(markup, markup.begin + markup.separator.join([one, two, one]) + markup.end)
    assert not is_output(markup, markup.begin + markup.separator.join([one, two]) + markup.end, is_several=False)
    assert not is_output(markup, markup.begin + call(markup, "f", '{"a": "1"}') + markup.end)
    assert not is_output(markup, markup.begin + call(markup, "g-1", '{"a": 1}') + markup.end)
    assert not is_output(markup, markup.begin + call(markup, "h", "{}") + markup.end)
    assert not is_output(markup, markup.begin + markup.end) and not is_output(markup, "Well.")


def test_markup_that_is_control_tokens_comes_as_those() -> None:
    text = DEEPSEEK.begin + call(DEEPSEEK, "g-1", "{}") + DEEPSEEK.end
    assert is_output(DEEPSEEK, text) and not is_output(DEEPSEEK, text, parse_special=False)


def test_limits_of_schemas_hold_for_all_functions_together() -> None:
    schema = json.dumps({"anyOf": [{"type": "object"}] * (MAX_ALTERNATIVES // 2)})
    StructuredOutputs(tool_calls=ToolCalls(HERMES, (("f", schema),), False))
    with pytest.raises(ValueError, match=f"alternatives in all, expected at most {MAX_ALTERNATIVES}"):
        StructuredOutputs(tool_calls=ToolCalls(HERMES, (("f", schema), ("g", schema)), False))
