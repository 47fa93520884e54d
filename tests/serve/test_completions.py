"""/v1/completions says what the engine says, in the form that clients of OpenAI's legacy endpoint read."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from dsv2.engine.llm import LLM
from dsv2.engine.outputs import Logprob, RequestOutput
from dsv2.engine.sampling import SamplingParams
from dsv2.serve.completions import _by_text
from tests.serve.live import MODEL, events, get_model, get_tokenizer

TEXT = "The quick brown"
IDS = [5, 6, 7, 8]


def complete(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "temperature": 0, "max_tokens": 6} | fields
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def stream(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": MODEL, "temperature": 0, "max_tokens": 6, "stream": True} | fields
    return events(client.post("/v1/completions", json=body))


def generate(prompts: Any, **params: Any) -> list[RequestOutput]:
    """The same without a server, in an engine of its own."""
    llm = LLM(get_model(), get_tokenizer(), max_model_len=256, num_pages=64)
    given: dict[str, Any] = {"temperature": 0, "max_tokens": 6} | params
    return llm.generate(prompts, SamplingParams(**given))


@pytest.mark.parametrize(
    "prompt",
    [TEXT, IDS, [TEXT, "over"], [IDS, [9], [3] * 70]],
    ids=["text", "ids", "texts", "lists of ids"],
)
def test_prompts_of_every_kind_are_continued_as_the_engine_does(client: httpx.Client, prompt: Any) -> None:
    choices = complete(client, prompt=prompt)["choices"]
    assert [c["index"] for c in choices] == list(range(len(choices)))
    assert [c["text"] for c in choices] == [output.outputs[0].text for output in generate(prompt)]


def test_text_is_encoded_after_a_bos_unless_told_otherwise(client: httpx.Client) -> None:
    ids = get_tokenizer().encode(TEXT)
    bos_id = get_tokenizer().bos_id
    for add_special_tokens, prompt in [(True, [bos_id, *ids]), (False, ids)]:
        answer = complete(client, prompt=TEXT, add_special_tokens=add_special_tokens)
        assert answer["choices"][0]["text"] == complete(client, prompt=prompt)["choices"][0]["text"]


def test_n_answers_to_each_prompt_come_in_order(client: httpx.Client) -> None:
    params = {"n": 2, "temperature": 1.0, "seed": 5}
    choices = complete(client, prompt=[IDS, [9, 9]], **params)["choices"]
    expected = [each.text for output in generate([IDS, [9, 9]], **params) for each in output.outputs]
    assert [c["text"] for c in choices] == expected
    assert len(set(expected)) == 4


def test_a_stream_adds_up_to_the_whole_answer(client: httpx.Client) -> None:
    fields = {"prompt": [IDS, [9, 9]], "n": 2, "temperature": 1.0, "seed": 5, "logprobs": 2}
    whole = complete(client, **fields)["choices"]
    for choice in whole:
        parts = [c for event in stream(client, **fields) for c in event["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        for name, values in choice["logprobs"].items():
            assert [value for part in parts for value in part["logprobs"][name]] == values


def test_usage_counts_prompt_output_and_cached_tokens(client: httpx.Client) -> None:
    prompt = [11] * 130  # two full pages
    complete(client, prompt=prompt)
    usage = complete(client, prompt=[prompt, IDS], n=2, max_tokens=3)["usage"]
    assert usage == {
        "prompt_tokens": 134,
        "completion_tokens": 12,
        "total_tokens": 146,
        "prompt_tokens_details": {"cached_tokens": 128},
    }


def test_a_stream_ends_with_usage_only_where_asked(client: httpx.Client) -> None:
    plain, counted = (
        stream(client, prompt=IDS, **options) for options in ({}, {"stream_options": {"include_usage": True}})
    )
    assert not any("usage" in event for event in plain)
    assert [event["usage"] for event in counted[:-1]] == [None] * (len(counted) - 1)
    assert counted[-1]["choices"] == [] and counted[-1]["usage"]["completion_tokens"] == 6


def test_a_stop_string_ends_the_answer_and_is_named(client: httpx.Client) -> None:
    text = generate(TEXT)[0].outputs[0].text
    choice = complete(client, prompt=TEXT, stop=[text[2:4]])["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text[:2], "stop", text[2:4])


# Scores -----------------------------------------------------------------------------------------------------------


def test_logprobs_are_the_engines_own(client: httpx.Client) -> None:
    said = complete(client, prompt=IDS, logprobs=3)["choices"][0]["logprobs"]
    output = generate(IDS, logprobs=3)[0].outputs[0]
    assert output.logprobs is not None
    expected = [each[i] for each, i in zip(output.logprobs, output.token_ids, strict=True)]
    assert said["tokens"] == [each.decoded_token for each in expected]
    assert said["token_logprobs"] == pytest.approx([each.logprob for each in expected], abs=1e-5)


def test_an_echo_scores_every_prompt_token_and_one_more(client: httpx.Client) -> None:
    choice = complete(client, prompt=[IDS], echo=True, logprobs=1, max_tokens=1)["choices"][0]
    output = generate([IDS], prompt_logprobs=1, logprobs=1, max_tokens=1)[0]
    assert output.prompt_logprobs is not None and output.outputs[0].logprobs is not None
    scored = [*output.prompt_logprobs, *output.outputs[0].logprobs]
    ids = [*IDS, *output.outputs[0].token_ids]
    said = choice["logprobs"]
    assert said["token_logprobs"][0] is None and said["top_logprobs"][0] is None
    expected = [each[i].logprob for each, i in zip(scored, ids, strict=True) if each is not None]
    assert said["token_logprobs"][1:] == pytest.approx(expected, abs=1e-5)
    best = [max(each.values()).logprob for each in scored if each is not None]
    assert [max(top.values()) for top in said["top_logprobs"][1:]] == pytest.approx(best, abs=1e-5)


def test_a_scored_token_is_among_its_candidates_as_the_same_float(client: httpx.Client) -> None:
    said = complete(client, prompt=[IDS], echo=True, logprobs=1, max_tokens=1)["choices"][0]["logprobs"]
    pairs = list(zip(said["token_logprobs"], said["top_logprobs"], strict=True))[1:]
    assert all(own in top.values() for own, top in pairs)


def test_of_candidates_that_read_alike_the_most_probable_is_told() -> None:
    part = "\ufffd"  # of a character
    candidates = {
        1: Logprob(-5.0, 9, part),
        2: Logprob(-1.0, 1, part),
        3: Logprob(-2.0, 2, "a"),
        4: Logprob(-3.0, 3, part),
    }
    assert _by_text(candidates) == {part: -1.0, "a": -2.0}


def test_an_impossible_token_has_a_score_that_json_can_hold() -> None:
    assert _by_text({1: Logprob(float("-inf"), 300, "a")}) == {"a": -9999.0}


def test_text_offsets_point_at_tokens_in_the_text(client: httpx.Client) -> None:
    choice = complete(client, prompt=TEXT, echo=True, logprobs=0)["choices"][0]
    said = choice["logprobs"]
    assert choice["text"].startswith(TEXT)
    placed = list(zip(said["tokens"], said["text_offset"], strict=True))
    found = [token for token, offset in placed[1:] if choice["text"].startswith(token, offset)]
    assert placed[0] == (get_tokenizer().bos_token, 0)  # not part of the text
    assert found[:3] == ["The", " quick", " brown"]


def test_no_tokens_with_echo_give_the_prompt_alone(client: httpx.Client) -> None:
    answer = complete(client, prompt=IDS, echo=True, logprobs=1, max_tokens=0)
    choice = answer["choices"][0]
    assert choice["text"] == get_tokenizer().decode(IDS)
    assert len(choice["logprobs"]["tokens"]) == len(IDS)
    assert (choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 0)


def test_a_stream_begins_with_the_echo(client: httpx.Client) -> None:
    fields = {"prompt": [TEXT, "over"], "echo": True, "logprobs": 1}
    whole = complete(client, **fields)["choices"]
    for choice in whole:
        parts = [c for event in stream(client, **fields) for c in event["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [o for part in parts for o in part["logprobs"]["text_offset"]] == choice["logprobs"]["text_offset"]
