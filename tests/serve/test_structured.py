"""Both ways to ask for a form, OpenAI's and vLLM's, reach the engine, which keeps to it or refuses it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from dsv2.engine.structured import StructuredOutputs
from dsv2.serve.protocol import Fields, take_structured_outputs
from tests.serve.live import MODEL

SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
AS_OPENAI = {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}
PROMPT = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 60, "temperature": 0}


def taken(body: dict[str, Any]) -> StructuredOutputs | None:
    return take_structured_outputs(Fields(json.dumps(body).encode()))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json": {"type": "object"}}),
        (AS_OPENAI, {"json": SCHEMA}),
        ({"structured_outputs": {"json": SCHEMA}}, {"json": SCHEMA}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, {"grammar": 'start: "a"'}),
    ],
)
def test_every_way_to_ask_means_the_engines(body: dict[str, Any], expected: dict[str, Any] | None) -> None:
    assert taken(body) == (None if expected is None else StructuredOutputs(**expected))


def test_a_schema_shapes_the_answer(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 60, "temperature": 1, "seed": 1, "n": 4}
    choices = client.post("/v1/chat/completions", json=body | AS_OPENAI).json()["choices"]
    # Some of a random model's answers are spaces to the end.
    complete = [choice["message"]["content"] for choice in choices if choice["finish_reason"] == "stop"]
    assert complete
    assert all(isinstance(json.loads(text)["a"], bool) for text in complete)


def test_a_regex_of_many_repetitions_is_followed_or_refused(client: httpx.Client) -> None:
    regex = "(((a{1,1000}){1,1000}){1,1000}){1,1000}"
    answer = client.post("/v1/completions", json=PROMPT | {"structured_outputs": {"regex": regex}})
    if answer.status_code == 200:
        text = answer.json()["choices"][0]["text"]
        assert text == "a" * len(text) != ""
    else:
        assert answer.status_code == 400


def test_a_choice_is_one_of_those_given(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json=PROMPT | {"structured_outputs": {"choice": ["yes", "no"]}})
    assert answer.json()["choices"][0]["text"] in ("yes", "no")


@pytest.mark.parametrize(
    "structure",
    [
        {"regex": "(a"},
        {"json": {"type": "nonsense"}},
        {"grammar": "no grammar"},
        {"choice": []},
        {},
        {"regex": "a", "json": {}},
        {"xml": "a"},
    ],
    ids=str,
)
def test_what_cannot_be_kept_to_is_refused(client: httpx.Client, structure: dict[str, Any]) -> None:
    response = client.post("/v1/completions", json=PROMPT | {"structured_outputs": structure})
    assert response.status_code == 400, response.text
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
