"""Requests end when their clients leave, when the engine fails and when the server does; others never notice."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from dsv2.config.serve import ServeConfig
from dsv2.engine.outputs import Delta
from dsv2.engine.sampling import SamplingParams
from dsv2.serve.loop import EngineLoop
from dsv2.serve.metrics import Stats
from tests.serve.live import Gate, Live, events, new_engine, serving

PATH = "/v1/completions"
LONG = {"prompt": [5, 6, 7], "temperature": 0, "max_tokens": 200, "ignore_eos": True}
SHORT = {"prompt": [9, 9], "temperature": 0, "max_tokens": 4, "ignore_eos": True}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def is_empty(live: Live) -> bool:
    """Whether nothing of any request is left."""
    pages = live.engine.scheduler.pool
    return live.api.loop.is_idle and not live.engine.has_unfinished and pages.num_available == pages.num_pages


def begin_stream(client: httpx.Client, body: dict[str, Any]) -> httpx.Response:
    """A stream that has begun: its status is here."""
    return client.send(client.build_request("POST", PATH, json=body | {"stream": True}), stream=True)


def test_nothing_is_lost_where_the_engine_is_faster_than_the_event_loop() -> None:
    engine, is_done = new_engine(), threading.Event()
    step = engine.step

    def step_and_tell() -> list[Delta]:
        deltas = step()
        if any(delta.finish_reason for delta in deltas):
            is_done.set()
        return deltas

    engine.step = step_and_tell

    async def ask() -> list[int]:
        loop = EngineLoop(engine, Stats(), max_queued_seqs=1)
        loop.start()
        params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        submitting = asyncio.create_task(loop.submit("a", [[5, 6, 7]], params))
        await asyncio.sleep(0)  # until it waits
        assert is_done.wait(timeout=60)  # which keeps the event loop from hearing anything
        with await submitting as call:
            token_ids = [i async for deltas in call.batches() for delta in deltas for i in delta.token_ids]
        await loop.stop()
        return token_ids

    assert len(asyncio.run(ask())) == 5


# Clients that leave -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [True, False])
def test_a_request_ends_when_its_client_leaves(streams: bool) -> None:
    engine = new_engine()
    gate = Gate(engine)
    with serving(engine) as live:
        client = live.client()
        if streams:
            response = begin_stream(client, LONG)
            gate.reached.wait()
            response.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(PATH, json=LONG, timeout=0.05)
        client.close()
        live.wait_until(lambda: live.api.loop.is_idle)
        gate.open()
        live.wait_until(lambda: is_empty(live))
        assert live.api.loop._stats.num_generation_tokens < 200


def test_a_client_that_leaves_takes_nobody_along(live: Live) -> None:
    with live.client() as client:
        expected = client.post(PATH, json=LONG).json()["choices"][0]["text"]
        with client.stream("POST", PATH, json=LONG | {"stream": True}) as staying:
            with live.client() as other:
                begin_stream(other, LONG | {"prompt": [1, 2]}).close()
            text = "".join(event["choices"][0]["text"] for event in events(staying))
    assert text == expected


# Limits -----------------------------------------------------------------------------------------------------------


def test_requests_over_the_queues_limit_are_told_to_come_back(pool: ThreadPoolExecutor) -> None:
    engine = new_engine()
    gate = Gate(engine)
    with serving(engine, ServeConfig(max_queued_seqs=3)) as live, live.client() as client:
        waiting = pool.submit(client.post, PATH, json=SHORT | {"n": 3})
        gate.reached.wait()
        refused = client.post(PATH, json=SHORT)
        gate.open()
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full" and refused.headers["retry-after"] == "1"
        assert waiting.result().status_code == 200
        assert client.post(PATH, json=SHORT).status_code == 200


# Failures ---------------------------------------------------------------------------------------------------------


def test_requests_of_a_failing_step_fail_and_later_ones_go_on(pool: ThreadPoolExecutor) -> None:
    engine = new_engine()
    gate = Gate(engine)
    gate.is_failing = True
    with serving(engine) as live, live.client() as client:
        whole = pool.submit(client.post, PATH, json=LONG)
        gate.reached.wait()
        gate.open()
        assert whole.result().status_code == 500
        assert whole.result().json()["error"]["message"] == "the engine failed: RuntimeError"
        gate.is_failing = False
        assert client.post(PATH, json=SHORT).status_code == 200
        live.wait_until(lambda: is_empty(live))


def test_a_stream_tells_of_a_failure_as_an_event() -> None:
    engine = new_engine()
    gate = Gate(engine)
    with serving(engine) as live, live.client() as client:
        response = begin_stream(client, LONG)
        gate.is_failing = True
        gate.open()
        assert events(response)[-1]["error"]["code"] == "engine_failed"


def test_what_the_engine_gave_up_fails_alone(pool: ThreadPoolExecutor) -> None:
    engine = new_engine(max_num_seqs=1)
    launch, failures = engine.runner.launch, iter([RuntimeError("out of memory")])

    def launch_or_fail(*args: Any, **options: Any) -> Any:
        if engine.scheduler.num_waiting:
            for failure in failures:  # the first time
                raise failure
        return launch(*args, **options)

    engine.runner.launch = launch_or_fail
    with serving(engine) as live, live.client() as client:
        running = begin_stream(client, LONG)
        waiting = pool.submit(httpx.post, live.url + PATH, json=SHORT, timeout=60)
        assert events(running)[-1]["error"]["message"] == "the engine failed: RuntimeError"
        assert waiting.result().status_code == 200


def test_a_server_whose_engine_died_says_so(pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    engine = new_engine()

    class Bug(BaseException):
        pass

    def die() -> Any:
        raise Bug

    engine.step = die
    with serving(engine) as live, live.client() as client:
        assert client.post(PATH, json=SHORT).status_code == 500
        assert client.post(PATH, json=SHORT).status_code == 503
        assert client.get("/health").status_code == 503


# Shutting down ----------------------------------------------------------------------------------------------------


def test_a_server_told_to_stop_finishes_what_runs_and_takes_nothing_new(pool: ThreadPoolExecutor) -> None:
    engine = new_engine()
    gate = Gate(engine)
    with serving(engine, ServeConfig(shutdown_timeout_s=900)) as live, live.client() as client:
        running = pool.submit(client.post, PATH, json=LONG)
        gate.reached.wait()
        live.server.handle_exit(signal.SIGTERM, None)
        refused = client.post(PATH, json=SHORT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert client.get("/health").status_code == 503
        gate.open()
        assert len(running.result().json()["choices"][0]["text"]) > 0
        assert running.result().json()["usage"]["completion_tokens"] == 200
        live.thread.join(timeout=60)
        assert not live.thread.is_alive()


def test_what_does_not_finish_in_time_is_aborted(pool: ThreadPoolExecutor) -> None:
    engine = new_engine()
    gate = Gate(engine)
    with serving(engine, ServeConfig(shutdown_timeout_s=0)) as live, live.client() as client:
        stream = begin_stream(client, LONG)
        gate.reached.wait()
        whole = pool.submit(httpx.post, live.url + PATH, json=LONG, timeout=60)
        live.wait_until(lambda: len(live.api.loop._calls) == 2)
        live.server.handle_exit(signal.SIGTERM, None)
        assert whole.result().status_code == 503
        assert events(stream)[-1]["error"]["code"] == "shutting_down"
        gate.open()


SCRIPT = """
from dsv2.config.serve import ServeConfig
from dsv2.serve.app import create_app
from dsv2.serve.server import Server
from tests.serve.live import MODEL, new_engine

config = ServeConfig()
server = Server(create_app(new_engine(), config, MODEL, "0"), "127.0.0.1", 0, config)
startup = server.startup

async def startup_and_tell(sockets=None):
    await startup(sockets)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)

server.startup = startup_and_tell
server.run()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_the_process_in_good_order(number: signal.Signals, pool: ThreadPoolExecutor) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert process.stdout is not None
    port = int(process.stdout.readline())
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        response = begin_stream(client, LONG)
        process.send_signal(number)
        said = events(response)
    _, errors = process.communicate(timeout=60)
    assert said[-1]["choices"][0]["finish_reason"] == "length"
    assert (process.returncode, errors) == (0, "")
