"""Calls in a model's text: what is found does not depend on how it is cut, and nothing else is touched."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2.text import DEEPSEEK_V2, DEEPSEEK_V2_5, render
from dsv2.text.chat import takes_tools
from dsv2.text.tools import DEEPSEEK, HERMES, MARKUPS, CallParser, Markup, tool_style
from tests.text.templates import DEEPSEEK_TOOLS, HERMES_TOOLS

Found = tuple[str, list[tuple[str, str]]]
"""Content, and calls by name and arguments."""

markups = st.sampled_from(MARKUPS)
# Texts that nearly are markup, more often than not.
fragments = st.sampled_from(
    [part for m in MARKUPS for part in (m.begin, m.call, m.after_name, m.call_end, m.end) if part]
    + ["f", "g-1", "{", "}", '{"a": "}"}', '{"a": {"b": [1]}}', '"', "\\", "<", "\n", " ", "a", "｜", "<tool", "```"]
)
objects = st.dictionaries(st.text(max_size=4), st.text(max_size=6) | st.integers() | st.none(), max_size=3)


def parsed(markup: Markup, pieces: Iterable[str]) -> Found:
    parser, content, calls = CallParser(markup), "", []
    for said in [*map(parser.push, pieces), parser.flush()]:
        content += said.content
        for piece in said.calls:
            if piece.name is not None:
                assert piece.index == len(calls)
                calls.append((piece.name, ""))
            assert piece.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    return content, calls


def written(markup: Markup, calls: Iterable[tuple[str, str]]) -> str:
    each = [markup.call + name + markup.after_name + arguments + markup.call_end for name, arguments in calls]
    return markup.begin + markup.separator.join(each) + markup.end


def cut(text: str, places: Iterable[int]) -> list[str]:
    bounds = [0, *sorted({place for place in places if place < len(text)}), len(text)]
    return [text[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]


@given(markups, st.lists(fragments, max_size=24).map("".join), st.sets(st.integers(0, 300)))
def test_any_cut_gives_what_the_whole_text_gives(markup: Markup, text: str, places: set[int]) -> None:
    assert parsed(markup, cut(text, places)) == parsed(markup, list(text)) == parsed(markup, [text])


@given(markups, st.text("<｜tool▁calbegn>`\n {}é"))
def test_text_without_markup_is_unchanged(markup: Markup, text: str) -> None:
    assert parsed(markup, text) == (text, [])


@given(
    markups,
    st.text("ab <{\n", max_size=8),
    st.lists(st.tuples(st.from_regex("[a-zA-Z0-9_-]{1,64}", fullmatch=True), objects), min_size=1, max_size=3),
    st.sets(st.integers(0, 300)),
)
def test_calls_are_found_as_they_were_written(
    markup: Markup, before: str, calls: list[tuple[str, dict[str, Any]]], places: set[int]
) -> None:
    spelled = [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]
    assert parsed(markup, cut(before + written(markup, spelled), places)) == (before, spelled)


@given(st.lists(fragments, max_size=24).map("".join))
def test_no_character_is_lost(text: str) -> None:
    for markup in MARKUPS:
        content, calls = parsed(markup, [text])
        rest = iter(text)
        assert all(char in rest for char in content), "content is not in order in the text"
        if not calls:
            assert content == text


CALL = ("f", '{"a": "}\\""}')


@pytest.mark.parametrize("markup", MARKUPS, ids=lambda markup: markup.name)
def test_text_around_calls_is_content(markup: Markup) -> None:
    assert parsed(markup, [f"one{written(markup, [CALL])}two"]) == ("onetwo", [CALL])


@pytest.mark.parametrize("markup", MARKUPS, ids=lambda markup: markup.name)
def test_white_space_of_markup_may_differ(markup: Markup) -> None:
    text = written(markup, [CALL, CALL])
    for spaced in (text.replace("\n", ""), text.replace("\n", "\n\n ")):
        assert parsed(markup, [spaced]) == ("", [CALL, CALL])


def test_white_space_after_calls_at_the_end_is_no_content() -> None:
    assert parsed(HERMES, [written(HERMES, [CALL]) + "\n"]) == ("", [CALL])
    assert parsed(HERMES, [written(HERMES, [CALL]) + "\nDone."]) == ("\nDone.", [CALL])


def test_arguments_come_before_their_end_is_known() -> None:
    parser = CallParser(HERMES)
    said = parser.push('<tool_call>\n{"name": "f", "arguments": {"a": "lo')
    assert [(call.name, call.arguments) for call in said.calls] == [("f", '{"a": "lo')]
    said = parser.push('ng"')
    assert [(call.name, call.arguments) for call in said.calls] == [(None, 'ng"')]


def test_text_that_cannot_become_markup_is_not_held_back() -> None:
    parser = CallParser(DEEPSEEK)
    assert parser.push("a < b <｜tool").content == "a < b "
    assert parser.push("s").content == "<｜tools"


MALFORMED = {
    "no name": '<tool_call>\n{"name": "", "arguments": {}}\n</tool_call>',
    "a name of other characters": '<tool_call>\n{"name": "f.g", "arguments": {}}\n</tool_call>',
    "a name that is too long": f'<tool_call>\n{{"name": "{"f" * 65}", "arguments": {{}}}}\n</tool_call>',
    "arguments that are no object": '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
    "no arguments": '<tool_call>\n{"name": "f"}\n</tool_call>',
    "prose": "<tool_call> is what I would write",
    "an end alone": "}\n</tool_call>",
    "half of it": '<tool_call>\n{"name": "f", "argu',
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_markup_is_content(name: str) -> None:
    assert parsed(HERMES, [MALFORMED[name]]) == (MALFORMED[name], [])


def test_what_follows_arguments_instead_of_an_end_is_content() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 1}, "b": 2}\n</tool_call>'
    assert parsed(HERMES, [text]) == (', "b": 2}\n</tool_call>', [("f", '{"a": 1}')])


def test_a_call_that_is_cut_off_keeps_the_arguments_it_has() -> None:
    text = written(DEEPSEEK, [CALL])
    num_kept = text.index("}")
    assert parsed(DEEPSEEK, [text[:num_kept]]) == ("", [("f", '{"a": "')])


# Templates


def test_a_template_takes_tools_where_it_reads_the_variable() -> None:
    assert takes_tools("{% if tools %}x{% endif %}")
    assert takes_tools("{% if not tools is defined %}{% set tools = none %}{% endif %}")
    assert not takes_tools("{% for tool in message.tool_calls %}{{ tool }}{% endfor %} tools {# tools #}")
    assert not takes_tools(DEEPSEEK_V2) and not takes_tools(DEEPSEEK_V2_5)


def test_style_is_read_off_what_the_template_writes() -> None:
    found = [tool_style(template) for template in (DEEPSEEK_TOOLS, HERMES_TOOLS)]
    assert [style.markup for style in found] == [DEEPSEEK, HERMES]
    assert [(style.has_no_content, style.has_text_arguments) for style in found] == [(True, True), (False, False)]


def test_template_that_writes_calls_otherwise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"writes calls in neither DeepSeek's nor Hermes' markup"):
        tool_style("{% for m in messages %}[TOOL_CALLS]{{ m.tool_calls | tojson }}{% endfor %}{{ tools }}")
    with pytest.raises(ValueError, match="does not take any tools"):
        tool_style(DEEPSEEK_V2)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
NAMES: dict[str, Any] = {"bos_token": "", "eos_token": "", "add_generation_prompt": True}
CHAT = [
    {"role": "user", "content": "hi"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": CALL[0], "arguments": CALL[1]}}],
    },
    {"role": "tool", "content": "42", "tool_call_id": "1"},
]


@pytest.mark.parametrize("template", [DEEPSEEK_TOOLS, HERMES_TOOLS], ids=["DeepSeek", "Hermes"])
def test_rendered_prompts_hold_tools_calls_and_results(template: str) -> None:
    style = tool_style(template)
    text = render(style.told(CHAT), template=template, tools=[TOOL], **NAMES)
    assert '"name": "f"' in text and "42" in text
    assert parsed(style.markup, [text])[1] == [CALL]
    assert "properties" not in render(style.told(CHAT), template=template, **NAMES)


def test_tools_for_a_template_that_takes_none_are_refused() -> None:
    with pytest.raises(ValueError, match="a chat template that does not take any"):
        render(CHAT[:1], template=DEEPSEEK_V2, tools=[TOOL], **NAMES)
    with pytest.raises(ValueError, match=r"message 1 has \['role', 'content', 'tool_calls'\]"):
        render(CHAT, template=DEEPSEEK_V2, **NAMES)
