"""`dsv2 bench serve`: the load that it puts on a server, the figures that it makes of streams, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import math
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from dsv2 import cli
from dsv2.bench import serve as bench
from dsv2.bench.serve import Answer, Load, complete, run, summary
from dsv2.config.serve import ServeConfig
from dsv2.serve.server import Server
from dsv2.weights import save
from tests.serve.live import MODEL, Live, get_model, get_tokenizer, new_engine, serving

QUIET = Console(quiet=True)
SMALL = {"num_prompts": 5, "input_len": 7, "output_len": 4}
KEY = "secret"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A server that wants a key."""
    with serving(new_engine(), ServeConfig(api_key=KEY)) as live:
        yield live


# Load -------------------------------------------------------------------------------------------------------------


def test_requests_arrive_as_a_poisson_process() -> None:
    starts = Load(num_prompts=2001, request_rate=4).starts_s()
    gaps = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    assert starts[0] == 0
    assert sum(gaps) / 2000 == pytest.approx(1 / 4, rel=0.1)
    # Of an exponential distribution this share is longer than its mean.
    assert sum(gap > 1 / 4 for gap in gaps) / 2000 == pytest.approx(math.exp(-1), abs=0.04)


def test_an_infinite_rate_sends_everything_at_once() -> None:
    assert Load(num_prompts=3).starts_s() == [0, 0, 0]


def test_prompts_are_of_the_vocabulary_and_of_the_seed() -> None:
    load = Load(**SMALL)
    prompts = load.prompts(11)
    assert [len(prompt) for prompt in prompts] == [7] * 5
    assert {i for prompt in prompts for i in prompt} == set(range(11))
    assert prompts == load.prompts(11) != Load(**SMALL, seed=1).prompts(11)


@pytest.mark.parametrize("change", [{"num_prompts": 0}, {"request_rate": math.nan}, {"max_concurrency": 0}])
def test_a_load_of_nothing_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.* must be positive"):
        Load(**change)


# Streams ----------------------------------------------------------------------------------------------------------


def text_event(**fields: Any) -> str:
    return f"data: {json.dumps({'choices': [{'text': 'a'}]} | fields)}\n\n"


USAGE = f"data: {json.dumps({'choices': [], 'usage': {'prompt_tokens': 7, 'completion_tokens': 2}})}\n\n"
DONE = "data: [DONE]\n\n"
Handler = Callable[[httpx.Request], Any]


def client_of(handler: Handler) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url="http://test", transport=httpx.MockTransport(handler))


def answer_of(status: int, body: str) -> Answer:
    async def ask() -> Answer:
        async with client_of(lambda _: httpx.Response(status, text=body)) as client:
            return await complete(client, {})

    return asyncio.run(ask())


def test_a_whole_stream_is_an_answer() -> None:
    answer = answer_of(200, text_event(usage=None) + text_event(usage=None) + USAGE + DONE)
    assert (answer.error, len(answer.arrivals_s), answer.num_input, answer.num_output) == (None, 2, 7, 2)


FAILURES = {
    "refused": (429, '{"error": {"message": "too many"}}', "429: too many"),
    "no JSON": (502, "<html>bad gateway", "502: <html>bad gateway"),
    "failed later": (200, text_event() + 'data: {"error": {"message": "on fire"}}\n\n', "on fire"),
    "cut off": (200, text_event(), "the stream ended early"),
    "empty": (200, USAGE + DONE, "the stream ended early"),
    "garbled": (200, "data: {\n\n", "Expecting property name"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_stream_that_fails_is_no_answer(what: str) -> None:
    status, body, message = FAILURES[what]
    assert message in str(answer_of(status, body).error)


def test_a_lost_connection_is_no_answer() -> None:
    def lose(_: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("gone")

    async def ask() -> Answer:
        async with client_of(lose) as client:
            return await complete(client, {})

    assert asyncio.run(ask()).error == "gone"


def test_no_more_requests_are_on_their_way_than_may_be() -> None:
    num_running, seen = 0, []

    async def answer(_: httpx.Request) -> httpx.Response:
        nonlocal num_running
        num_running += 1
        seen.append(num_running)
        await asyncio.sleep(0)  # lets the others run
        num_running -= 1
        return httpx.Response(200, text=text_event() + USAGE + DONE)

    async def send() -> list[Answer]:
        async with client_of(answer) as client:
            return await bench._send(client, [{}] * 9, Load(num_prompts=9, max_concurrency=3), lambda: None)

    assert [answer.error for answer in asyncio.run(send())] == [None] * 9
    assert max(seen) == 3


# Figures ----------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_answers() -> None:
    answers = [
        Answer(arrivals_s=[0.1, 0.3, 0.7], num_input=10, num_output=4),
        Answer(arrivals_s=[0.3], num_input=10, num_output=1),
        Answer(arrivals_s=[0.2], error="500: on fire"),
    ]
    figures = summary(answers, elapsed_s=2.0)
    assert (figures["completed"], figures["failed"], figures["errors"]) == (2, 1, {"500: on fire": 1})
    assert (figures["input_tokens"], figures["output_tokens"]) == (20, 5)
    assert (figures["requests_per_s"], figures["output_tokens_per_s"], figures["tokens_per_s"]) == (1, 2.5, 12.5)
    assert figures["ttft_ms"] == pytest.approx({"mean": 200, "p50": 200, "p99": 298})
    assert figures["tpot_ms"] == pytest.approx({"mean": 200, "p50": 200, "p99": 200})
    assert figures["itl_ms"] == pytest.approx({"mean": 300, "p50": 300, "p99": 398})


def test_of_no_answer_there_is_no_latency() -> None:
    figures = summary([Answer(error="gone")] * 3, elapsed_s=1.0)
    assert (figures["ttft_ms"], figures["tpot_ms"], figures["itl_ms"]) == (None, None, None)
    assert figures["errors"] == {"gone": 3}


# A server ---------------------------------------------------------------------------------------------------------


def dsv2(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "serve", *arguments], catch_exceptions=False)


LENGTHS = ["--num-prompts", "5", "--input-len", "7", "--output-len", "4"]


def test_a_server_answers_all_of_a_load(live: Live, tmp_path: Path) -> None:
    out = tmp_path / "new" / "r.json"
    options = ["--api-key", KEY, "--max-concurrency", "2", "--request-rate", "1000", "--commit", "abc"]
    done = dsv2("--url", live.url, *LENGTHS, *options, "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "5 answered, 0 failed" in done.output
    assert "time to first token, ms" in done.output
    results = json.loads(out.read_text())
    assert (results["what"], results["model"], results["commit"]) == ("serve", MODEL, "abc")
    assert (results["completed"], results["input_tokens"], results["output_tokens"]) == (5, 35, 20)
    assert results["tpot_ms"]["mean"] > 0


def test_the_server_that_the_errors_name_takes_its_limits_from_its_options(tmp_path: Path, monkeypatch) -> None:
    save(get_model(), tmp_path / "model", tokenizer=get_tokenizer())
    servers: list[Server] = []
    monkeypatch.setattr(Server, "run", lambda server: servers.append(server))
    options = ["--api-key", KEY, "--max-model-len", "96", "--max-num-seqs", "3", "--no-enable-prefix-caching"]
    done = CliRunner().invoke(
        cli.app,
        ["serve", str(tmp_path / "model"), "--device", "cpu", "--port", "8123", *options],
        catch_exceptions=False,
    )
    assert done.output == f"serving {tmp_path / 'model'} at http://127.0.0.1:8123\n"
    api = cast(Any, servers[0].config.app).state.api
    engine_config = api.loop.engine.config
    assert (api.config.api_key, engine_config.max_model_len, engine_config.max_num_seqs) == (KEY, 96, 3)
    assert not engine_config.enable_prefix_caching


def test_ids_are_of_the_vocabulary_that_the_server_tells(live: Live, monkeypatch) -> None:
    sizes: list[int] = []
    prompts = Load.prompts
    monkeypatch.setattr(Load, "prompts", lambda load, size: sizes.append(size) or prompts(load, size))
    run(live.url, Load(**SMALL), api_key=KEY, console=QUIET)
    run(live.url, Load(**SMALL), api_key=KEY, vocab_size=50, console=QUIET)
    assert sizes == [get_tokenizer().vocab_size, 50]


def test_the_command_ends_with_1_where_requests_fail(live: Live, monkeypatch) -> None:
    answers = iter([Answer([0.1], 7, 4), Answer(error="gone")])

    async def fail(*_: Any) -> Answer:
        return next(answers, Answer([0.1, 0.2], 7, 4))

    monkeypatch.setattr(bench, "complete", fail)
    done = dsv2("--url", live.url, *LENGTHS, "--api-key", KEY)
    assert done.exit_code == 1
    assert "4 answered, 1 failed" in done.output
    assert "1 x gone" in done.output


def test_a_server_that_does_not_answer_is_told(tmp_path: Path) -> None:
    with socket.socket() as bound:  # which does not listen
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"no server answers at {url}: .*`dsv2 serve` starts one"):
            run(url, Load(**SMALL), out=tmp_path / "r.json", console=QUIET)
    assert not (tmp_path / "r.json").exists()


MISTAKES = {
    "no key": ({"api_key": None}, {}, "401: the API key is missing or wrong"),
    "other model": ({"model": "big"}, {}, f"no model 'big', but {MODEL}"),
    "too long": ({}, {"input_len": 300}, "failed a first request: 400: .*300 tokens"),
    "other ids": ({"vocab_size": 10**6}, {}, "failed a first request: 400: .*vocabulary"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_what_a_server_refuses_is_told_before_anything_is_measured(live: Live, what: str) -> None:
    options, change, message = MISTAKES[what]
    with pytest.raises(ValueError, match=message):
        run(live.url, Load(**SMALL | change), **({"api_key": KEY} | options), console=QUIET)


@pytest.mark.parametrize("url", ["somewhere", "http://[", "ftp://here"])
def test_what_is_no_address_is_told(url: str) -> None:
    with pytest.raises(ValueError, match="no server answers at"):
        run(url, Load(**SMALL), console=QUIET)


def test_a_server_that_does_not_tell_its_vocabulary_needs_to_be_told() -> None:
    async def find() -> int:
        async with client_of(lambda _: httpx.Response(404, text="nothing here")) as client:
            return await bench._find_vocab_size(client)

    with pytest.raises(ValueError, match="give --vocab-size"):
        asyncio.run(find())


def test_a_page_that_is_no_api_is_told() -> None:
    async def find() -> str:
        async with client_of(lambda _: httpx.Response(200, text="<html>")) as client:
            return await bench._find_model(client, None)

    with pytest.raises(ValueError, match="answers '<html>', expected a JSON object"):
        asyncio.run(find())
