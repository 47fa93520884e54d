"""Whatever a client sends, it gets a 4xx in OpenAI's form, and nobody else notices."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from dsv2.config.serve import ServeConfig
from dsv2.serve.protocol import Fields, take_sampling_params
from tests.serve.conftest import MAX_BODY_BYTES
from tests.serve.live import MAX_MODEL_LEN, MODEL, Live, events, new_engine, serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD = {"model": MODEL, "prompt": "The quick", "temperature": 0, "max_tokens": 4}
USER = {"role": "user", "content": "hello"}


def check_error(response: httpx.Response, status: int, param: str | None, says: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert says in error["message"], error["message"]
    assert len(error["message"]) < 500


RAW_BODIES = {
    "nothing": (b"", "not JSON"),
    "half an object": (b'{"prompt": "a"', "not JSON"),
    "a list": (b"[1]", "JSON list, expected an object"),
    "invalid UTF-8": (b'{"prompt": "\xff"}', "not UTF-8"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "not UTF-8"),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', "NaN is not a number"),
    "infinity": (b'{"prompt": "a", "temperature": -Infinity}', "-Infinity is not a number"),
    "deep nesting": (b'{"prompt": ' + b"[" * 500_000 + b"]" * 500_000 + b"}", "nested too deeply"),
    "a huge integer": (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not JSON"),
}


@pytest.mark.parametrize("name", RAW_BODIES)
def test_what_is_no_json_object_is_refused(client: httpx.Client, name: str) -> None:
    body, says = RAW_BODIES[name]
    check_error(client.post(COMPLETIONS, content=body), 400, None, says)


FIELDS: list[tuple[str, Any, str]] = [
    ("temperature", float("1e999"), "temperature=inf must be a finite number"),
    ("temperature", "hot", "must be a finite number"),
    ("temperature", -1, "must be a finite number, 0 (greedy) or above"),
    ("max_tokens", 0, "max_tokens=0 must be an integer, 1 or above"),
    ("max_tokens", -1, "max_tokens=-1 must be"),
    ("max_tokens", 1.5, "max_tokens=1.5 must be an integer"),
    ("max_tokens", True, "max_tokens=True must be an integer"),
    ("stop", ["a"] * 100_000, "100000 strings, expected at most"),
    ("stop", [""], "stop[0]='' must be a string of 1 to"),
    ("stop", {"a": 1}, "must be a list of strings"),
    ("top_p", 0, "top_p=0 must be"),
    ("n", 0, "n=0 must be"),
    ("n", 10**30, "must be an integer in 1.."),
    ("seed", 2**70, "must be an integer of 64 bits"),
    ("logprobs", 21, "logprobs=21 must be an integer in 0..20"),
    ("logit_bias", {"-1": 1}, "token id '-1' must be an integer, 0 or above"),
    ("logit_bias", {"5": 1000}, "must be a number in [-100, 100]"),
    ("logit_bias", [5], "logit_bias=[5] must be an object"),
    ("min_tokens", 5, "min_tokens=5 must not exceed max_tokens=4"),
    ("stream", "yes", "stream='yes' must be true or false"),
    ("stream_options", {"include_usage": True}, "must only be given where stream is true"),
    ("best_of", 3, "best_of=3 must be n=1"),
    ("suffix", "end", "suffix must be empty"),
    ("prompt", None, "must be a string, token ids"),
    ("prompt", [], "not empty"),
    ("prompt", [[]], "not empty"),
    ("prompt", [True, False], "must be a string, token ids"),
    ("prompt", ["a", 1], "must be a string, token ids"),
    ("prompt", {"text": "a"}, "must be a string, token ids"),
    ("response_format", {"type": "xml"}, "expected text, json_object or json_schema"),
    ("response_format", {"type": "json_schema"}, "must hold"),
    ("structured_outputs", ["a"], "must be an object"),
]


@pytest.mark.parametrize(
    ("name", "value", "says"), FIELDS, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(FIELDS)]
)
def test_a_field_out_of_range_is_named(client: httpx.Client, name: str, value: Any, says: str) -> None:
    body = json.dumps(GOOD | {name: value}).replace("Infinity", "1e999")
    check_error(client.post(COMPLETIONS, content=body), 400, name, says)


ENGINE_REFUSES = {
    "a prompt over the limit": ({"prompt": [1] * MAX_MODEL_LEN}, f"a prompt of {MAX_MODEL_LEN} tokens"),
    "a prompt far over the limit": ({"prompt": "fox " * 100_000}, "leaves no room for output"),
    "an unknown token": ({"prompt": [10**6]}, "outside the vocabulary"),
    "a token id of many bits": ({"prompt": [2**80]}, "must be token ids"),
    "a negative token": ({"prompt": [-1]}, "must not be negative"),
    "one bad prompt of several": ({"prompt": [[1], [10**6]]}, "outside the vocabulary"),
    "a lone surrogate": ({"prompt": "\ud800"}, "surrogate"),
    "a bias of an unknown token": ({"logit_bias": {"1000000": 1}}, "outside the vocabulary"),
    "too many sequences": ({"prompt": ["a"] * 5, "n": 1000}, "5000 sequences (prompts times n) exceed 4096"),
    "an unknown field": ({"temprature": 0}, "unknown key 'temprature' (did you mean 'temperature'?)"),
}


@pytest.mark.parametrize("name", ENGINE_REFUSES)
def test_what_the_engine_cannot_do_is_refused(client: httpx.Client, name: str) -> None:
    fields, says = ENGINE_REFUSES[name]
    response = client.post(COMPLETIONS, content=json.dumps(GOOD | fields))
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]


MESSAGES: list[tuple[Any, str]] = [
    (None, "messages must be a list of at least one"),
    ([], "messages must be a list of at least one"),
    (["hello"], "must be an object with role and content"),
    ([{"role": "user"}], "has content=None"),
    ([{"role": 5, "content": "a"}], "has role=5"),
    ([{"role": "robot", "content": "a"}], "has role 'robot', expected one of"),
    ([USER | {"tool_calls": [{"id": "1"}]}], "has tool_calls"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "has the part"),
]


@pytest.mark.parametrize(("messages", "says"), MESSAGES, ids=range(len(MESSAGES)))
def test_what_is_no_conversation_is_refused(client: httpx.Client, messages: Any, says: str) -> None:
    response = client.post(CHAT, json={"messages": messages})
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]


def test_an_unknown_model_is_not_found(client: httpx.Client) -> None:
    for response in (client.post(COMPLETIONS, json=GOOD | {"model": "gpt"}), client.get("/v1/models/gpt")):
        check_error(response, 404, "model", "'gpt' does not exist, expected 'small'")


def test_an_unknown_model_of_no_unicode_is_quoted_back(client: httpx.Client) -> None:
    body = json.dumps(GOOD | {"model": "\ud800"})
    check_error(client.post(COMPLETIONS, content=body), 404, "model", "does not exist")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v2", 404), ("PUT", COMPLETIONS, 405)])
def test_an_unknown_path_or_method_has_the_form_too(client: httpx.Client, method: str, path: str, status: int) -> None:
    check_error(client.request(method, path), status, None, "Not")


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_over_the_limit_is_refused(client: httpx.Client, is_announced: bool) -> None:
    body = json.dumps(GOOD | {"prompt": "a" * MAX_BODY_BYTES}).encode()
    content = body if is_announced else iter([body[:1000], body[1000:]])  # in chunks: of unknown length
    check_error(client.post(COMPLETIONS, content=content), 413, None, f"larger than {MAX_BODY_BYTES} bytes")


@pytest.mark.parametrize("tokens", [None, "a", [-1], [10**9], [1.5], [True]], ids=str)
def test_what_is_no_token_has_no_text(client: httpx.Client, tokens: Any) -> None:
    check_error(client.post("/detokenize", json={"tokens": tokens}), 400, "tokens", "must be a list")


@pytest.fixture(scope="module")
def locked() -> Any:
    with serving(new_engine(), ServeConfig(api_key="sesame")) as live:
        yield live


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", "Basic sesame", "sesame", "Bearer \xe9"], ids=str)
def test_a_wrong_key_opens_nothing(locked: Live, header: str | None) -> None:
    headers = [] if header is None else [(b"Authorization", header.encode("latin-1"))]
    with locked.client() as client:
        for method, path in [("POST", COMPLETIONS), ("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics")]:
            response = client.request(method, path, headers=headers)
            check_error(response, 401, None, "the API key is missing or wrong")
            assert response.json()["error"]["code"] == "invalid_api_key"


def test_the_right_key_opens_everything_and_health_needs_none(locked: Live) -> None:
    with locked.client() as client:
        assert client.get("/health").status_code == 200
        response = client.post(COMPLETIONS, json=GOOD, headers={"Authorization": "Bearer sesame"})
        assert response.status_code == 200


def test_bad_requests_leave_others_alone(live: Live) -> None:
    long = GOOD | {"max_tokens": 100, "ignore_eos": True}
    with live.client() as client, live.client() as other:
        expected = client.post(COMPLETIONS, json=long).json()["choices"][0]["text"]
        with client.stream("POST", COMPLETIONS, json=long | {"stream": True}) as running:
            for fields, _ in ENGINE_REFUSES.values():
                assert other.post(COMPLETIONS, content=json.dumps(GOOD | fields)).status_code == 400
            for body, _ in RAW_BODIES.values():
                assert other.post(COMPLETIONS, content=body).status_code == 400
            text = "".join(choice["text"] for event in events(running) for choice in event["choices"])
    assert text == expected


def test_fields_without_effect_are_taken() -> None:
    fields = Fields(json.dumps({"user": "me", "store": True, "metadata": {}, "seed": None}).encode())
    take_sampling_params(fields, max_tokens=1, logprobs=None)
    fields.finish()


def test_a_server_without_a_tokenizer_is_refused() -> None:
    engine = new_engine()
    engine.tokenizer = None
    with pytest.raises(ValueError, match="small has no tokenizer"), serving(engine):
        pass
