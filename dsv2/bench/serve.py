"""`dsv2 bench serve`: what clients of a running server see, under the names and in the shapes of vLLM's command.

Sends completions of random token ids to any server of OpenAI's API at a given rate, and reads the streams: time to
first token, time a token after it, time between chunks. Knows no engine, and imports httpx where it is used.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dsv2.config.schema import require
from dsv2.files import write_json

if TYPE_CHECKING:
    import httpx

_CONNECT_S = 60.0
_SILENCE_S = 3600.0  # requests may wait long for their turn
_MAX_ERRORS = 10

_LATENCIES = {
    "ttft_ms": "time to first token, ms",
    "tpot_ms": "time a token after the first, ms",
    "itl_ms": "time between chunks, ms",
}
_RATES = {
    "requests_per_s": "requests/s",
    "output_tokens_per_s": "output tokens/s",
    "tokens_per_s": "tokens/s, prompts included",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The requests and when they are sent. Raises ValueError outside the ranges."""

    num_prompts: int = 100
    input_len: int = 1024
    """Tokens of every prompt."""
    output_len: int = 128
    """Tokens of every answer: the end of sequence ends none."""
    request_rate: float = math.inf
    """Requests a second on average, as a Poisson process; infinite: all at once."""
    max_concurrency: int | None = None
    """Requests on their way at once, at most; further ones wait here, which counts as no latency."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "input_len", "output_len", "max_concurrency", "request_rate"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value} must be positive")

    def starts_s(self) -> list[float]:
        """When each request is sent, in seconds from the beginning."""
        if math.isinf(self.request_rate):
            return [0.0] * self.num_prompts
        rng = random.Random(self.seed)
        gaps = (rng.expovariate(self.request_rate) for _ in range(self.num_prompts - 1))
        return list(accumulate(gaps, initial=0.0))

    def prompts(self, vocab_size: int) -> list[list[int]]:
        rng = random.Random(self.seed)
        return [[rng.randrange(vocab_size) for _ in range(self.input_len)] for _ in range(self.num_prompts)]


@dataclass(slots=True)
class Answer:
    """What became of a request. Times are in seconds since it was sent."""

    arrivals_s: list[float] = field(default_factory=list)
    """Of the chunks that brought something."""
    num_input: int = 0
    num_output: int = 0
    error: str | None = None

    @property
    def tpot_s(self) -> float:
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / (self.num_output - 1)


def run(
    url: str,
    load: Load,
    *,
    model: str | None = None,
    vocab_size: int | None = None,
    api_key: str | None = None,
    commit: str = "unknown",
    out: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Put `load` on the server at `url`, and tell what it took. `out` gets it as JSON.

    Args:
        url: without /v1.
        model: what the server calls it; None: the first that it has.
        vocab_size: prompts hold ids below it; None: what the server's /tokenizer_info says.
        commit: recorded with the results.

    Raises ValueError where nothing answers, or a first request, which is not counted, is refused.
    """
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    with Progress(console=console, transient=True) as bar:
        results = asyncio.run(_measure(url, load, model, vocab_size, api_key, bar))
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    results = {"what": "serve", "url": url, "date": date, "commit": commit} | results
    if out is not None:
        write_json(out, results)
    return results


async def _measure(
    url: str, load: Load, model: str | None, vocab_size: int | None, api_key: str | None, bar: Progress
) -> dict[str, Any]:
    async with _client(url, api_key) as client:
        model = await _find_model(client, model)
        prompts = load.prompts(vocab_size or await _find_vocab_size(client))
        bodies = [_body(model, prompt, load.output_len) for prompt in prompts]
        first = await complete(client, bodies[0])
        require(first.error is None, f"the server at {url} failed a first request: {first.error}")
        task = bar.add_task(f"{load.num_prompts} requests", total=load.num_prompts)
        began = time.perf_counter()
        answers = await _send(client, bodies, load, lambda: bar.advance(task))
        elapsed_s = time.perf_counter() - began
    about = {"model": model, "num_prompts": load.num_prompts, "input_len": load.input_len}
    about |= {"output_len": load.output_len, "max_concurrency": load.max_concurrency}
    rate = None if math.isinf(load.request_rate) else load.request_rate  # JSON has no infinity
    return about | {"request_rate": rate} | summary(answers, elapsed_s)


# The server -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _client(url: str, api_key: str | None) -> AsyncIterator[httpx.AsyncClient]:
    """As many connections as there are requests. Where there is no server, what is tried in here is a ValueError."""
    import httpx

    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(_SILENCE_S, connect=_CONNECT_S)
    try:
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout, limits=limits) as client:
            yield client
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"no server answers at {url}: {_told(error)}; `dsv2 serve` starts one") from error


async def _get(client: httpx.AsyncClient, path: str) -> dict[str, Any]:
    response = await client.get(path)
    if response.status_code != 200:
        raise ValueError(f"{response.url} says {_refusal(response)}")
    try:
        return dict(response.json())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{response.url} answers {response.text[:100]!r}, expected a JSON object") from error


async def _find_model(client: httpx.AsyncClient, model: str | None) -> str:
    names = [each["id"] for each in (await _get(client, "/v1/models")).get("data", ())]
    require(bool(names), f"the server at {client.base_url} has no model")
    require(model in (None, *names), f"the server has no model {model!r}, but {', '.join(names)}")
    return model or names[0]


async def _find_vocab_size(client: httpx.AsyncClient) -> int:
    try:
        return int((await _get(client, "/tokenizer_info"))["vocab_size"])
    except (ValueError, KeyError) as error:
        raise ValueError("the server does not tell its vocabulary's size: give --vocab-size") from error


# Requests ---------------------------------------------------------------------------------------------------------


def _body(model: str, prompt: list[int], output_len: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _send(
    client: httpx.AsyncClient, bodies: Sequence[dict[str, Any]], load: Load, on_answer: Callable[[], None]
) -> list[Answer]:
    turns = asyncio.Semaphore(load.max_concurrency or len(bodies))
    began = time.perf_counter()

    async def send(body: dict[str, Any], start_s: float) -> Answer:
        await asyncio.sleep(began + start_s - time.perf_counter())
        async with turns:
            answer = await complete(client, body)
        on_answer()
        return answer

    return await asyncio.gather(*map(send, bodies, load.starts_s()))


async def complete(client: httpx.AsyncClient, body: Mapping[str, Any]) -> Answer:
    """Send one request and read its stream to the end. What goes wrong is in the answer."""
    import httpx

    answer, began = Answer(), time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                raise ValueError(_refusal(response))
            async for line in response.aiter_lines():
                _read(line, answer, time.perf_counter() - began)
        require(bool(answer.arrivals_s and answer.num_output), "the stream ended early, or without usage")
    except (httpx.HTTPError, ValueError) as error:
        answer.error = _told(error)
    return answer


def _read(line: str, answer: Answer, at_s: float) -> None:
    """Add a line of a stream, which came at `at_s`, to its answer."""
    data = line.removeprefix("data:").strip()
    if data == line or data == "[DONE]":
        return
    event = json.loads(data)
    if "error" in event:
        raise ValueError(f"the stream ended in {json.dumps(event['error'])}")
    if event.get("choices"):
        answer.arrivals_s.append(at_s)
    if usage := event.get("usage"):
        answer.num_input, answer.num_output = usage["prompt_tokens"], usage["completion_tokens"]


def _refusal(response: httpx.Response) -> str:
    """Of OpenAI's form the message, else the body's beginning."""
    try:
        said = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = response.text[:200]
    return f"{response.status_code}: {said}"


def _told(error: Exception) -> str:
    return " ".join(f"{error}".split()) or type(error).__name__


# Results ----------------------------------------------------------------------------------------------------------


def summary(answers: Sequence[Answer], elapsed_s: float) -> dict[str, Any]:
    """Counts, rates and latencies of what was answered; errors by what they say, the most frequent first."""
    good = [answer for answer in answers if answer.error is None]
    num_input, num_output = (sum(getattr(a, name) for a in good) for name in ("num_input", "num_output"))
    errors = Counter(answer.error for answer in answers if answer.error is not None)
    return {
        "completed": len(good),
        "failed": len(answers) - len(good),
        "errors": dict(errors.most_common(_MAX_ERRORS)),
        "elapsed_s": elapsed_s,
        "input_tokens": num_input,
        "output_tokens": num_output,
        "requests_per_s": len(good) / elapsed_s,
        "output_tokens_per_s": num_output / elapsed_s,
        "tokens_per_s": (num_input + num_output) / elapsed_s,
        "ttft_ms": _spread(a.arrivals_s[0] for a in good),
        "tpot_ms": _spread(a.tpot_s for a in good if a.num_output > 1),
        "itl_ms": _spread(gap for a in good for gap in np.diff(a.arrivals_s)),
    }


def _spread(times_s: Iterable[float]) -> dict[str, float] | None:
    """In milliseconds; None of nothing."""
    ms = 1e3 * np.array(list(times_s))
    if not ms.size:
        return None
    return {"mean": float(ms.mean()), "p50": float(np.percentile(ms, 50)), "p99": float(np.percentile(ms, 99))}


def print_results(console: Console, results: Mapping[str, Any]) -> None:
    """A table of latencies, the rates, and what failed."""
    table = Table(title=f"{results['model']} at {results['url']}", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("", "mean", "p50", "p99"):
        table.add_column(heading, justify="right" if heading else "left")
    for key, name in _LATENCIES.items():
        if (spread := results[key]) is not None:
            table.add_row(name, *(f"{spread[which]:,.2f}" for which in ("mean", "p50", "p99")))
    for key, name in _RATES.items():
        table.add_row(name, f"{results[key]:,.2f}")
    console.print(table, highlight=False)
    console.print(f"{results['completed']} answered, {results['failed']} failed", highlight=False)
    for error, count in results["errors"].items():
        console.print(f"{count} x {error}", markup=False, highlight=False)
