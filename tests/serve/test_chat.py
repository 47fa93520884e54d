"""/v1/chat/completions: conversations laid out by the template, answered in OpenAI's form."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from dsv2.text import encode_chat
from tests.serve.live import MODEL, events, get_tokenizer

USER = {"role": "user", "content": "hello"}


def chat(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [USER], "temperature": 0, "max_tokens": 6} | fields
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def continuation(client: httpx.Client, messages: list[dict[str, str]]) -> str:
    body = {"prompt": encode_chat(get_tokenizer(), messages), "temperature": 0, "max_tokens": 6}
    return client.post("/v1/completions", json=body).json()["choices"][0]["text"]


def test_an_answer_continues_what_the_template_makes_of_the_messages(client: httpx.Client) -> None:
    messages = [{"role": "system", "content": "be brief"}, USER, {"role": "assistant", "content": "hi"}, USER]
    message = chat(client, messages=messages)["choices"][0]["message"]
    assert message == {"role": "assistant", "content": continuation(client, messages), "refusal": None}


@pytest.mark.parametrize(
    ("message", "same"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "a\nb"),
        ({"role": "user", "content": "a", "name": None, "tool_calls": []}, "a"),
    ],
    ids=["text parts", "empty keys"],
)
def test_messages_of_other_forms_mean_the_same(client: httpx.Client, message: dict[str, Any], same: str) -> None:
    answer = chat(client, messages=[message])["choices"][0]["message"]["content"]
    assert answer == continuation(client, [{"role": "user", "content": same}])


def test_a_developer_is_the_system(client: httpx.Client) -> None:
    answers = [
        chat(client, messages=[{"role": role, "content": "be brief"}, USER])["choices"][0]["message"]["content"]
        for role in ("developer", "system")
    ]
    assert answers[0] == answers[1]


def test_an_answer_fills_the_context_where_no_limit_is_given(client: httpx.Client) -> None:
    usage = chat(client, max_tokens=None, ignore_eos=True)["usage"]
    assert usage["total_tokens"] == 256


def test_max_completion_tokens_is_max_tokens(client: httpx.Client) -> None:
    answer = chat(client, max_tokens=None, max_completion_tokens=3, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 3


def test_a_stream_adds_up_to_the_whole_answer(client: httpx.Client) -> None:
    fields = {"n": 2, "temperature": 1.0, "seed": 1, "logprobs": True, "top_logprobs": 2}
    body = {"messages": [USER], "max_tokens": 6, "stream": True} | fields
    said = events(client.post("/v1/chat/completions", json=body))
    for choice in chat(client, **fields)["choices"]:
        parts = [c for event in said for c in event["choices"] if c["index"] == choice["index"]]
        assert parts[0]["delta"]["role"] == "assistant"
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert [each for part in parts for each in part["logprobs"]["content"]] == choice["logprobs"]["content"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]


def test_logprobs_give_as_many_candidates_as_asked_the_best_first(client: httpx.Client) -> None:
    tokens = chat(client, logprobs=True, top_logprobs=3, temperature=1.0, seed=7)["choices"][0]["logprobs"]["content"]
    for token in tokens:
        scores = [each["logprob"] for each in token["top_logprobs"]]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True) and token["logprob"] <= scores[0]


def test_logprobs_without_candidates_give_tokens_and_their_bytes(client: httpx.Client) -> None:
    choice = chat(client, logprobs=True)["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert [token["top_logprobs"] for token in tokens] == [[]] * len(tokens)
    text = b"".join(bytes(token["bytes"]) for token in tokens).decode(errors="replace")
    assert text == choice["message"]["content"]


def test_tools_are_refused_in_words(client: httpx.Client) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    response = client.post("/v1/chat/completions", json={"messages": [USER], "tools": tools})
    assert response.status_code == 400
    assert "the model's chat template does not take any" in response.json()["error"]["message"]
