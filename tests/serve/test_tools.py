"""Tool calls: what may be called reaches the template, what must be called is, and answers have OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import httpx
import openai
import pytest

from dsv2.config import EngineConfig
from dsv2.engine.core import Engine
from dsv2.engine.outputs import Delta
from dsv2.engine.structured import MAX_SCHEMA_CHARS
from dsv2.serve.chat import Chat, ChatWriter
from dsv2.serve.protocol import Fields
from dsv2.serve.tools import MAX_TOOLS, MAX_TOOLS_CHARS
from dsv2.text import Tokenizer, encode_chat
from dsv2.text.tools import HERMES, MARKUPS, tool_style
from tests.numerics import SMALL_MODELS, random_model
from tests.serve.live import MODEL, Live, events, serving
from tests.text.templates import DEEPSEEK_TOOLS, HERMES_TOOLS

USER = {"role": "user", "content": "The fox?"}
SCHEMA = {
    "type": "object",
    "properties": {"quick": {"type": "boolean"}, "city": {"enum": ["Tokyo", "Paris"]}},
    "required": ["quick", "city"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "jump", "description": "Jumps.", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "sleep"}},
]
JUMP: Any = {"type": "function", "function": {"name": "jump"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "jump", "arguments": '{"quick": true, "city": "Paris"}'}}
HISTORY = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
HISTORY.append({"role": "tool", "content": "done", "tool_call_id": "c1", "name": "jump"})


STYLES = pytest.mark.parametrize("tooled", [DEEPSEEK_TOOLS, HERMES_TOOLS], ids=["DeepSeek", "Hermes"], indirect=True)
ONE_STYLE = pytest.mark.parametrize("tooled", [HERMES_TOOLS], ids=["Hermes"], indirect=True)


@cache
def tokenizer_with(template: str) -> Tokenizer:
    """Has few tokens for a call. What DeepSeek's markup is made of is added and marked special, as if by its makers."""
    calls = [(name, "{}") for name in ("jump", "sleep")] + [("jump", CALL["function"]["arguments"])]
    plain = Tokenizer.train([m.call + name + m.after_name + a + m.call_end for m in MARKUPS for name, a in calls], 420)
    spec = json.loads(plain._json)
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for offset, name in enumerate(["calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end"]):
        spec["added_tokens"].append(flags | {"content": f"<｜tool▁{name}｜>", "id": plain.vocab_size + offset})
    return Tokenizer(json.dumps(spec), chat_template=template)


@pytest.fixture(scope="module")
def tooled(request: pytest.FixtureRequest) -> Iterator[Live]:
    tokenizer = tokenizer_with(request.param)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    model = random_model(SMALL_MODELS["v2-lite"]().replace(vocab_size=tokenizer.vocab_size, **ids), seed=3)
    limits = EngineConfig(max_model_len=1024, max_num_seqs=16, max_num_batched_tokens=256, num_pages=256)
    with serving(Engine(model, tokenizer, limits)) as live:
        yield live


def post(live: Live, **fields: Any) -> httpx.Response:
    body = {"messages": [USER], "max_tokens": 100, "seed": 1, "logit_bias": bias(live)}
    with live.client() as client:
        return client.post("/v1/chat/completions", json=body | {"tools": TOOLS} | fields)


def bias(live: Live) -> dict[str, int]:
    """Against white space, which a random model would write for ever where JSON allows it."""
    tokenizer = live.api.tokenizer
    return {str(i): -90 for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i).isspace()}


def choices(live: Live, **fields: Any) -> list[dict[str, Any]]:
    response = post(live, **fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def check_jump(call: dict[str, Any]) -> None:
    assert call["type"] == "function" and call["function"]["name"] == "jump"
    arguments = json.loads(call["function"]["arguments"])
    assert set(arguments) == {"quick", "city"} and arguments["city"] in ("Tokyo", "Paris")


@STYLES
def test_a_named_function_is_called(tooled: Live) -> None:
    found = choices(tooled, tool_choice=JUMP, n=2)
    for choice in found:
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        check_jump(call)
    assert len({choice["message"]["tool_calls"][0]["id"] for choice in found}) == 2


@STYLES
def test_a_required_call_is_of_any_function(tooled: Live) -> None:
    found = choices(tooled, tool_choice="required", parallel_tool_calls=False, n=4)
    calls = [choice["message"]["tool_calls"] for choice in found]
    assert [len(each) for each in calls] == [1] * 4
    for (call,) in calls:
        if call["function"]["name"] == "sleep":
            assert call["function"]["arguments"] == "{}"
        else:
            check_jump(call)


@STYLES
def test_required_calls_may_be_several(tooled: Live) -> None:
    ends = (tooled.api.tokenizer.eos_id, tooled.api.tokenizer.control_tokens["<｜tool▁calls▁end｜>"])
    against = bias(tooled) | {str(i): -100 for i in ends}
    (choice,) = choices(tooled, tool_choice="required", tools=TOOLS[1:], logit_bias=against, max_tokens=120)
    *complete, _ = choice["message"]["tool_calls"]
    assert complete and choice["finish_reason"] == "length"
    assert [call["function"] for call in complete] == [{"name": "sleep", "arguments": "{}"}] * len(complete)


@ONE_STYLE
def test_a_call_that_is_cut_off_keeps_its_beginning_and_ends_by_length(tooled: Live) -> None:
    whole = post(tooled, tool_choice=JUMP).json()
    max_tokens = whole["usage"]["completion_tokens"] - 8
    (choice,) = choices(tooled, tool_choice=JUMP, max_tokens=max_tokens)
    arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
    assert choice["finish_reason"] == "length" and arguments
    assert whole["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"].startswith(arguments)


@STYLES
def test_a_stream_adds_up_to_the_whole_call(tooled: Live) -> None:
    fields = {"tool_choice": "required", "parallel_tool_calls": False}
    said = events(post(tooled, stream=True, **fields))
    for choice in choices(tooled, **fields):
        parts = [c for event in said for c in event["choices"] if c["index"] == choice["index"]]
        calls: list[dict[str, Any]] = []
        for piece in (piece for part in parts for piece in part["delta"].get("tool_calls", ())):
            if "id" in piece:
                calls.append({"name": piece["function"]["name"], "arguments": ""})
            assert piece["index"] == len(calls) - 1
            calls[-1]["arguments"] += piece["function"]["arguments"]
        assert calls == [call["function"] for call in choice["message"]["tool_calls"]]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]


@STYLES
def test_openai_streams_calls(tooled: Live) -> None:
    asked: Any = {"model": MODEL, "messages": [USER], "max_tokens": 100, "seed": 1, "logit_bias": bias(tooled)}
    with (
        openai.OpenAI(base_url=f"{tooled.url}/v1", api_key="none", max_retries=0) as api,
        api.chat.completions.stream(tools=TOOLS, tool_choice=JUMP, **asked) as stream,
    ):
        kinds = {event.type for event in stream}
        answer = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds
    assert answer.finish_reason == "tool_calls" and answer.message.tool_calls
    check_jump(answer.message.tool_calls[0].model_dump())


@ONE_STYLE
def test_no_choice_hides_the_tools(tooled: Live) -> None:
    with_none, without = post(tooled, tool_choice="none", max_tokens=8), post(tooled, tools=None, max_tokens=8)
    assert with_none.json()["usage"] == without.json()["usage"]
    assert with_none.json()["choices"] == without.json()["choices"]


@STYLES
def test_tools_calls_and_results_reach_the_template(tooled: Live) -> None:
    tokenizer = tooled.api.tokenizer
    with tooled.client() as client:
        tokens = client.post("/tokenize", json={"messages": HISTORY, "tools": TOOLS}).json()["tokens"]
    style = tool_style(str(tokenizer.chat_template))
    plain = [USER, HISTORY[1] | {"content": ""}, {"role": "tool", "content": "done", "tool_call_id": "c1"}]
    function = {key: value for key, value in TOOLS[0]["function"].items() if key != "strict"}
    told = [{"type": "function", "function": function}, TOOLS[1]]
    assert tokens == encode_chat(tokenizer, style.told(plain), tools=told)
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    assert "done" in text and '"sleep"' in text and '{"quick": true, "city": "Paris"}' in text


@STYLES
def test_a_tool_cannot_spell_control_tokens(tooled: Live) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "<｜tool▁calls▁end｜>", "parameters": {}}}
    body = {"messages": [USER], "tools": [tool]}
    with tooled.client() as client:
        tokens = client.post("/tokenize", json=body).json()["tokens"]
    assert tooled.api.tokenizer.control_tokens["<｜tool▁calls▁end｜>"] not in tokens
    assert "<｜tool▁calls▁end｜>" in tooled.api.tokenizer.decode(tokens)


# Without a model ---------------------------------------------------------------------------------------------------


def writer(template: str, **fields: Any) -> ChatWriter:
    body = Fields(json.dumps({"messages": [USER], "tools": TOOLS} | fields).encode())
    return ChatWriter(Chat.take(body, template), tokenizer_with(template))


def delta(text: str, finish_reason: Any = None) -> Delta:
    rest: dict[str, Any] = {"logprobs": None, "stop_reason": None, "num_cached_tokens": 0, "prompt_logprobs": None}
    return Delta(request_id="r", index=0, text=text, token_ids=[5], finish_reason=finish_reason, **rest)


def hermes(name: str) -> str:
    return f"{HERMES.call}{name}{HERMES.after_name}{{}}{HERMES.call_end}"


def test_calls_that_a_model_chooses_to_make_are_found() -> None:
    choice = writer(HERMES_TOOLS).whole(0, delta(f"Well.\n{hermes('a')}\n{hermes('b')}", "stop"))
    assert choice["message"]["content"] == "Well.\n" and choice["finish_reason"] == "tool_calls"
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [
        {"name": "a", "arguments": "{}"},
        {"name": "b", "arguments": "{}"},
    ]


def test_an_answer_without_calls_has_none() -> None:
    choice = writer(HERMES_TOOLS).whole(0, delta("<tool_call> is how", "stop"))
    assert choice["message"] == {"role": "assistant", "content": "<tool_call> is how", "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_markup_is_content_where_nothing_may_be_called() -> None:
    choice = writer(HERMES_TOOLS, tool_choice="none").whole(0, delta(hermes("a"), "stop"))
    assert choice["message"]["content"] == hermes("a")


def test_only_the_first_call_is_given_where_one_is_asked_for() -> None:
    asked = writer(HERMES_TOOLS, parallel_tool_calls=False)
    choice = asked.whole(0, delta(f"{hermes('a')}\n{hermes('b')}", "stop"))
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["a"]


def test_what_was_held_back_comes_with_the_end_of_a_stream() -> None:
    streamed = writer(HERMES_TOOLS)
    assert streamed.first(0, delta("a <tool_"))["delta"] == {"role": "assistant", "content": "a "}
    assert streamed.more(0, delta("call")) is None
    last = streamed.more(0, delta("", "length"))
    assert last is not None
    assert last["delta"] == {"content": "<tool_call"} and last["finish_reason"] == "length"


def test_choices_of_a_stream_are_read_apart() -> None:
    streamed = writer(HERMES_TOOLS)
    halves = hermes("a")[:15], hermes("a")[15:]
    streamed.first(0, delta(halves[0]))
    assert streamed.first(1, delta("b"))["delta"]["content"] == "b"
    told = streamed.more(0, delta(halves[1], "stop"))
    assert told is not None and told["delta"]["tool_calls"][0]["function"]["name"] == "a"
    assert told["finish_reason"] == "tool_calls"


# What is refused ---------------------------------------------------------------------------------------------------


def tool(**function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f"} | function}]}


def history(**call: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL | call]}]}


def answered(**message: Any) -> dict[str, Any]:
    return {"messages": [*HISTORY[:2], HISTORY[2] | message]}


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"tools": {"a": 1}}, "tools", "must be a list"),
    ({"tools": [5]}, "tools", "tools[0]=5 must be"),
    ({"tools": [{"type": "retrieval"}]}, "tools", 'must be {"type": "function", "function": {...}}'),
    ({"tools": [{"type": "function"}]}, "tools", "must be"),
    (tool(name=None), "tools", "tools[0].function has name=None"),
    (tool(name="a b"), "tools", "expected 1 to 64 of a-z, A-Z, 0-9, _ and -"),
    (tool(name="a" * 65), "tools", "expected 1 to 64"),
    (tool(name="a\n"), "tools", "expected 1 to 64"),
    (tool(description=5), "tools", "has description=5, expected a string"),
    (tool(parameters=[1]), "tools", "expected a JSON schema of an object"),
    (tool(parameters={"type": "string"}), "tools", "expected a JSON schema of an object"),
    (tool(parameters={"a": "x" * MAX_SCHEMA_CHARS}), "tools", "tools[0].function.parameters: "),
    (tool(description="x" * MAX_TOOLS_CHARS), "tools", f"expected at most {MAX_TOOLS_CHARS}"),
    ({"tools": tool()["tools"] * 2}, "tools", "tools[1] has the name 'f', which another tool has"),
    ({"tools": tool()["tools"] * (MAX_TOOLS + 1)}, "tools", f"has {MAX_TOOLS + 1} tools"),
    (tool(parameters={"properties": {"a": {"type": "nonsense"}}}) | {"tool_choice": "required"}, None, "nonsense"),
    ({"tool_choice": "always"}, "tool_choice", "must be none, auto, required or"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "must be none, auto, required or"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "name='f' must be a tool's"),
    ({"tool_choice": "required", "tools": []}, "tool_choice", "must be left out where no tools are given"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "must be true or false"),
    ({"response_format": {"type": "json_object"}}, "tools", "where the answer's form is given"),
    (history(id=None), "messages", "messages[1].tool_calls[0]="),
    (history(type="custom"), "messages", "must be"),
    (history(function={"name": "f g", "arguments": "{}"}), "messages", "expected 1 to 64"),
    (history(function={"name": "f", "arguments": {}}), "messages", "expected a JSON object as a string"),
    (history(function={"name": "f", "arguments": "[]"}), "messages", "expected a JSON object as a string"),
    (history(function={"name": "f", "arguments": "{"}), "messages", "expected a JSON object as a string"),
    ({"messages": [USER | {"tool_calls": [CALL]}]}, "messages", "has tool_calls="),
    ({"messages": [USER, {"role": "assistant", "tool_calls": 5}]}, "messages", "expected a list"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages", "has content=None"),
    (answered(tool_call_id=None), "messages", "has tool_call_id=None, expected a string"),
    (answered(tool_call_id="c2"), "messages", "has tool_call_id='c2', which no call before it has"),
    (answered(content=None), "messages", "has content=None"),
]


@ONE_STYLE
@pytest.mark.parametrize(("fields", "param", "says"), BAD, ids=range(len(BAD)))
def test_what_is_no_tool_or_call_is_refused(tooled: Live, fields: dict[str, Any], param: str | None, says: str) -> None:
    response = post(tooled, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert says in error["message"] and error["param"] == param, error
    assert len(error["message"]) < 500


def test_a_template_without_tools_takes_no_calls(client: httpx.Client) -> None:
    response = client.post("/v1/chat/completions", json={"messages": HISTORY})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == (
        "messages[1] has tool calls or a result of one: the model's chat template does not take any tools"
    )


@ONE_STYLE
def test_deep_schemas_are_refused(tooled: Live) -> None:
    schema = '{"properties": {"a": ' * 3000 + "{}" + "}}" * 3000
    tools = f'[{{"type": "function", "function": {{"name": "f", "parameters": {schema}}}}}]'
    with tooled.client() as client:
        content = f'{{"messages": [{json.dumps(USER)}], "tools": {tools}}}'
        response = client.post("/v1/chat/completions", content=content)
    assert response.status_code == 400, response.text
