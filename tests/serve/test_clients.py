"""Programs that people use, unchanged, against a live server."""

from __future__ import annotations

import asyncio
import json
import random
import time
from functools import partial
from typing import Any

import httpx
import openai
import pytest

from dsv2.engine.llm import LLM
from dsv2.engine.sampling import SamplingParams
from dsv2.text import encode_chat
from tests.serve.live import MODEL, Live, get_model, get_tokenizer, new_engine, serving

MESSAGES: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "The quick brown fox?"}]


def new_llm() -> LLM:
    return LLM(get_model(), get_tokenizer(), max_model_len=256, num_pages=256)


def greedy_texts(prompts: list[list[int]], max_tokens: int) -> list[str]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return [output.outputs[0].text for output in new_llm().generate(prompts, params)]


# openai -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def api(live: Live) -> Any:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as api:
        yield api


def test_openai_lists_and_finds_the_model(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == [MODEL]
    assert api.models.retrieve(MODEL).id == MODEL


def test_openai_chats(api: openai.OpenAI) -> None:
    (text,) = greedy_texts([encode_chat(get_tokenizer(), MESSAGES)], 12)
    create = partial(api.chat.completions.create, model=MODEL, messages=MESSAGES, temperature=0, max_tokens=12)
    extra = {"ignore_eos": True}
    whole = create(extra_body=extra, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == text
    assert whole.choices[0].logprobs and len(whole.choices[0].logprobs.content or []) == 12
    stream = list(create(extra_body=extra, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream[:-1]) == text
    assert stream[-1].usage and stream[-1].usage.completion_tokens == 12


def test_openai_completes(api: openai.OpenAI) -> None:
    prompts = [[5, 6, 7], [9, 9]]
    texts = greedy_texts(prompts, 12)
    create = partial(api.completions.create, model=MODEL, prompt=prompts, temperature=0, max_tokens=12)
    whole = create(extra_body={"ignore_eos": True}, logprobs=2)
    assert [choice.text for choice in whole.choices] == texts
    streamed = ["", ""]
    for chunk in create(extra_body={"ignore_eos": True}, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts


def test_openai_raises_what_went_wrong(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt' does not exist"):
        api.chat.completions.create(model="gpt", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="temperature=-1.0 must be") as raised:
        api.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=-1.0)
    assert raised.value.param == "temperature"


# lm-eval ----------------------------------------------------------------------------------------------------------


def in_process_scores(pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Of continuations after contexts, without a server."""
    tokenizer, scores = get_tokenizer(), []
    for context, continuation in pairs:
        ids = tokenizer.encode(context + continuation)
        num_context = len(tokenizer.encode(context))
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        said = new_llm().generate([ids], params)[0].prompt_logprobs
        assert said is not None
        own = [(each[i].logprob, each[i].rank) for each, i in zip(said, ids, strict=True) if each is not None]
        own = own[num_context - 1 :]
        scores.append((sum(logprob for logprob, _ in own), all(rank == 1 for _, rank in own)))
    return scores


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("num_concurrent", [1, 4])
def test_lm_eval_scores_as_the_engine_does(live: Live, num_concurrent: int) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    pairs = [
        ("The quick brown", " fox jumps"),
        ("The quick brown", " dog"),
        ("over the", " lazy dog. The quick brown fox"),
        ("a", "b"),
    ]
    # The most probable continuation, so that not all are told not to be greedy.
    ids = get_tokenizer().encode("over the")
    ascii_next = new_llm().generate([ids], SamplingParams(temperature=0, max_tokens=1))[0].outputs[0].text
    pairs.append(("over the", ascii_next))
    make: Any = LocalCompletionsAPI  # whose decorator hides its arguments
    model = make(model=MODEL, base_url=f"{live.url}/v1/completions", num_concurrent=num_concurrent, batch_size=2)
    assert model.tokenizer_backend == "remote"
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    expected = in_process_scores(pairs)
    said = model.loglikelihood(requests, disable_tqdm=True)
    assert [score for score, _ in said] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [is_greedy for _, is_greedy in said] == [is_greedy for _, is_greedy in expected]
    generated = model.generate_until(
        [Instance("generate_until", {}, ("The quick", {"until": ["\n\n"], "max_gen_toks": 5}), 0)], disable_tqdm=True
    )
    params = SamplingParams(temperature=0, max_tokens=5, stop=["\n\n", get_tokenizer().eos_token])
    assert generated == [new_llm().generate([get_tokenizer().encode("The quick")], params)[0].outputs[0].text]


# A crowd ----------------------------------------------------------------------------------------------------------


async def read_stream(client: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None) -> str | None:
    """The text of a stream; None where the client left after so many events."""
    text, num_events = "", 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return text
            if line:
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                num_events += 1
            if num_events == leave_after:
                return None
    raise AssertionError(f"a stream ended early, after {text!r}")


async def crowd(
    url: str, prompts: list[list[int]], texts: list[str], max_tokens: int, until_s: float
) -> tuple[int, int]:
    """64 clients, each one request after the other, a twentieth of which it leaves midway.

    Returns how many answers were correct, and how many left.
    """
    num_correct = num_left = 0

    async def visitor(seed: int) -> None:
        nonlocal num_correct, num_left
        rng = random.Random(seed)
        while True:
            choice = rng.randrange(len(prompts))
            body = {"prompt": prompts[choice], "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
            leave_after = rng.randint(1, 4) if rng.random() < 0.05 else None
            text = await read_stream(client, body | {"stream": True}, leave_after)
            if text is None:
                num_left += 1
            else:
                assert text == texts[choice]
                num_correct += 1
            if time.monotonic() >= until_s:
                return

    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as client, asyncio.TaskGroup() as visitors:
        for seed in range(64):
            visitors.create_task(visitor(seed))
    return num_correct, num_left


@pytest.mark.parametrize("seconds", [0, pytest.param(60, marks=pytest.mark.slow)])
def test_a_crowd_of_which_some_leave_is_answered_correctly(seconds: int) -> None:
    rng, max_tokens = random.Random(0), 12
    prompts = [[rng.randrange(256) for _ in range(rng.choice([1, 9, 40, 100]))] for _ in range(24)]
    prompts += [prompts[-1][:80] + [i] for i in range(8)]  # alike in their first page
    texts = greedy_texts(prompts, max_tokens)
    engine = new_engine(num_pages=80)  # too few for all at once
    with serving(engine) as live:
        until_s = time.monotonic() + seconds
        num_correct, num_left = asyncio.run(crowd(live.url, prompts, texts, max_tokens, until_s))
        live.wait_until(lambda: live.api.loop.is_idle and not engine.has_unfinished)
        assert num_left >= 2 and num_correct + num_left >= 64
        assert engine.scheduler.pool.num_available == engine.scheduler.pool.num_pages
